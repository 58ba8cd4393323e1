"""Features of single tokens that factor networks read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm as differentiable_layer_norm

from pairformer_fast.config import Backend
from pairformer_fast.kernels.backend import compute_dtype
from pairformer_fast.kernels.layer_norm import NormParameters, layer_norm
from pairformer_fast.model.slabs import rows_at_a_time


def token_means(z: Tensor, norm: NormParameters, keep: Tensor, backend: Backend) -> Tensor:
    """Means of each row and of each column of LN(z) over the tokens that are kept.

    Without gradients the normalised pair representation is never held as a whole where it is large.

    Parameters
    ----------
    z : Tensor
        ``[B, N, N, C_z]``.
    norm : NormParameters
        Of the attention that the factors are for.
    keep : Tensor
        Bool ``[B, N]``, True for tokens that are not padding.
    backend : Backend
        Of the layer norm where no gradient is wanted.

    Returns
    -------
    Tensor
        ``[B, N, 2 C_z]``: entry i has the means of ``z[b, i, :]`` and of ``z[b, :, i]``. fp32 (fp64 for fp64).
    """
    dtype = compute_dtype(z)
    wide = torch.promote_types(dtype, torch.float32)
    kept = keep.to(dtype)
    slab = rows_at_a_time(z, z.shape[-1]) or z.shape[1]
    rows, columns = [], []
    for start in range(0, z.shape[1], slab):
        part = slice(start, start + slab)
        y = _normalised(z[:, part], norm, dtype, backend)
        rows.append(torch.einsum("bj,bijc->bic", kept, y).to(wide))
        columns.append(torch.einsum("bi,bijc->bjc", kept[:, part], y).to(wide))
    sums = torch.cat([torch.cat(rows, dim=1), torch.stack(columns).sum(0)], dim=-1)
    return sums / keep.sum(1).clamp(min=1)[:, None, None]


def single_tokens(s: Tensor, norm: NormParameters) -> Tensor:
    """LN(s) of the single representation ``[B, N, C_s]``, which the attention that updates it has beside the means."""
    wide = torch.promote_types(s.dtype, torch.float32)
    return _differentiable(s, norm).to(wide)


def _normalised(z: Tensor, norm: NormParameters, dtype: torch.dtype, backend: Backend) -> Tensor:
    if torch.is_grad_enabled():
        return _differentiable(z, norm).to(dtype)
    return layer_norm(z, norm, dtype=dtype, backend=backend)


def _differentiable(x: Tensor, norm: NormParameters) -> Tensor:
    weight, bias = (None if p is None else p.to(x.dtype) for p in (norm.weight, norm.bias))
    return differentiable_layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
