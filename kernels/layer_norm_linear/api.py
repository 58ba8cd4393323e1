"""Public function of the operation: checks and dispatch."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from pairformer_fast.config import Backend
from pairformer_fast.kernels.backend import check_device, compute_dtype, takes_triton
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm.api import check_norm

MOST_CHANNELS = 256
"""Most channels of ``z`` that the Triton kernel holds on chip."""

MOST_PLANES = 64
"""Most rows of ``planar_weight``, which the Triton kernel takes at once."""


@overload
def layer_norm_linear(
    z: Tensor,
    norm: NormParameters,
    weight: Tensor,
    planar_weight: None = None,
    *,
    transposed: bool = False,
    backend: Backend = Backend.AUTO,
) -> tuple[Tensor, None]: ...


@overload
def layer_norm_linear(
    z: Tensor,
    norm: NormParameters,
    weight: None,
    planar_weight: Tensor,
    *,
    transposed: bool = False,
    backend: Backend = Backend.AUTO,
) -> tuple[None, Tensor]: ...


@overload
def layer_norm_linear(
    z: Tensor,
    norm: NormParameters,
    weight: Tensor | None = None,
    planar_weight: Tensor | None = None,
    *,
    transposed: bool = False,
    backend: Backend = Backend.AUTO,
) -> tuple[Tensor | None, Tensor | None]: ...


def layer_norm_linear(
    z: Tensor,
    norm: NormParameters,
    weight: Tensor | None = None,
    planar_weight: Tensor | None = None,
    *,
    transposed: bool = False,
    backend: Backend = Backend.AUTO,
) -> tuple[Tensor | None, Tensor | None]:
    """Layer norm of the pair representation and linear layers that read it, in one pass.

    Differentiable in ``z``, both parameters of ``norm`` and both weights. Products are in autocast's dtype where it is
    on, else in that of ``z``; statistics and sums in fp32.

    Parameters
    ----------
    z : Tensor
        ``[B, I, J, C]``, floating point, any strides but the last.
    norm : NormParameters
    weight : Tensor, optional
        ``[O, C]``, as torch.nn.Linear has it. Queries, keys and values of all heads are one weight.
    planar_weight : Tensor, optional
        ``[P, C]``, P up to 64: for results that are read as planes, such as the pair bias of P heads.
    transposed : bool
        Lay ``tokens`` out as ``[B, J, I, O]``, as the ending node's attention reads them.
    backend : Backend
        ``auto`` takes Triton on CUDA and plain PyTorch elsewhere.

    Returns
    -------
    tokens : Tensor or None
        ``LN(z) @ weight.T``, ``[B, I, J, O]`` whatever ``transposed`` is; None without ``weight``.
    planar : Tensor or None
        ``LN(z) @ planar_weight.T`` as contiguous ``[B, P, I, J]``; None without ``planar_weight``.

    Raises
    ------
    TypeError, ValueError
        If shapes, dtypes or devices do not fit together or to the backend.
    RuntimeError
        If ``backend`` is ``triton`` and cannot run here.

    Notes
    -----
    Source: lines 1 to 3 of AF3 Algorithms 14, 15 and 24.
    """
    if z.ndim != 4:
        raise ValueError(f"z must be [B, I, J, C], but got shape {list(z.shape)}")
    check_norm("z", z, norm)
    if weight is None and planar_weight is None:
        raise ValueError("give weight, planar_weight or both: there is nothing to compute without")
    for name, matrix in (("weight", weight), ("planar_weight", planar_weight)):
        if matrix is not None:
            _check_matrix(name, matrix, z)
    if planar_weight is not None and planar_weight.shape[0] > MOST_PLANES:
        raise ValueError(
            f"planar_weight may have up to {MOST_PLANES} rows, but has {planar_weight.shape[0]}; call with parts of it"
        )
    compute = compute_dtype(z)
    if not takes_triton(backend, z, MOST_CHANNELS):
        from pairformer_fast.kernels.layer_norm_linear import reference

        with torch.autocast(z.device.type, enabled=False):
            return reference.layer_norm_linear(z, norm, weight, planar_weight, transposed, compute)
    from pairformer_fast.kernels.layer_norm_linear import operator

    tokens, planar = operator.forward(z, norm.weight, norm.bias, weight, planar_weight, norm.eps, transposed, compute)
    return None if weight is None else tokens, None if planar_weight is None else planar


def _check_matrix(name: str, matrix: Tensor, z: Tensor) -> None:
    if not matrix.is_floating_point():
        raise TypeError(f"{name} must be floating point, but got {matrix.dtype}")
    if matrix.ndim != 2 or matrix.shape[1] != z.shape[-1] or not matrix.shape[0]:
        raise ValueError(
            f"{name} must be [rows, C] = [at least 1, {z.shape[-1]}] to fit z, but got {list(matrix.shape)}"
        )
    check_device(name, matrix, "z", z)
