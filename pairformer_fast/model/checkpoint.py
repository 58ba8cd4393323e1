"""Weights on disk: one safetensors file with the model's dimensions in its header."""

from __future__ import annotations

import json
import os
import tempfile
from importlib import resources
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pairformer_fast.bias import set_attention
from pairformer_fast.config import AttentionConfig, Backend, BiasMethod, ModelConfig
from pairformer_fast.model.folding import FoldingModel


class CheckpointError(ValueError):
    """A file that is no checkpoint of this package; the message says why."""


def default_checkpoint(bias: BiasMethod = BiasMethod.DENSE) -> Path:
    """Path of the bundled antibody weights; for ``learned`` of those trained with factors, networks beside them."""
    name = "antibody_learned" if bias is BiasMethod.LEARNED else "antibody"
    return Path(str(resources.files("pairformer_fast.data") / "weights" / f"{name}.safetensors"))


def save_checkpoint(model: FoldingModel, path: str | Path, metadata: dict[str, object]) -> None:
    """Write weights in bf16, whole or not at all.

    Parameters
    ----------
    model : FoldingModel
        Its parameters and dimensions are written.
    path : path
        Target; its folder must exist.
    metadata : dict
        JSON-ready facts about the training.
    """
    path = Path(path)
    tensors = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in model.state_dict().items()
    }
    header = {"config": model.config.model_dump_json(), "metadata": json.dumps(metadata)}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        save_file(tensors, file, header)
        os.replace(file, path)


def load_checkpoint(path: str | Path) -> FoldingModel:
    """Model in fp32 and ``eval()`` mode from a file that :func:`save_checkpoint` wrote.

    A model that was trained with learned factors has no dense bias: it comes with ``bias="learned"`` set, and runs once
    its networks are attached (:func:`~pairformer_fast.model.factors.load_factors`).

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    CheckpointError
        If the file is no safetensors file, lacks the model's dimensions or does not fit them.
    """
    model = FoldingModel(read_config(path))
    try:
        with safe_open(path, framework="pt") as file:
            model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no checkpoint of this package: {error}") from error
    if trained_with_factors(path):
        set_attention(model, AttentionConfig(backend=Backend.REFERENCE, bias=BiasMethod.LEARNED))
    return model.eval()


def read_config(path: str | Path) -> ModelConfig:
    """Dimensions and domain of a model from its file's header; the weights are not read.

    Raises
    ------
    FileNotFoundError, CheckpointError
        As :func:`load_checkpoint`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return ModelConfig.model_validate_json((file.metadata() or {})["config"])
    except KeyError:
        message = f"{path} has no model configuration in its header: write it with save_checkpoint"
        raise CheckpointError(message) from None
    except (SafetensorError, ValidationError) as error:
        raise CheckpointError(f"{path} is no checkpoint of this package: {error}") from error


def checkpoint_metadata(path: str | Path) -> dict[str, object]:
    """Facts about the training that :func:`save_checkpoint` stored."""
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("metadata", "{}"))


def trained_with_factors(path: str | Path) -> bool:
    """Whether a checkpoint's model was trained with learned factors instead of a dense bias."""
    attention = checkpoint_metadata(path).get("attention")
    return isinstance(attention, dict) and attention.get("bias") == BiasMethod.LEARNED
