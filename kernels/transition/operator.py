"""The Triton kernels as operators of PyTorch; Triton is imported when a kernel runs, never before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pairformer_fast.kernels.layer_norm import NormParameters


@torch.library.custom_op("pairformer_fast::transition_forward", mutates_args=())
def transition_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    a_weight: Tensor,
    b_weight: Tensor,
    out_weight: Tensor,
    mask: Tensor | None,
    eps: float,
    compute: torch.dtype,
) -> Tensor:
    """``x`` with its update, laid out as ``torch.empty_like(x)``."""
    from pairformer_fast.kernels.transition import triton_forward

    out = torch.empty_like(x)
    norm = NormParameters(norm_weight, norm_bias, eps)
    triton_forward.transition(x, norm, a_weight, b_weight, out_weight, mask, out, compute)
    return out


@transition_forward.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("pairformer_fast::transition_into", mutates_args=("out",))
def transition_into(
    out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    a_weight: Tensor,
    b_weight: Tensor,
    out_weight: Tensor,
    mask: Tensor | None,
    eps: float,
    compute: torch.dtype,
) -> None:
    """Write ``x`` with its update to ``out``, which may be ``x``."""
    from pairformer_fast.kernels.transition import triton_forward

    norm = NormParameters(norm_weight, norm_bias, eps)
    triton_forward.transition(x, norm, a_weight, b_weight, out_weight, mask, out, compute)


@transition_into.register_fake
def _(out: Tensor, *others: Any) -> None:
    return None


@torch.library.custom_op("pairformer_fast::transition_backward", mutates_args=())
def transition_backward(
    dout: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    a_weight: Tensor,
    b_weight: Tensor,
    out_weight: Tensor,
    mask: Tensor | None,
    eps: float,
    compute: torch.dtype,
) -> list[Tensor]:
    """Gradients of x, norm weight and bias (of zeros without a bias), a, b and out weights, in their dtypes."""
    from pairformer_fast.kernels.transition import triton_backward

    norm = NormParameters(norm_weight, norm_bias, eps)
    gradients = triton_backward.transition(dout, x, norm, a_weight, b_weight, out_weight, mask, compute)
    parameters = (norm_weight, norm_weight, a_weight, b_weight, out_weight)
    return [
        gradients[0],
        *(gradient.to(like.dtype).contiguous() for gradient, like in zip(gradients[1:], parameters, strict=True)),
    ]


@transition_backward.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    a_weight: Tensor,
    b_weight: Tensor,
    out_weight: Tensor,
    *others: Any,
) -> list[Tensor]:
    parameters = (norm_weight, norm_weight, a_weight, b_weight, out_weight)
    return [torch.empty_like(x), *(parameter.new_empty(parameter.shape) for parameter in parameters)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.compute = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, norm_weight, norm_bias, *others = ctx.saved_tensors
    inputs = (x, norm_weight, norm_bias, *others)
    dx, dweight, dbias, *dweights = transition_backward(dout, *inputs, ctx.eps, ctx.compute)
    dbias = None if norm_bias is None else dbias.to(norm_bias.dtype)
    return dx, dweight, dbias, *dweights, None, None, None


transition_forward.register_autograd(_backward, setup_context=_setup_context)
