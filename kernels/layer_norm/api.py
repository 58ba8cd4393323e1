"""Public functions of the operation: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from pairformer_fast.config import Backend
from pairformer_fast.kernels.backend import check_device, takes_triton
from pairformer_fast.kernels.layer_norm import reference
from pairformer_fast.kernels.layer_norm.parameters import NormParameters

MOST_CHANNELS = 1024
"""Widest rows of the Triton kernels."""


@torch.no_grad()
def layer_norm(
    x: Tensor, norm: NormParameters, *, dtype: torch.dtype | None = None, backend: Backend = Backend.AUTO
) -> Tensor:
    """Layer norm over the last dimension; not differentiable, a part of operations that are.

    Parameters
    ----------
    x : Tensor
        ``[..., C]``, floating point, any strides but the last.
    norm : NormParameters
    dtype : torch.dtype, optional
        Of the result; that of ``x`` if None. Statistics are in fp32 (fp64 for fp64).
    backend : Backend
        ``auto`` takes Triton on CUDA and plain PyTorch elsewhere.

    Returns
    -------
    Tensor
        ``[..., C]``, contiguous.

    Raises
    ------
    TypeError, ValueError
        If shapes, dtypes or devices do not fit together or to the backend.
    RuntimeError
        If ``backend`` is ``triton`` and cannot run here.
    """
    check_norm("x", x, norm)
    dtype = dtype or x.dtype
    if takes_triton(backend, x, MOST_CHANNELS):
        from pairformer_fast.kernels.layer_norm import triton_forward

        return triton_forward.layer_norm(x, norm, dtype)
    return reference.layer_norm(x, norm, dtype).contiguous()


@torch.no_grad()
def layer_norm_backward(
    x: Tensor, norm: NormParameters, dy: Tensor, residual: Tensor | None = None, *, backend: Backend = Backend.AUTO
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass of :func:`layer_norm`; sums are in a fixed order, the same on every run.

    Parameters
    ----------
    x : Tensor
        ``[..., C]``, the input of the forward pass.
    norm : NormParameters
    dy : Tensor
        ``[..., C]``, gradient of the result, floating point.
    residual : Tensor, optional
        ``[..., C]``, floating point, added to the gradient of ``x``: that of the path around the operation.
    backend : Backend

    Returns
    -------
    dx : Tensor
        ``[..., C]``, dtype of ``x``, laid out as ``x`` (``torch.empty_like``).
    dweight, dbias : Tensor
        ``[C]`` fp32 (fp64 for fp64).

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`layer_norm`.
    """
    check_norm("x", x, norm)
    for name, other in (("dy", dy), ("residual", residual)):
        if other is not None and (other.shape != x.shape or other.device != x.device):
            raise ValueError(
                f"{name} must have the shape and device of x, {list(x.shape)} on {x.device}, "
                f"but got {list(other.shape)} on {other.device}"
            )
    if takes_triton(backend, x, MOST_CHANNELS):
        from pairformer_fast.kernels.layer_norm import triton_backward

        return triton_backward.layer_norm_backward(x, norm, dy, residual)
    dx, dweight, dbias = reference.layer_norm_backward(x, norm, dy, residual)
    return torch.empty_like(x).copy_(dx), dweight, dbias


def check_norm(name: str, x: Tensor, norm: NormParameters) -> None:
    """Raise TypeError or ValueError unless ``norm`` fits the channels of ``x``, the argument called ``name``."""
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, but got {x.dtype}")
    if 0 in x.shape or x.ndim == 0:
        raise ValueError(f"{name} must be [..., C] with no empty dimension, but got shape {list(x.shape)}")
    for part, parameter in (("weight", norm.weight), ("bias", norm.bias)):
        if parameter is None:
            continue
        if parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"norm.{part} must be [C] = [{x.shape[-1]}] to fit {name}, but got {list(parameter.shape)}"
            )
        if not parameter.is_floating_point():
            raise TypeError(f"norm.{part} must be floating point, but got {parameter.dtype}")
        check_device(f"norm.{part}", parameter, name, x)
