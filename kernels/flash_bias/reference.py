"""Explicit PyTorch: the truth every other implementation is held against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pairformer_fast.kernels.flash_bias.terms import BiasTerms

SLAB_BYTES = 256 * 2**20
"""Largest table of logits held at once when no gradient is recorded."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: BiasTerms,
    mask: Tensor | None,
    pair_mask: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """Attention in fp32, or fp64 for fp64 inputs; arguments in the triangle layout of the api."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    bias = terms.additive(dtype)
    slabs = []
    for rows in _slabs(q, k, dtype):
        dropped = _dropped(mask, pair_mask, rows)
        weights = _logits(q[:, rows], k[:, rows], bias, dropped, dtype).softmax(-1)
        if dropped is not None:
            weights = weights.masked_fill(dropped, 0)
        out = torch.einsum("bihnm,bimhd->binhd", weights, v[:, rows].to(dtype))
        slabs.append(out if gate is None else gate[:, rows].to(dtype).sigmoid() * out)
    return torch.cat(slabs, dim=1).to(q.dtype)


def log_sum_exp(q: Tensor, k: Tensor, terms: BiasTerms, mask: Tensor | None, pair_mask: Tensor | None) -> Tensor:
    """Natural logarithm of the softmax denominators, ``[B, I, H, N]``; -inf for queries without any key."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    bias = terms.additive(dtype)
    slabs = []
    for rows in _slabs(q, k, dtype):
        dropped = _dropped(mask, pair_mask, rows)
        lse = _logits(q[:, rows], k[:, rows], bias, dropped, dtype).logsumexp(-1)
        slabs.append(lse if dropped is None else lse.masked_fill(dropped.all(-1), -torch.inf))
    return torch.cat(slabs, dim=1)


def _slabs(q: Tensor, k: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    batch, rows, queries, heads, _ = q.shape
    step = rows
    if not torch.is_grad_enabled():
        step = max(1, SLAB_BYTES // (batch * heads * queries * k.shape[2] * dtype.itemsize))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _dropped(mask: Tensor | None, pair_mask: Tensor | None, rows: slice) -> Tensor | None:
    """What broadcasts to ``[B, I, H, N, M]``, True where a key is not to be seen."""
    by_row = None if mask is None else ~mask[:, rows, None, None, :]
    by_pair = None if pair_mask is None else ~pair_mask[:, None, None]
    if by_row is None or by_pair is None:
        return by_pair if by_row is None else by_row
    return by_row | by_pair


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, dropped: Tensor | None, dtype: torch.dtype) -> Tensor:
    logits = torch.einsum("binhd,bimhd->bihnm", q.to(dtype), k.to(dtype)) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.unsqueeze(1)
    if dropped is None:
        return logits
    # A finite floor keeps queries without any key free of NaN; their weights are zeroed afterwards.
    return logits.masked_fill(dropped, torch.finfo(dtype).min)
