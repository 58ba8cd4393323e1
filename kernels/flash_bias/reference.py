"""Explicit PyTorch: the truth every other implementation is held against."""

from __future__ import annotations

import torch
from torch import Tensor

SLAB_BYTES = 256 * 2**20
"""Largest table of logits held at once when no gradient is recorded."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, factors: tuple[Tensor, Tensor] | None, mask: Tensor | None
) -> Tensor:
    """Attention in fp32, or fp64 for fp64 inputs; arguments in the triangle layout of the api."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    if factors is not None:
        phi_q, phi_k = (phi.to(dtype) for phi in factors)
        bias = phi_q @ phi_k.mT
    batch, rows, tokens, heads, _ = q.shape
    step = rows
    if not torch.is_grad_enabled():
        step = max(1, SLAB_BYTES // (batch * heads * tokens * tokens * dtype.itemsize))
    slabs = []
    for i in range(0, rows, step):
        of_q, of_k, of_v = (x[:, i : i + step].to(dtype) for x in (q, k, v))
        slabs.append(_attend(of_q, of_k, of_v, bias, None if mask is None else mask[:, i : i + step]))
    return torch.cat(slabs, dim=1).to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    logits = torch.einsum("binhd,bimhd->bihnm", q, k) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.to(q.dtype).unsqueeze(1)
    if mask is None:
        weights = logits.softmax(-1)
    else:
        dropped = ~mask[:, :, None, None, :]
        # A finite floor keeps rows without any key free of NaN; their weights are zeroed afterwards.
        logits = logits.masked_fill(dropped, torch.finfo(q.dtype).min)
        weights = logits.softmax(-1).masked_fill(dropped, 0)
    return torch.einsum("bihnm,bimhd->binhd", weights, v)
