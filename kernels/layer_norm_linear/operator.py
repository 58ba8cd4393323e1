"""The Triton kernel as an operator of PyTorch: gradients, ``torch.compile``, activation checkpointing.

Triton is imported when a kernel runs, never before. Results that are not asked for are empty tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm_linear import products

_DIFFERENTIABLE = 5


@torch.library.custom_op("pairformer_fast::layer_norm_linear", mutates_args=())
def forward(
    z: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor | None,
    planar_weight: Tensor | None,
    eps: float,
    transposed: bool,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``tokens [B, I, J, O]`` and ``planar [B, P, I, J]`` in the dtype ``compute``."""
    tokens, planar = empty_results(z, weight, planar_weight, transposed, compute)
    norm = NormParameters(norm_weight, norm_bias, eps)
    if compute == torch.float32:
        products.forward_fp32(z, norm, weight, planar_weight, tokens, planar)
    else:
        from pairformer_fast.kernels.layer_norm_linear import triton_forward

        triton_forward.forward(z, norm, weight, planar_weight, tokens, planar)
    return tokens, planar


@forward.register_fake
def _(
    z: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor | None,
    planar_weight: Tensor | None,
    eps: float,
    transposed: bool,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return empty_results(z, weight, planar_weight, transposed, compute)


def empty_results(
    z: Tensor, weight: Tensor | None, planar_weight: Tensor | None, transposed: bool, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Memory for ``tokens`` and ``planar``."""
    batch, rows, columns, _ = z.shape
    if weight is None:
        tokens = z.new_empty(0, dtype=compute)
    elif transposed:
        tokens = z.new_empty(batch, columns, rows, weight.shape[0], dtype=compute).transpose(1, 2)
    else:
        tokens = z.new_empty(batch, rows, columns, weight.shape[0], dtype=compute)
    if planar_weight is None:
        return tokens, z.new_empty(0, dtype=compute)
    return tokens, z.new_empty(batch, planar_weight.shape[0], rows, columns, dtype=compute)


@torch.library.custom_op("pairformer_fast::layer_norm_linear_backward", mutates_args=())
def backward(
    dtokens: Tensor | None,
    dplanar: Tensor | None,
    z: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor | None,
    planar_weight: Tensor | None,
    eps: float,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, both parameters of the norm and both weights; None for a gradient that arrives is zero."""
    norm = NormParameters(norm_weight, norm_bias, eps)
    return products.backward(dtokens, dplanar, z, norm, weight, planar_weight, compute)


@backward.register_fake
def _(
    dtokens: Tensor | None,
    dplanar: Tensor | None,
    z: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor | None,
    planar_weight: Tensor | None,
    eps: float,
    compute: torch.dtype,
) -> tuple[Tensor, ...]:
    parameters = (norm_weight, norm_bias, weight, planar_weight)
    return torch.empty_like(z), *(z.new_empty(0) if p is None else p.new_empty(p.shape) for p in parameters)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_DIFFERENTIABLE])
    ctx.eps, _, ctx.compute = inputs[_DIFFERENTIABLE:]


def _backward(ctx: Any, dtokens: Tensor | None, dplanar: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no more
    *_, weight, planar_weight = saved
    dtokens = None if weight is None else dtokens
    dplanar = None if planar_weight is None else dplanar
    found = backward(dtokens, dplanar, *saved, ctx.eps, ctx.compute)
    needed = ctx.needs_input_grad[:_DIFFERENTIABLE]
    return *(x if need else None for x, need in zip(found, needed, strict=True)), None, None, None


forward.register_autograd(_backward, setup_context=_setup_context)
