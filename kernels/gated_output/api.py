"""Public function of the operation: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from pairformer_fast.config import Backend
from pairformer_fast.kernels.backend import check_device, takes_triton
from pairformer_fast.kernels.gated_output import reference
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm.api import check_norm

MOST_CHANNELS = {2: 512, 4: 256}
"""Widest ``z`` of the Triton kernels, by the bytes of an entry in the products."""


def gated_output(
    z: Tensor,
    attended: Tensor,
    norm: NormParameters,
    gate_weight: Tensor,
    out_weight: Tensor,
    dropout: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """Gate what attention made, project it, and add it to the representation that attended.

    ``z + dropout * ((sigmoid(LN(z) @ gate_weight.T) * attended) @ out_weight.T)``. Differentiable in everything but
    ``dropout``. Products are in the dtype of autocast where it is on, else in that of ``z``; sums, the layer norm and
    the sigmoid in fp32.

    Parameters
    ----------
    z : Tensor
        ``[B, I, J, C]``, floating point, contiguous in C, other strides free: a transposed view for the ending node.
    attended : Tensor
        ``[B, I, J, H * D]``, floating point, contiguous in the last dimension, other strides free.
    norm : NormParameters
        Layer norm of ``z``.
    gate_weight, out_weight : Tensor
        ``[H * D, C]`` and ``[C, H * D]``, floating point.
    dropout : Tensor, optional
        Broadcastable to ``z``, of its dtype, already scaled by 1 / (1 - p).
    out : Tensor, optional
        Like ``z``; takes the result. ``z`` itself is updated in place; other overlaps are not allowed.
    backend : Backend
        ``auto`` takes ``triton`` on CUDA (bf16, fp16, fp32; C up to 512, or 256 with products in fp32), else
        ``reference``; ``torch`` is the same as ``reference``.

    Returns
    -------
    Tensor
        ``[B, I, J, C]``, dtype and layout of ``z``; ``out`` if given.

    Raises
    ------
    TypeError, ValueError
        If dtypes, devices or shapes do not fit together or to the backend.
    RuntimeError
        If ``out`` is given while a gradient is wanted, or ``backend`` is ``triton`` and cannot run here.

    Notes
    -----
    Source: AF3 Algorithms 14 and 15 (lines 5 to 7), and 24 with the gate of its Pairformer form.

    The backward pass computes the forward pass again and works through the tokens in chunks; beside the gradients it
    takes ``2 (C + H D)`` entries of the dtype of the products for each of up to 131,072 tokens: 134 MB at
    C = H D = 128 in bf16.
    """
    _check(z, attended, norm, gate_weight, out_weight, dropout)
    if out is not None:
        _check_out(out, z, [z, attended, norm.weight, norm.bias, gate_weight, out_weight])
    compute = _compute_dtype(z)
    if takes_triton(backend, z, MOST_CHANNELS.get(compute.itemsize, 0)):
        from pairformer_fast.kernels.gated_output import operator

        dropout = None if dropout is None else dropout.expand(z.shape)
        inputs = (z, attended, norm.weight, norm.bias, gate_weight, out_weight, dropout, norm.eps, compute)
        if out is None:
            return operator.gated_output(*inputs)
        operator.gated_output_into(*inputs, out)
        return out
    with torch.autocast(z.device.type, enabled=False):
        result = reference.gated_output(z, attended, norm, gate_weight, out_weight, dropout, compute)
    return result if out is None else out.copy_(result)


def _compute_dtype(z: Tensor) -> torch.dtype:
    if z.dtype != torch.float64 and torch.is_autocast_enabled(z.device.type):
        return torch.get_autocast_dtype(z.device.type)
    return z.dtype


def _check(
    z: Tensor, attended: Tensor, norm: NormParameters, gate_weight: Tensor, out_weight: Tensor, dropout: Tensor | None
) -> None:
    if z.ndim != 4:
        raise ValueError(f"z must be [B, I, J, C], but got shape {list(z.shape)}")
    check_norm("z", z, norm)
    channels, width = z.shape[-1], attended.shape[-1]
    for name, x, layout, shape in (
        ("attended", attended, "B, I, J, H * D", [*z.shape[:3], width]),
        ("gate_weight", gate_weight, "H * D, C", [width, channels]),
        ("out_weight", out_weight, "C, H * D", [channels, width]),
    ):
        if list(x.shape) != shape or width == 0:
            raise ValueError(f"{name} must be [{layout}] = {shape} to fit z and attended, but got {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, but got {x.dtype}")
        check_device(name, x, "z", z)
    if dropout is None:
        return
    if dropout.ndim > 4 or any(a not in (1, b) for a, b in zip(dropout.shape[::-1], z.shape[::-1], strict=False)):
        raise ValueError(f"dropout must be broadcastable to z, {list(z.shape)}, but got {list(dropout.shape)}")
    if dropout.dtype != z.dtype:
        raise TypeError(f"dropout must have the dtype of z, {z.dtype}, but got {dropout.dtype}")
    if dropout.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("dropout gets no gradient: detach it")
    check_device("dropout", dropout, "z", z)


def _check_out(out: Tensor, z: Tensor, inputs: list[Tensor | None]) -> None:
    if out.shape != z.shape or out.dtype != z.dtype:
        raise ValueError(
            f"out must be like z, {z.dtype} {list(z.shape)}, but got {out.dtype} {list(out.shape)}; pass out=z to "
            "update z in place"
        )
    check_device("out", out, "z", z)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in [*inputs, out]):
        raise RuntimeError(
            "out cannot be given while a gradient is wanted: leave it out, or call under torch.no_grad()"
        )
