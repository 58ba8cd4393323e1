"""What every attention of a running model sees: its dense bias, queries and keys, and the features of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pairformer_fast.bias import FactorNetworks
from pairformer_fast.bias.probe import Probe
from pairformer_fast.features import TokenFeatures
from pairformer_fast.model.attention import AttentionPairBias, TriangleAttention, TriangleUpdate
from pairformer_fast.model.factors import core_path
from pairformer_fast.model.folding import FoldingModel


@dataclass(frozen=True, eq=False)
class Observed:
    """One call of an attention.

    Attributes
    ----------
    path : str
        Of its core within the model.
    q, k : Tensor
        ``[B, I, N, H, D]`` of some rows I, or ``[B, N, H, D]``; not scaled.
    mask : Tensor
        Bool ``[B, I, N]`` or ``[B, N]``, True = keep.
    bias : Tensor
        Dense, ``[B, H, N, N]``.
    tokens : Tensor
        ``[B, N, channels]`` features that a factor network reads.
    keep : Tensor
        Bool ``[B, N]``, True for tokens that are not padding.
    """

    path: str
    q: Tensor
    k: Tensor
    mask: Tensor
    bias: Tensor
    tokens: Tensor
    keep: Tensor


@contextmanager
def observing(model: nn.Module, visit: Callable[[Observed], None]) -> Iterator[None]:
    """Call ``visit`` before every attention of ``model`` that is computed within the context, without gradients."""

    @torch.no_grad()
    def before_triangle(module: TriangleAttention, arguments: tuple[Any, ...], path: str) -> None:
        z, pair_mask = arguments[:2]
        update = TriangleUpdate(module, module.ending, module.config.backend)
        visit(Observed(path, *update.sample(z, pair_mask), update.bias(z), *update.tokens(z, pair_mask)))

    @torch.no_grad()
    def before_single(module: AttentionPairBias, arguments: tuple[Any, ...], path: str) -> None:
        s, z, mask = arguments
        q, k, _ = module.heads(s.unsqueeze(1))
        visit(Observed(path, q, k, mask, module.bias(z), module.tokens(s, z, mask), mask))

    hooks: dict[type[nn.Module], Any] = {TriangleAttention: before_triangle, AttentionPairBias: before_single}
    handles = []
    for path, module in model.named_modules():
        if type(module) in hooks:
            before, core = hooks[type(module)], core_path(path)
            handles.append(
                module.register_forward_pre_hook(lambda m, given, before=before, core=core: before(m, given, core))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def probed_errors(
    model: FoldingModel, networks: FactorNetworks, features: TokenFeatures, recycles: int | None = None
) -> dict[str, float]:
    """Change of attention weights if networks took the place of the dense bias, one attention at a time.

    Parameters
    ----------
    model : FoldingModel
        With its dense bias, in ``eval()`` mode.
    networks : FactorNetworks
        On the device of the model; need not be attached.
    features : TokenFeatures
        Sequences to fold.
    recycles : int, optional
        As in :class:`FoldingModel`.

    Returns
    -------
    dict of str to float
        Mean total variation (0 to 1) of sampled attention weights over heads, batch and passes, by the path of the
        attention's core.
    """
    errors: dict[str, list[float]] = {}

    def visit(seen: Observed) -> None:
        factors = networks[seen.path](seen.tokens, seen.keep, torch.float32)
        with torch.autocast(seen.q.device.type, enabled=False):
            probe = Probe(seen.q, seen.k, seen.bias, seen.mask)
            error = probe.error(factors.phi_q, factors.phi_k, factors.table).mean
        errors.setdefault(seen.path, []).append(float(error.mean()))

    with observing(model, visit):
        model(features, recycles)
    return {path: sum(values) / len(values) for path, values in errors.items()}
