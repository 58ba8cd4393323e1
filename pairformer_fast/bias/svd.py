"""Truncated singular value decomposition of a pair bias, head by head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pairformer_fast.bias.certificate import kept_pairs, kept_tokens


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Leading singular triplets of the row-centred bias, from which lower ranks are cut.

    Attributes
    ----------
    values : Tensor
        ``[B, H, K]`` fp64, singular values, largest first; K is N for the exact decomposition.
    left, right : Tensor
        ``[B, H, N, K]``, singular vectors in columns, each times the root of its singular value; zero for padding.
        Dtype of the bias.
    rank : Tensor
        ``[B, H]`` int64, numerical rank, at most K.
    """

    values: Tensor
    left: Tensor
    right: Tensor
    rank: Tensor

    def truncate(self, rank: int | Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the given rank.

        Parameters
        ----------
        rank : int or Tensor
            For every head, or ``[B, H]`` int64 for each. Ranks above the numerical rank are lowered to it.

        Returns
        -------
        phi_q, phi_k : Tensor
            ``[B, H, N, R]`` with R the largest rank (at least 1); further columns of other heads are zero.
        """
        used = self.rank.clamp(max=rank)
        width = max(1, int(used.max()))
        unused = torch.arange(width, device=used.device) >= used[..., None, None]
        return self.left[..., :width].masked_fill(unused, 0), self.right[..., :width].masked_fill(unused, 0)


def decompose(bias: Tensor, mask: Tensor | None) -> Spectrum:
    """Exact decomposition of each head's bias after subtracting every row's mean.

    A constant per row does not change softmax; taking it out first spends no rank on it. Padding is excluded, as query
    and as key: its bias never reaches the factors.

    Up to fp32 the right singular vectors are the eigenvectors of the Gram matrix in fp64, whose squared condition fp64
    can bear, and the left ones the projections on them: as accurate as ``torch.linalg.svd`` in fp32, and no
    slower. An fp64 bias goes to ``torch.linalg.svd``.
    Singular values within rounding of zero do not count towards the rank.

    Parameters
    ----------
    bias : Tensor
        ``[B, H, N, N]``, finite where both tokens are kept.
    mask : Tensor, optional
        Bool ``[B, I, N]`` or ``[B, N]``, True = keep.
    """
    keep = kept_tokens(mask, bias)
    pairs = kept_pairs(keep)
    table = bias.double().masked_fill(~pairs, 0)
    count = keep.sum(-1).clamp(min=1)[:, None, None, None]
    centred = (table - table.sum(-1, keepdim=True) / count).masked_fill(~pairs, 0)

    if bias.dtype == torch.float64:
        with one_thread():
            left, values, right_transposed = torch.linalg.svd(centred)
        projected, vectors = left * values.unsqueeze(-2), right_transposed.mT
    else:
        gram = centred.mT @ centred
        with one_thread():
            vectors = torch.linalg.eigh(gram).eigenvectors.flip(-1)
        projected = centred @ vectors
        values = torch.linalg.vector_norm(projected, dim=-2)

    precision = torch.finfo(torch.promote_types(bias.dtype, torch.float32)).eps
    rounding = 16 * torch.finfo(torch.float64).eps * count.flatten(1) * torch.linalg.vector_norm(table, dim=(-2, -1))
    floor = torch.maximum(values.amax(-1) * precision, rounding)[..., None]
    rank = (values > floor).sum(-1)
    root = values.clamp(min=torch.finfo(torch.float64).tiny).sqrt().unsqueeze(-2)
    left, right = (x.masked_fill(~keep[:, None, :, None], 0).to(bias.dtype) for x in (projected / root, vectors * root))
    return Spectrum(values, left, right, rank)


def refuse_gradient(bias: Tensor) -> None:
    """Raise RuntimeError if a gradient of the bias is wanted, which no decomposition passes on."""
    if torch.is_grad_enabled() and bias.requires_grad:
        raise RuntimeError(
            "factors of a decomposition pass no gradient to the bias: call it under torch.no_grad() or with "
            "bias.detach(), and train with AttentionConfig(bias='dense') or with learned factors"
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep LAPACK on one CPU thread.

    It synchronises its threads after every little step. On two cores that other processes use, too, an
    eigendecomposition of 4 heads at N = 230 takes ten times as long with two threads as with one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
