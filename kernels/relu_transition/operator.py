"""The Triton kernels as operators of PyTorch; Triton is imported when a kernel runs, never before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.transition.operator import like_parameters, register_backward


@torch.library.custom_op("pairformer_fast::relu_transition_forward", mutates_args=())
def relu_transition_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight_1: Tensor,
    offset_1: Tensor,
    weight_2: Tensor,
    offset_2: Tensor,
    mask: Tensor | None,
    eps: float,
    compute: torch.dtype,
) -> Tensor:
    """Update of ``x``, laid out as ``torch.empty_like(x)``."""
    from pairformer_fast.kernels.relu_transition import triton_forward

    norm = NormParameters(norm_weight, norm_bias, eps)
    return triton_forward.relu_transition(x, norm, weight_1, offset_1, weight_2, offset_2, mask, compute)


@relu_transition_forward.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("pairformer_fast::relu_transition_backward", mutates_args=())
def relu_transition_backward(
    dout: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight_1: Tensor,
    offset_1: Tensor,
    weight_2: Tensor,
    offset_2: Tensor,
    mask: Tensor | None,
    eps: float,
    compute: torch.dtype,
) -> list[Tensor]:
    """Gradients of x, norm weight and bias (of zeros without a bias), and both layers, in their dtypes."""
    from pairformer_fast.kernels.relu_transition import triton_backward

    norm = NormParameters(norm_weight, norm_bias, eps)
    gradients = triton_backward.relu_transition(dout, x, norm, weight_1, offset_1, weight_2, mask, compute)
    return like_parameters(gradients, (norm_weight, norm_weight, weight_1, offset_1, weight_2, offset_2))


@relu_transition_backward.register_fake
def _(dout: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, *others: Any) -> list[Tensor]:
    return [torch.empty_like(x), *(p.new_empty(p.shape) for p in (norm_weight, norm_weight, *others[:4]))]


register_backward(relu_transition_forward, relu_transition_backward)
