"""The steps in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_cholesky(gram: Tensor, rounding: float) -> Tensor:
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    raised = gram + identity * (rounding * gram + torch.finfo(gram.dtype).tiny)
    factor, _ = torch.linalg.cholesky_ex(raised)
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)


def centred(thin: Tensor, kept: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (project(thin, kept) * scale).to(dtype)


def project(thin: Tensor, kept: Tensor | None) -> Tensor:
    """Columns less their mean over the tokens that are kept."""
    return thin - (thin.mean(-2, keepdim=True) if kept is None else thin.sum(-2, keepdim=True) / kept)


def balanced(
    basis: Tensor, projected: Tensor, padding: Tensor | None, kept: Tensor | None, unit: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    projected = project(projected, kept)
    if padding is not None:
        basis, projected = (x.masked_fill(padding, 0) for x in (basis, projected))
    length = torch.linalg.vector_norm(projected, dim=-2, keepdim=True)
    floor = least_length(projected.dtype)
    used, root, half = length > floor, length.clamp(min=floor).sqrt(), unit.rsqrt()
    phi_q, phi_k = basis * (root * half * used), projected * (half / root)
    return phi_q.to(dtype), phi_k.to(dtype), used.squeeze(-2)


def least_length(dtype: torch.dtype) -> float:
    """Length of a column that is rounding: entries of the bias are at most 1 / N in the size of its unit."""
    return 4 * torch.finfo(dtype).eps
