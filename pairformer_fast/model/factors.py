"""Factor networks that fit the attentions of a model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from pairformer_fast.bias import FactorNetworks, FactorsError, NetworkShape
from pairformer_fast.model.attention import AttentionPairBias, TriangleAttention

HIDDEN = 128
"""Default width of the hidden layers."""

CORE = "mha.core"


def factor_networks(model: nn.Module, rank: int, *, hidden: int = HIDDEN, table: int | None = None) -> FactorNetworks:
    """Fresh networks for every triangle attention and attention with pair bias of a model, on the CPU.

    Triangle attention's read the means of rows and columns of LN(z); those of the single representation LN(s), too.

    Parameters
    ----------
    model : nn.Module
        Holds modules of :mod:`pairformer_fast.model.attention`.
    rank : int
        Of all factors.
    hidden : int
        Width of the hidden layers.
    table : int, optional
        See :class:`~pairformer_fast.bias.NetworkShape`.
    """
    shapes = {}
    for path, (channels, heads) in attention_sizes(model).items():
        shapes[path] = NetworkShape(channels=channels, heads=heads, rank=rank, hidden=hidden, table=table)
    return FactorNetworks(shapes)


def attention_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Features of a token and heads, by the path of each attention core."""
    found = {}
    for path, module in model.named_modules():
        core = core_path(path)
        if isinstance(module, TriangleAttention):
            found[core] = (2 * module.linear_z.in_features, module.mha.no_heads)
        elif isinstance(module, AttentionPairBias):
            found[core] = (2 * module.linear_z.in_features + module.mha.linear_q.in_features, module.mha.no_heads)
    return found


def core_path(path: str) -> str:
    """Path of the core of the attention at ``path``."""
    return f"{path}.{CORE}" if path else CORE


def load_factors(path: str | Path, model: nn.Module, checkpoint: str | Path | None = None) -> FactorNetworks:
    """Networks from a side file, checked against a model; on the CPU and not attached.

    Parameters
    ----------
    path : path
        Side file.
    model : nn.Module
        What the networks are for.
    checkpoint : path, optional
        The model's weights: networks that are known to belong to others are refused.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FactorsError
        If the file cannot be read or does not fit the model or its weights.
    """
    networks = FactorNetworks.load(path, checkpoint)
    given = {name: (shape.channels, shape.heads) for name, shape in networks.shapes.items()}
    wanted = attention_sizes(model)
    wrong = sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name))
    if wrong:
        first = wrong[0]
        raise FactorsError(
            f"{path} does not fit the model at {len(wrong)} attentions; {first} has (features, heads) "
            f"{wanted.get(first, 'none')} in the model and {given.get(first, 'none')} in the file"
        )
    return networks.requires_grad_(False).eval()
