"""The Triton kernels as operators of PyTorch: gradients, ``torch.compile``, activation checkpointing.

Triton is imported when a kernel runs, never before. Only the inputs are kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pairformer_fast.kernels.layer_norm import NormParameters


@torch.library.custom_op("pairformer_fast::gated_output", mutates_args=())
def gated_output(
    z: Tensor,
    attended: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    gate_weight: Tensor,
    out_weight: Tensor,
    dropout: Tensor | None,
    eps: float,
    compute: torch.dtype,
) -> Tensor:
    """Updated ``z``, in its layout; arguments as of the api, ``dropout`` expanded to ``z``."""
    from pairformer_fast.kernels.gated_output import triton_forward

    norm = NormParameters(norm_weight, norm_bias, eps)
    out = torch.empty_like(z)
    triton_forward.forward(z, attended, norm, gate_weight, out_weight, dropout, out, compute)
    return out


@gated_output.register_fake
def _(z: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(z)


@torch.library.custom_op("pairformer_fast::gated_output_into", mutates_args=("out",))
def gated_output_into(
    z: Tensor,
    attended: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    gate_weight: Tensor,
    out_weight: Tensor,
    dropout: Tensor | None,
    eps: float,
    compute: torch.dtype,
    out: Tensor,
) -> None:
    """The same into ``out``, which may be ``z``."""
    from pairformer_fast.kernels.gated_output import triton_forward

    norm = NormParameters(norm_weight, norm_bias, eps)
    triton_forward.forward(z, attended, norm, gate_weight, out_weight, dropout, out, compute)


@gated_output_into.register_fake
def _(*inputs: Any) -> None:
    return None


@torch.library.custom_op("pairformer_fast::gated_output_backward", mutates_args=())
def gated_output_backward(
    dout: Tensor,
    z: Tensor,
    attended: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    gate_weight: Tensor,
    out_weight: Tensor,
    dropout: Tensor | None,
    eps: float,
    compute: torch.dtype,
) -> list[Tensor]:
    """Gradients of ``z``, ``attended``, weight and offset of the norm (if it has one), gate and output weights."""
    from pairformer_fast.kernels.gated_output import triton_backward

    norm = NormParameters(norm_weight, norm_bias, eps)
    return triton_backward.backward(dout, z, attended, norm, gate_weight, out_weight, dropout, compute)


@gated_output_backward.register_fake
def _(dout: Tensor, *inputs: Any) -> list[Tensor]:
    z, attended, *parameters = inputs[:6]
    made = [x.new_empty(x.shape) for x in parameters if x is not None]
    return [torch.empty_like(z), torch.empty_like(attended), *made]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.compute = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    made = gated_output_backward(dout, *tensors, ctx.eps, ctx.compute)
    if tensors[3] is None:
        made.insert(3, None)
    return *made, None, None, None


gated_output.register_autograd(_backward, setup_context=_setup_context)
