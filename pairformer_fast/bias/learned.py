"""Networks that make the factors of a pair bias from features of single tokens, and their side file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pairformer_fast.config import Frozen
from pairformer_fast.kernels.flash_bias import Factors

TANH_GAIN = 5 / 3
SUFFIX = ".factors.safetensors"


class FactorsError(ValueError):
    """A side file of factor networks that cannot be used; the message says why."""


class NetworkShape(Frozen):
    """Dimensions of a :class:`FactorNetwork`.

    Attributes
    ----------
    channels : int
        Features of a token.
    heads, rank : int
        Of the factors.
    hidden : int
        Width of the hidden layers.
    table : int, optional
        Largest relative position with an entry of its own in a trained table beside the factors; no table if omitted.
    """

    channels: int = Field(ge=1)
    heads: int = Field(ge=1)
    rank: int = Field(ge=1)
    hidden: int = Field(ge=1)
    table: int | None = Field(default=None, ge=1)


class FactorNetwork(nn.Module):
    r"""Factors of the pair bias of one attention, by one tanh network for queries and one for keys.

    Features are normalised first: means over many tokens are small. Fresh networks give a bias of about unit variance,
    as the projections do that they replace.

    Parameters
    ----------
    shape : NetworkShape
        Dimensions.

    Notes
    -----
    Source: the neural decomposition of FlashBias (Wu et al., NeurIPS 2025, arXiv 2505.12044).
    """

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.shape = shape
        self.norm = nn.LayerNorm(shape.channels)
        self.phi_q, self.phi_k = _mlp(shape), _mlp(shape)
        size = None if shape.table is None else (shape.heads, 2 * shape.table + 1)
        self.table = None if size is None else nn.Parameter(torch.zeros(size))

    def forward(self, tokens: Tensor, keep: Tensor, dtype: torch.dtype) -> Factors:
        """Factors of a batch.

        Parameters
        ----------
        tokens : Tensor
            ``[B, N, channels]`` features.
        keep : Tensor
            Bool ``[B, N]``; the factors of other tokens are zero.
        dtype : torch.dtype
            Of the factors, that of the queries.

        Returns
        -------
        Factors
            ``[B, H, N, R]``, differentiable.

        Raises
        ------
        ValueError
            If the tokens have another number of features.
        """
        if tokens.shape[-1] != self.shape.channels:
            raise ValueError(f"tokens must have {self.shape.channels} features, but got {list(tokens.shape)}")
        tokens = self.norm(tokens.to(self.norm.weight.dtype))
        padding = ~keep[:, None, :, None]

        def factor(mlp: nn.Module) -> Tensor:
            by_head = mlp(tokens).unflatten(-1, (self.shape.heads, self.shape.rank)).transpose(1, 2)
            return by_head.masked_fill(padding, 0).to(dtype)

        table = None if self.table is None else self.table.to(torch.promote_types(dtype, torch.float32))
        return Factors(factor(self.phi_q), factor(self.phi_k), table=table)


def _mlp(shape: NetworkShape) -> nn.Sequential:
    widths = [shape.channels, shape.hidden, shape.hidden, shape.heads * shape.rank]
    # The bias sums `rank` products of two factors.
    gains = [1.0, TANH_GAIN, TANH_GAIN * shape.rank**-0.25]
    layers: list[nn.Module] = []
    for c_in, c_out, gain in zip(widths[:-1], widths[1:], gains, strict=True):
        layer = nn.Linear(c_in, c_out)
        nn.init.normal_(layer.weight, std=gain * c_in**-0.5)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class FactorNetworks(nn.Module):
    """All factor networks of a model, apart from it: the model's own ``state_dict`` stays as it is.

    Parameters
    ----------
    shapes : mapping of str to NetworkShape
        By the path of the attention core within the model, as :func:`~pairformer_fast.bias.collect_reports` names it.
    """

    def __init__(self, shapes: Mapping[str, NetworkShape]) -> None:
        super().__init__()
        self._networks = nn.ModuleDict({_key(path): FactorNetwork(shape) for path, shape in shapes.items()})

    def __getitem__(self, path: str) -> FactorNetwork:
        network = self._networks[_key(path)]
        assert isinstance(network, FactorNetwork)
        return network

    def __iter__(self) -> Iterator[str]:
        return (key.replace("/", ".") for key in self._networks)

    def __len__(self) -> int:
        return len(self._networks)

    @property
    def shapes(self) -> dict[str, NetworkShape]:
        """Dimensions by path."""
        return {path: self[path].shape for path in self}

    def save(
        self, path: str | Path, checkpoint: str | Path | None = None, metadata: dict[str, object] | None = None
    ) -> None:
        """Write all networks to a safetensors file, whole or not at all.

        Parameters
        ----------
        path : path
            Target; its folder must exist. :func:`side_file` names the one that belongs to a checkpoint.
        checkpoint : path, optional
            Weights that the networks belong to; its checksum is kept.
        metadata : dict, optional
            JSON-ready facts about the training.
        """
        path = Path(path)
        shapes = {name: shape.model_dump() for name, shape in self.shapes.items()}
        header = {"networks": json.dumps(shapes), "metadata": json.dumps(metadata or {})}
        if checkpoint is not None:
            header["checkpoint_sha256"] = sha256(checkpoint)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            file = Path(folder) / path.name
            save_file(tensors, file, header)
            os.replace(file, path)

    @classmethod
    def load(cls, path: str | Path, checkpoint: str | Path | None = None) -> FactorNetworks:
        """Networks from a file that :meth:`save` wrote.

        Parameters
        ----------
        path : path
        checkpoint : path, optional
            As of :func:`read_shapes`.

        Raises
        ------
        FileNotFoundError, FactorsError
            As :func:`read_shapes`, and if the weights do not fit their dimensions.
        """
        networks = cls(read_shapes(path, checkpoint))
        try:
            with safe_open(path, framework="pt") as file:
                networks.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, RuntimeError) as error:
            raise FactorsError(f"{path} does not hold the factor networks that its header names: {error}") from error
        return networks


def read_shapes(path: str | Path, checkpoint: str | Path | None = None) -> dict[str, NetworkShape]:
    """Dimensions of the networks of a side file, from its header.

    Parameters
    ----------
    path : path
        Side file.
    checkpoint : path, optional
        Weights that the networks are wanted for.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FactorsError
        If the file is no side file, or belongs to other weights than ``checkpoint``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no factor networks at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        shapes = TypeAdapter(dict[str, NetworkShape]).validate_json(header["networks"])
    except (KeyError, SafetensorError, ValidationError) as error:
        raise FactorsError(f"{path} is no file of factor networks of this package: {error}") from error
    belongs_to = header.get("checkpoint_sha256")
    if checkpoint is not None and belongs_to is not None and belongs_to != sha256(checkpoint):
        raise FactorsError(f"{path} holds factor networks of other weights than {checkpoint}: make them anew")
    return shapes


def side_file(checkpoint: str | Path) -> Path:
    """Where the factor networks of a checkpoint are looked for: ``model.factors.safetensors`` beside it."""
    return Path(checkpoint).with_suffix(SUFFIX)


def sha256(path: str | Path) -> str:
    """Checksum of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(path: str) -> str:
    """Name of a submodule, which may not hold dots."""
    return path.replace(".", "/")
