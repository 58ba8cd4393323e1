"""The Triton kernels as operators of PyTorch; Triton is imported when a kernel runs, never before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

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
    residual: bool,
    compute: torch.dtype,
) -> Tensor:
    """Update of ``x``, added to it with ``residual``, laid out as ``torch.empty_like(x)``."""
    from pairformer_fast.kernels.transition import triton_forward

    out = torch.empty_like(x)
    norm = NormParameters(norm_weight, norm_bias, eps)
    triton_forward.transition(x, norm, a_weight, b_weight, out_weight, mask, out, residual, compute)
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
    residual: bool,
    compute: torch.dtype,
) -> None:
    """The same in ``out``, which may be ``x``."""
    from pairformer_fast.kernels.transition import triton_forward

    norm = NormParameters(norm_weight, norm_bias, eps)
    triton_forward.transition(x, norm, a_weight, b_weight, out_weight, mask, out, residual, compute)


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
    residual: bool,
    compute: torch.dtype,
) -> list[Tensor]:
    """Gradients of x, norm weight and bias (of zeros without a bias), a, b and out weights, in their dtypes."""
    from pairformer_fast.kernels.transition import triton_backward

    norm = NormParameters(norm_weight, norm_bias, eps)
    gradients = triton_backward.transition(dout, x, norm, a_weight, b_weight, out_weight, mask, residual, compute)
    return like_parameters(gradients, (norm_weight, norm_weight, a_weight, b_weight, out_weight))


@transition_backward.register_fake
def _(dout: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, *others: Any) -> list[Tensor]:
    return [torch.empty_like(x), *(p.new_empty(p.shape) for p in (norm_weight, norm_weight, *others[:3]))]


def like_parameters(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The first gradient as it is, the others in the dtypes of the parameters."""
    pairs = zip(gradients[1:], parameters, strict=True)
    return [gradients[0], *(gradient.to(parameter.dtype).contiguous() for gradient, parameter in pairs)]


def register_backward(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Give an operator of x, norm weight and bias, parameters and mask, then of settings, its gradients."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors = [x for x in inputs if x is None or isinstance(x, Tensor)]
        ctx.settings = inputs[len(tensors) :]
        ctx.save_for_backward(*tensors)

    def gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        norm_bias = tensors[2]
        dx, dweight, dbias, *dparameters = backward(dout, *tensors, *ctx.settings)
        dbias = None if norm_bias is None else dbias.to(norm_bias.dtype)
        return dx, dweight, dbias, *dparameters, *[None] * (1 + len(ctx.settings))

    forward.register_autograd(gradients, setup_context=setup_context)


register_backward(transition_forward, transition_backward)
