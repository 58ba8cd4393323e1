"""Layer norm and its backward pass in plain PyTorch, in fp32, or in fp64 for fp64 inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from pairformer_fast.kernels.layer_norm.parameters import NormParameters


def layer_norm(x: Tensor, norm: NormParameters, dtype: torch.dtype) -> Tensor:
    """Normalised ``x [..., C]``, rounded to ``dtype`` at the end; differentiable."""
    if {x.dtype, norm.weight.dtype, (norm.weight if norm.bias is None else norm.bias).dtype} == {dtype}:
        # PyTorch's own kernel sums in fp32 too.
        return torch.nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps).to(dtype)
    wide = _wide(x.dtype)
    bias = None if norm.bias is None else norm.bias.to(wide)
    return torch.nn.functional.layer_norm(x.to(wide), x.shape[-1:], norm.weight.to(wide), bias, norm.eps).to(dtype)


def layer_norm_backward(
    x: Tensor, norm: NormParameters, dy: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x`` (with ``residual`` added before it is rounded), weight and bias."""
    wide = _wide(x.dtype)
    x_wide, dy = x.to(wide), dy.to(wide)
    centred = x_wide - x_wide.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    unit = centred * inverse
    scaled = dy * norm.weight.to(wide)
    dx = (scaled - scaled.mean(-1, keepdim=True) - unit * (scaled * unit).mean(-1, keepdim=True)) * inverse
    if residual is not None:
        dx = dx + residual.to(wide)
    channels = x.shape[-1]
    return dx.to(x.dtype), (dy * unit).reshape(-1, channels).sum(0), dy.reshape(-1, channels).sum(0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
