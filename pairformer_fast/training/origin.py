"""Start a run from the weights of another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from pairformer_fast.bias.learned import sha256, side_file
from pairformer_fast.config import BiasMethod
from pairformer_fast.model.checkpoint import CheckpointError, checkpoint_metadata, load_checkpoint, trained_with_factors
from pairformer_fast.model.folding import FoldingModel


def load_start(model: FoldingModel, path: Path, bias: BiasMethod) -> None:
    """Copy the weights of a checkpoint into a model.

    Rates of dropout and the number of recycles may differ: they have no weights.

    Raises
    ------
    FileNotFoundError, CheckpointError
        If the checkpoint cannot be read, has other dimensions, or no trained dense bias where ``bias`` is ``dense``.
    """
    given, wanted = load_checkpoint(path).state_dict(), model.state_dict()
    shapes, needed = ({name: tuple(value.shape) for name, value in state.items()} for state in (given, wanted))
    wrong = sorted(name for name in shapes.keys() | needed.keys() if shapes.get(name) != needed.get(name))
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"{path} does not fit the settings' model in {len(wrong)} tensors; {first} has shape "
            f"{shapes.get(first, 'none')} there and {needed.get(first, 'none')} in the model: change model in the "
            "preset, or start from other weights"
        )
    if bias is BiasMethod.DENSE and trained_with_factors(path):
        raise CheckpointError(
            f"{path} was trained with learned factors, so its dense bias is untrained: set bias learned, or start from "
            "other weights"
        )
    model.load_state_dict(given)


def origin_facts(path: Path, bias: BiasMethod) -> dict[str, Any]:
    """What a log says about the weights that a run started from.

    Returns
    -------
    dict
        ``weights`` (file name), its ``sha256``, ``factors`` (that of its side file if that is used, or None), ``steps``
        and ``gpu_seconds`` of the training so far, all earlier runs included.
    """
    facts = checkpoint_metadata(path)
    earlier = cast(dict[str, Any], facts.get("origin") or {})
    side = side_file(path)
    used = bias is BiasMethod.LEARNED and side.is_file()
    return {
        "weights": path.name,
        "sha256": sha256(path),
        "factors": sha256(side) if used else None,
        "steps": facts.get("step", 0) + earlier.get("steps", 0),
        "gpu_seconds": round(gpu_seconds(facts), 1),
    }


def gpu_seconds(facts: dict[str, Any]) -> float:
    """Seconds of all GPUs together that went into weights, those of earlier runs included."""
    earlier = facts.get("origin") or {}
    return facts.get("seconds", 0.0) * facts.get("gpus", 1) + earlier.get("gpu_seconds", 0.0)
