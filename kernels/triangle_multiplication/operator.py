"""The Triton kernels as operators of PyTorch: gradients, ``torch.compile``, activation checkpointing.

Triton is imported when a kernel runs, never before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.triangle_multiplication.parameters import TriangleWeights

DIFFERENTIABLE = (
    "z",
    "norm_in_weight",
    "norm_in_bias",
    "norm_out_weight",
    "norm_out_bias",
    "a",
    "a_gate",
    "b",
    "b_gate",
    "gate",
    "out",
    "offsets",
)
"""Inputs that have gradients, in the order in which the backward operator returns those that are given."""


def parameters(weights: TriangleWeights) -> dict[str, Tensor]:
    """Those that are given, by the names in ``DIFFERENTIABLE``."""
    named = {name: getattr(weights, name) for name in DIFFERENTIABLE[5:]}
    for norm in ("norm_in", "norm_out"):
        values = getattr(weights, norm)
        named |= {f"{norm}_weight": values.weight, f"{norm}_bias": values.bias}
    return {name: x for name, x in named.items() if x is not None}


def triangle_multiplication(
    z: Tensor,
    mask: Tensor,
    weights: TriangleWeights,
    dropout: Tensor | None,
    incoming: bool,
    residual: bool,
    out: Tensor | None,
    slab_rows: int | None,
    compute: torch.dtype,
) -> Tensor:
    """``z`` and its update, or that alone, in ``out`` if it is given."""
    named = parameters(weights)
    tensors = [named.get(name) for name in DIFFERENTIABLE[1:]]
    eps = weights.norm_in.eps, weights.norm_out.eps
    if out is None:
        return triangle_multiplication_forward(z, *tensors, mask, dropout, *eps, incoming, residual, slab_rows, compute)
    triangle_multiplication_into(out, z, *tensors, mask, dropout, *eps, incoming, residual, slab_rows, compute)
    return out


def _weights(
    norm_in_weight: Tensor,
    norm_in_bias: Tensor | None,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor | None,
    *layers: Any,
    eps: tuple[float, float],
) -> TriangleWeights:
    norm_in = NormParameters(norm_in_weight, norm_in_bias, eps[0])
    return TriangleWeights(norm_in, NormParameters(norm_out_weight, norm_out_bias, eps[1]), *layers)


@torch.library.custom_op("pairformer_fast::triangle_multiplication_forward", mutates_args=())
def triangle_multiplication_forward(
    z: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor | None,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor | None,
    a: Tensor,
    a_gate: Tensor,
    b: Tensor,
    b_gate: Tensor,
    gate: Tensor,
    out: Tensor,
    offsets: Tensor | None,
    mask: Tensor,
    dropout: Tensor | None,
    eps_in: float,
    eps_out: float,
    incoming: bool,
    residual: bool,
    slab_rows: int | None,
    compute: torch.dtype,
) -> Tensor:
    """New tensor laid out as ``z`` (``torch.empty_like``)."""
    from pairformer_fast.kernels.triangle_multiplication import triton_forward

    norms = norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias
    weights = _weights(*norms, a, a_gate, b, b_gate, gate, out, offsets, eps=(eps_in, eps_out))
    result = torch.empty_like(z)
    triton_forward.forward(z, mask, weights, dropout, result, incoming, residual, slab_rows, compute)
    return result


@triangle_multiplication_forward.register_fake
def _(z: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(z)


@torch.library.custom_op("pairformer_fast::triangle_multiplication_into", mutates_args=("result",))
def triangle_multiplication_into(
    result: Tensor,
    z: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor | None,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor | None,
    a: Tensor,
    a_gate: Tensor,
    b: Tensor,
    b_gate: Tensor,
    gate: Tensor,
    out: Tensor,
    offsets: Tensor | None,
    mask: Tensor,
    dropout: Tensor | None,
    eps_in: float,
    eps_out: float,
    incoming: bool,
    residual: bool,
    slab_rows: int | None,
    compute: torch.dtype,
) -> None:
    """The same in ``result``, which may be ``z``."""
    from pairformer_fast.kernels.triangle_multiplication import triton_forward

    norms = norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias
    weights = _weights(*norms, a, a_gate, b, b_gate, gate, out, offsets, eps=(eps_in, eps_out))
    triton_forward.forward(z, mask, weights, dropout, result, incoming, residual, slab_rows, compute)


@torch.library.custom_op("pairformer_fast::triangle_multiplication_backward", mutates_args=())
def triangle_multiplication_backward(
    dy: Tensor,
    z: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor | None,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor | None,
    a: Tensor,
    a_gate: Tensor,
    b: Tensor,
    b_gate: Tensor,
    gate: Tensor,
    out: Tensor,
    offsets: Tensor | None,
    mask: Tensor,
    dropout: Tensor | None,
    eps_in: float,
    eps_out: float,
    incoming: bool,
    residual: bool,
    compute: torch.dtype,
) -> list[Tensor]:
    """Gradients of those of ``DIFFERENTIABLE`` that are given, in their dtypes."""
    from pairformer_fast.kernels.triangle_multiplication import triton_backward

    norms = norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias
    weights = _weights(*norms, a, a_gate, b, b_gate, gate, out, offsets, eps=(eps_in, eps_out))
    given = {"z": z} | parameters(weights)
    gradients = triton_backward.backward(dy, z, mask, weights, dropout, incoming, residual, compute)
    return [gradients[name].to(given[name].dtype) for name in DIFFERENTIABLE if name in given]


@triangle_multiplication_backward.register_fake
def _(dy: Tensor, z: Tensor, *others: Any) -> list[Tensor]:
    given = [x for x in others[: len(DIFFERENTIABLE) - 1] if x is not None]
    return [torch.empty_like(z), *(x.new_empty(x.shape) for x in given)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, eps_in, eps_out, incoming, residual, _, compute = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = eps_in, eps_out, incoming, residual, compute


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    gradients = iter(triangle_multiplication_backward(dy, *tensors, *ctx.settings))
    given = [None if x is None else next(gradients) for x in tensors[: len(DIFFERENTIABLE)]]
    return *given, *[None] * 8


triangle_multiplication_forward.register_autograd(_backward, setup_context=_setup_context)
