"""Steps of randomised factors on thin matrices ``[B, N, L]``, a column of which is a vector over the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from pairformer_fast.kernels.backend import HAS_TRITON
from pairformer_fast.kernels.low_rank import reference

LARGEST = 64
"""Columns that a Triton program holds on chip."""


def inverse_cholesky(gram: Tensor, rounding: float) -> Tensor:
    """Inverse of the lower Cholesky factor of Gram matrices whose diagonal is raised.

    Parameters
    ----------
    gram : Tensor
        ``[B, L, L]`` fp64, positive semidefinite but for rounding.
    rounding : float
        Part of itself by which the diagonal is raised; and by the smallest normal number, so that zero columns pass.

    Returns
    -------
    Tensor
        ``[B, L, L]`` fp64, lower triangular.
    """
    if _takes_triton(gram, torch.float64):
        from pairformer_fast.kernels.low_rank import triton_steps

        return triton_steps.inverse_cholesky(gram, rounding)
    return reference.inverse_cholesky(gram, rounding)


def centred(thin: Tensor, kept: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns less their mean, times ``scale``.

    Parameters
    ----------
    thin : Tensor
        ``[B, N, L]``, contiguous; zero in padding, where the result holds anything.
    kept : Tensor, optional
        ``[B, 1, 1]``, tokens that are not padding; all if omitted.
    scale : Tensor
        ``[B, 1, 1]``.
    dtype : torch.dtype
        Of the result.
    """
    if _takes_triton(thin, torch.float32) and kept is None:
        from pairformer_fast.kernels.low_rank import triton_steps

        return triton_steps.centred(thin, scale, dtype)
    return reference.centred(thin, kept, scale, dtype)


def balanced(
    basis: Tensor, projected: Tensor, padding: Tensor | None, kept: Tensor | None, unit: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors ``basis`` and centred ``projected`` with columns of equal lengths.

    Parameters
    ----------
    basis : Tensor
        ``[B, N, L]``, orthonormal columns.
    projected : Tensor
        ``[B, N, L]`` in the size of ``unit``, see :func:`centred`.
    padding, kept : Tensor, optional
        ``[B, N, 1]``, True for padding, whose factors are zero; and how many tokens are none, ``[B, 1, 1]``.
    unit : Tensor
        ``[B, 1, 1]``, what the bias was multiplied by.
    dtype : torch.dtype
        Of the factors.

    Returns
    -------
    phi_q, phi_k : Tensor
        ``[B, N, L]``; columns of ``phi_q`` that multiply nothing but rounding are zero.
    used : Tensor
        ``[B, L]`` bool, the others.
    """
    if _takes_triton(projected, torch.float32) and padding is None:
        from pairformer_fast.kernels.low_rank import triton_steps

        return triton_steps.balanced(basis, projected, unit, dtype)
    return reference.balanced(basis, projected, padding, kept, unit, dtype)


def _takes_triton(x: Tensor, dtype: torch.dtype) -> bool:
    return HAS_TRITON and x.is_cuda and x.dtype == dtype and x.shape[-1] <= LARGEST
