"""Public function of the operation: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from pairformer_fast.config import Backend
from pairformer_fast.kernels.backend import check_device, takes_triton
from pairformer_fast.kernels.layer_norm.api import check_norm
from pairformer_fast.kernels.triangle_multiplication import operator, reference, torch_slabs
from pairformer_fast.kernels.triangle_multiplication.parameters import LAYERS, TriangleWeights

MOST_CHANNELS = 256
"""Widest pair representation and product of the Triton kernels."""


def triangle_multiplication(
    z: Tensor,
    mask: Tensor,
    weights: TriangleWeights,
    dropout: Tensor | None = None,
    *,
    incoming: bool,
    residual: bool = True,
    out: Tensor | None = None,
    slab_rows: int | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """Pair representation after triangle multiplication: ``z`` plus its update by all triangles.

    With ``x = LN_in(z)`` and edges ``a = mask * sigmoid(x a_gate^T) * (x a^T)``, likewise ``b``, the update is
    ``dropout * sigmoid(x gate^T) * (LN_out(product) out^T)``, where ``product_ij`` is the sum over k of
    ``a_ik b_jk`` (outgoing edges) or ``a_ki b_kj`` (incoming); each of the six layers may have an offset.
    Differentiable in ``z`` and all weights. Products run in the dtype of autocast if it is on, else in that of ``z``.

    Parameters
    ----------
    z : Tensor
        ``[B, N, N, C]``, floating point. Triton takes any strides but of the last dimension, which is contiguous.
    mask : Tensor
        Bool ``[B, N, N]``, any strides, True = keep: other edges contribute nothing.
    weights : TriangleWeights
    dropout : Tensor, optional
        Broadcastable to ``z``, its dtype, already scaled; no gradient.
    incoming : bool
        Use the incoming edges (AF3 Algorithm 13) and not the outgoing ones (Algorithm 12).
    residual : bool
        Whether ``z`` is added to its update.
    out : Tensor, optional
        ``z`` itself, updated in place, or a tensor like it that shares no memory with it. Inference only.
    slab_rows : int, optional
        Most rows i of the product that are in memory at a time; plain PyTorch takes no more than fit a cache. Beside
        its result the forward pass holds a and b, each like ``z`` if C_hidden is C, and one slab.
    backend : Backend
        ``auto`` takes Triton on CUDA where it can, else plain PyTorch, as does ``torch``: in slabs where nothing needs
        a gradient. ``reference`` is PyTorch without slabs.

    Returns
    -------
    Tensor
        ``[B, N, N, C]``, dtype of ``z``; ``out`` if it is given.

    Raises
    ------
    TypeError, ValueError
        If shapes, dtypes or devices do not fit together, or the backend does not take them.
    RuntimeError
        If ``out`` is given where something requires a gradient, or ``backend`` is ``triton`` and cannot run here.

    Notes
    -----
    Source: AF3 Algorithms 12 and 13, and, with offsets, AF2 Algorithms 11 and 12. The backward pass of Triton is given
    only the inputs of the forward pass. It takes about 4.5 times the memory of ``z`` in the dtype of the products at
    N = 640 and above, beside the gradients.
    """
    _check(z, mask, weights, dropout, slab_rows)
    if out is not None:
        _check_out(out, z, weights)
    compute = _compute_dtype(z)
    backend = Backend(backend)
    if _takes_triton(backend, z, weights):
        return operator.triangle_multiplication(z, mask, weights, dropout, incoming, residual, out, slab_rows, compute)
    with torch.autocast(z.device.type, enabled=False):
        if backend is not Backend.REFERENCE and not _needs_gradient(z, weights):
            out = torch.empty_like(z) if out is None else out
            torch_slabs.triangle_multiplication(z, mask, weights, dropout, out, incoming, residual, slab_rows, compute)
            return out
        result = reference.triangle_multiplication(z, mask, weights, dropout, incoming, residual, compute)
    return result if out is None else out.copy_(result)


def _compute_dtype(z: Tensor) -> torch.dtype:
    if z.dtype != torch.float64 and torch.is_autocast_enabled(z.device.type):
        return torch.get_autocast_dtype(z.device.type)
    return z.dtype


def _takes_triton(backend: Backend, z: Tensor, weights: TriangleWeights) -> bool:
    hidden = weights.a.shape[0]
    if not takes_triton(backend, z, MOST_CHANNELS):
        return False
    if hidden > MOST_CHANNELS and backend is Backend.TRITON:
        raise ValueError(
            f"backend 'triton' takes C_hidden up to {MOST_CHANNELS}, but weights.a has {hidden}; choose backend "
            "'reference'"
        )
    return hidden <= MOST_CHANNELS


def _check(z: Tensor, mask: Tensor, weights: TriangleWeights, dropout: Tensor | None, slab_rows: int | None) -> None:
    if z.ndim != 4 or z.shape[1] != z.shape[2] or 0 in z.shape:
        raise ValueError(f"z must be [B, N, N, C] with no empty dimension, but got shape {list(z.shape)}")
    if not z.is_floating_point():
        raise TypeError(f"z must be floating point, but got {z.dtype}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be torch.bool, but got {mask.dtype}; convert 0/1 masks by mask > 0.5")
    if mask.shape != z.shape[:3]:
        raise ValueError(f"mask must be [B, N, N] = {list(z.shape[:3])} to fit z, but got {list(mask.shape)}")
    check_device("mask", mask, "z", z)
    check_norm("z", z, weights.norm_in)
    _check_weights(weights, z)
    if dropout is not None:
        _check_dropout(dropout, z)
    if slab_rows is not None and slab_rows < 1:
        raise ValueError(f"slab_rows must be None or at least 1, but got {slab_rows}")


def _check_weights(weights: TriangleWeights, z: Tensor) -> None:
    channels = z.shape[-1]
    if weights.a.ndim != 2 or weights.a.shape[0] == 0:
        raise ValueError(f"weights.a must be [C_hidden, C], but got shape {list(weights.a.shape)}")
    hidden = weights.a.shape[0]
    shapes = dict.fromkeys(LAYERS, (hidden, channels)) | {"gate": (channels, channels), "out": (channels, hidden)}
    for name, shape in shapes.items():
        weight = getattr(weights, name)
        if weight.shape != shape:
            raise ValueError(
                f"weights.{name} must be {list(shape)} to fit z and weights.a, but got {list(weight.shape)}"
            )
        if not weight.is_floating_point():
            raise TypeError(f"weights.{name} must be floating point, but got {weight.dtype}")
        check_device(f"weights.{name}", weight, "z", z)
    if weights.offsets is not None:
        count = 4 * hidden + 2 * channels
        if weights.offsets.shape != (count,):
            raise ValueError(
                f"weights.offsets must be [4 C_hidden + 2 C] = [{count}], but got {list(weights.offsets.shape)}"
            )
        check_device("weights.offsets", weights.offsets, "z", z)
    for part, parameter in (("weight", weights.norm_out.weight), ("bias", weights.norm_out.bias)):
        if parameter is None:
            continue
        if parameter.shape != (hidden,):
            raise ValueError(f"norm_out.{part} must be [C_hidden] = [{hidden}], but got {list(parameter.shape)}")
        check_device(f"norm_out.{part}", parameter, "z", z)


def _check_dropout(dropout: Tensor, z: Tensor) -> None:
    if dropout.dtype != z.dtype:
        raise TypeError(f"dropout must have the dtype of z, {z.dtype}, but got {dropout.dtype}")
    fits = dropout.ndim <= 4 and all(
        size in (1, whole) for size, whole in zip(reversed(dropout.shape), reversed(z.shape), strict=False)
    )
    if not fits:
        raise ValueError(f"dropout must be broadcastable to z, {list(z.shape)}, but got {list(dropout.shape)}")
    if dropout.requires_grad:
        raise ValueError("dropout has no gradient here, but it requires one; detach it")
    check_device("dropout", dropout, "z", z)


def _check_out(out: Tensor, z: Tensor, weights: TriangleWeights) -> None:
    if out.shape != z.shape or out.dtype != z.dtype:
        raise ValueError(f"out must be like z, {list(z.shape)} in {z.dtype}, but got {list(out.shape)} in {out.dtype}")
    if out.stride(-1) != 1:
        raise ValueError(f"out must have contiguous channels, but its strides are {out.stride()}")
    check_device("out", out, "z", z)
    if _needs_gradient(z, weights) or (torch.is_grad_enabled() and out.requires_grad):
        raise RuntimeError("out is for inference: call under torch.no_grad(), or leave out=None")


def _needs_gradient(z: Tensor, weights: TriangleWeights) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in (z, *operator.parameters(weights).values()))
