"""Products by PyTorch around the kernels of layer_norm: the backward pass, and the forward pass in fp32.

Triton's products of exact fp32 hold whole operands in registers, which they overflow from C = 128 on. PyTorch's take
so long that another pass over memory does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pairformer_fast.config import Backend
from pairformer_fast.kernels.layer_norm import NormParameters, layer_norm, layer_norm_backward
from pairformer_fast.kernels.weight_gradient import product_fp32

CHUNK = 4096
"""Fewest tokens over which one partial sum of a weight's gradient goes."""

MOST_CHUNKS = 256


def forward_fp32(
    z: Tensor,
    norm: NormParameters,
    weight: Tensor | None,
    planar_weight: Tensor | None,
    tokens: Tensor,
    planar: Tensor,
) -> None:
    """Write ``tokens [B, I, J, O]`` and ``planar [B, P, I, J]``; takes memory for the normalised z and ``planar``."""
    if weight is not None and tokens.transpose(1, 2).is_contiguous():
        z, tokens = z.transpose(1, 2), tokens.transpose(1, 2)
        planar = planar if planar_weight is None else planar.transpose(2, 3)
    batch, rows, columns, channels = z.shape
    with torch.autocast(z.device.type, enabled=False):
        y = layer_norm(z, norm, dtype=torch.float32, backend=Backend.TRITON).view(batch, -1, channels)
        if weight is not None:
            torch.mm(y.view(-1, channels), weight.float().mT, out=tokens.view(-1, weight.shape[0]))
        if planar_weight is not None:
            planar.copy_((planar_weight.float() @ y.mT).view(batch, -1, rows, columns))


def backward(
    dtokens: Tensor | None,
    dplanar: Tensor | None,
    z: Tensor,
    norm: NormParameters,
    weight: Tensor | None,
    planar_weight: Tensor | None,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, the parameters of the norm (empty without a bias) and the weights (likewise).

    Beside the gradient of z it takes one tensor of the shape of z in the dtype ``compute`` at a time, and for each
    weight up to ``MOST_CHUNKS`` partial sums in fp32, twice if the tokens are not a multiple of a chunk. Gradients that
    arrive are copied only if their tokens are not in one line in memory.
    """
    ending = dtokens is not None and dtokens.transpose(1, 2).is_contiguous()
    if ending:
        z = z.transpose(1, 2)
        dtokens = None if dtokens is None else dtokens.transpose(1, 2)
        dplanar = None if dplanar is None else dplanar.transpose(2, 3)
    batch, rows, columns, channels = z.shape
    arriving = None if dtokens is None else dtokens.reshape(-1, dtokens.shape[-1])
    planes = None if dplanar is None else dplanar.reshape(batch, -1, rows * columns).mT
    with torch.autocast(z.device.type, enabled=False):
        y = layer_norm(z, norm, dtype=compute, backend=Backend.TRITON).view(batch, -1, channels)
        dweight = _dweight(z, weight, [] if arriving is None else [arriving], [y.view(-1, channels)])
        dplanar_weight = _dweight(z, planar_weight, [] if planes is None else list(planes), list(y))
        dy = y.zero_() if arriving is None and planes is None else y
        if arriving is not None and weight is not None:
            torch.mm(arriving, weight.to(compute), out=dy.view(-1, channels))
        if planes is not None and planar_weight is not None:
            of_planes = planar_weight.to(compute).expand(batch, -1, -1)
            dy.baddbmm_(planes, of_planes, beta=0 if arriving is None else 1)
        dz, dnorm_weight, dnorm_bias = layer_norm_backward(z, norm, dy.view(z.shape), backend=Backend.TRITON)
    dz = dz.transpose(1, 2) if ending else dz
    dnorm_bias = z.new_empty(0) if norm.bias is None else dnorm_bias.to(norm.bias.dtype)
    return dz, dnorm_weight.to(norm.weight.dtype), dnorm_bias, dweight, dplanar_weight


def _dweight(z: Tensor, weight: Tensor | None, arriving: list[Tensor], inputs: list[Tensor]) -> Tensor:
    """Sum of ``arriving[b].T @ inputs[b]``, ``[T, O]`` and ``[T, C]``, zero if none arrives, empty without a weight."""
    if weight is None:
        return z.new_empty(0)
    if not arriving:
        return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    sums = [part for a, x in zip(arriving, inputs, strict=True) for part in _partial_sums(a, x)]
    return (sums[0] if len(sums) == 1 else torch.cat(sums)).sum(0).to(weight.dtype)


def _partial_sums(a: Tensor, x: Tensor) -> Iterator[Tensor]:
    """``[..., O, C]`` fp32 that sum up to ``a.T @ x``: the few tiles of the product itself would not fill a GPU."""
    length = max(CHUNK, -(-len(x) // MOST_CHUNKS))
    chunks = len(x) // length
    whole = chunks * length
    if chunks:
        yield product_fp32(a[:whole].unflatten(0, (chunks, length)).mT, x[:whole].unflatten(0, (chunks, length)))
    if whole < len(x):
        yield product_fp32(a[None, whole:].mT, x[None, whole:])
