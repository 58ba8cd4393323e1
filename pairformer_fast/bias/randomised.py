"""Low-rank factors of a pair bias from a random sketch: matrix products and Cholesky factors only, made for the GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pairformer_fast.bias.certificate import kept_pairs, kept_tokens
from pairformer_fast.bias.svd import decompose, refuse_gradient

LARGEST_SHARE = 0.25
"""A rank above this share of N is left to the exact decomposition."""


class RandomisedFactors(NamedTuple):
    """Outcome of :func:`factorize_randomised`.

    Attributes
    ----------
    phi_q, phi_k : Tensor
        ``[B, H, N, R]`` in the dtype of the bias, zero for padding; both columns of a pair have the same length, but
        those of ``phi_q`` are zero where the product would be rounding.
    rank : Tensor
        ``[B, H]`` int64, number of the other columns.
    """

    phi_q: Tensor
    phi_k: Tensor
    rank: Tensor


def factorize_randomised(
    bias: Tensor, mask: Tensor | None, rank: int, *, seed: int = 0, start: Tensor | None = None
) -> RandomisedFactors:
    """Factors nearly as good as those of :func:`~pairformer_fast.bias.svd.decompose`, from few large operations.

    With A the bias after subtracting every row's mean and Ω a random ``[N, R]``: Q is an orthonormal basis of
    ``(A A^T)^p A Ω`` with p power iterations (:func:`_iterations`), and the factors are Q and A^T Q, their columns
    balanced. Products with A are in fp32; bases are orthogonalised by :func:`orthogonalised`. Nothing waits for the
    device, so that a CUDA graph can record it (from the second call of a shape on).

    The same Ω serves every head, and the CPU draws it, so the result depends on input and seed only, up to
    rounding. Where singular values fall below 1/1000 of the largest, fp32 products lose what is smaller: the error may
    exceed the least one by about 0.3 % of the norm of A.

    Parameters
    ----------
    bias : Tensor
        ``[B, H, N, N]``, finite where both tokens are kept.
    mask : Tensor, optional
        Bool ``[B, I, N]`` or ``[B, N]``, True = keep. Tokens that no row keeps are padding: their bias never reaches
        the factors.
    rank : int
        Number of columns R. Above :data:`LARGEST_SHARE` of N the exact decomposition is taken.
    seed : int
        Of the sketch.
    start : Tensor, optional
        Warm start ``[B, H, N, *]``: ``phi_k`` of nearly the same bias, that of the same attention in the recycle
        before. It takes the place of as many random columns; with R columns it saves one power iteration. Factors of
        another block are a worse start than none.

    Raises
    ------
    ValueError
        If ``rank`` is less than 1 or ``start`` does not fit to ``bias``.
    RuntimeError
        If a gradient of the bias is wanted: the projection is not differentiated.

    Notes
    -----
    Source: Halko, Martinsson & Tropp, SIAM Review 53, 217 (2011), Algorithms 4.4 and 5.1.
    """
    refuse_gradient(bias)
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, but got {rank}")
    if start is not None and (start.ndim != 4 or start.shape[:3] != bias.shape[:3]):
        raise ValueError(f"start must be [B, H, N, *] = {[*bias.shape[:3], '*']}, but got {list(start.shape)}")
    with torch.no_grad():
        return _factors(bias, mask, rank, seed, start)


def _factors(bias: Tensor, mask: Tensor | None, rank: int, seed: int, start: Tensor | None) -> RandomisedFactors:
    tokens = bias.shape[-1]
    if rank > LARGEST_SHARE * tokens:
        spectrum, width = decompose(bias, mask), min(rank, tokens)
        return RandomisedFactors(*spectrum.truncate(width), spectrum.rank.clamp(max=width))

    centred, scale = _centred(bias, mask)
    saved = start is not None and start.shape[-1] >= rank
    basis = centred @ _sketch(centred, rank, seed, start)
    for _ in range(_iterations(rank) - saved):
        basis = orthogonalised(centred @ (centred.mT @ basis))
    if mask is not None:
        basis = basis.masked_fill(~kept_tokens(mask, bias)[:, None, :, None], 0)
    projected = centred.mT @ basis

    length = torch.linalg.vector_norm(projected, dim=-2, keepdim=True)
    floor = 4 * torch.finfo(centred.dtype).eps * tokens  # entries of the bias are at most 1 by now
    used, root, half = length > floor, length.clamp(min=floor).sqrt(), scale.sqrt()
    phi_q, phi_k = basis * (root * half * used), projected * (half / root)
    return RandomisedFactors(phi_q.to(bias.dtype), phi_k.to(bias.dtype), used.sum((-2, -1)))


def _iterations(rank: int) -> int:
    """Power iterations that bring the Frobenius error within 5 % of the least possible on trained biases.

    A sketch wider than the rank would need fewer, and then the eigenvectors of a small matrix to be cut to the rank: on
    a GPU they cost more than all products together. On the 168 biases that the bundled model has for the chains of
    ``data/golden`` and a further domain (106 to 231 residues, both recycles) the error exceeded the least one by 4.6 %
    at most at rank 4, 2.7 % at 8, 4.7 % at 16, 4.8 % at 24, 4.3 % at 32 and 2.1 % at 48, where the rank was no more
    than :data:`LARGEST_SHARE` of N; with an iteration less and a start from the recycle before by 1.8 %, 1.7 %, 2.0 %,
    3.6 %, 4.3 % and 1.9 %. From the attention before, instead, it was up to 16 % at rank 32.
    """
    if rank < 24:
        return max(3, 32 // rank)
    return 2 if rank <= 32 else 3


def orthogonalised(columns: Tensor) -> Tensor:
    """Orthonormal basis ``[.., N, L]`` of the column space of ``columns [.., N, L]``, by Cholesky of the Gram matrix.

    For fp32 columns the Gram matrix is formed and factorised in fp64, which bears its squared condition number, and its
    diagonal is raised by what rounding of the columns amounts to. So it is positive definite whatever the columns are:
    the directions that they have but for rounding come out short or zero instead of failing, and there is no branch for
    which a GPU would have to wait. fp64 columns go to a QR decomposition.

    A Gram matrix in fp32 was measured, too, on 72 biases of the bundled model (three of its golden jobs, both recycles,
    ranks 8 to 48). With a diagonal raised by 4 units of fp32 rounding, Cholesky failed from rank 16 on, at 48 for a
    third of the matrices. Raised by 64 units it never fails, but small directions suffer: at rank 32 the error is 5.0 %
    above the least one instead of 4.3 %. Raised by 4 units of the trace it is 40 % above, and with all done twice as
    good as by fp64 once. The matrix has only L x L entries, so a GPU's time for it is latency of small operations
    rather than arithmetic in fp64, and doing them twice would double it.

    Notes
    -----
    Source: CholeskyQR in mixed precision (Yamazaki, Tomov & Dongarra, SIAM J. Sci. Comput. 37, C307, 2015), shift as in
    Fukaya et al., SIAM J. Sci. Comput. 42, A477 (2020).
    """
    if columns.dtype == torch.float64:
        return torch.linalg.qr(columns).Q
    wide = columns.double()
    gram = wide.mT @ wide
    rounding = (4 * torch.finfo(columns.dtype).eps) ** 2
    gram.diagonal(dim1=-2, dim2=-1).mul_(1 + rounding).add_(torch.finfo(gram.dtype).tiny)
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(factor.mT, wide, upper=True, left=False).to(columns.dtype)


def _centred(bias: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bias without padding at a largest entry of 1, less the mean of each row; what it was divided by ``[B, H, 1, 1]``.

    Squares of huge entries stay finite, and rounding floors have one size.
    """
    table = bias.to(torch.promote_types(bias.dtype, torch.float32))
    if mask is None:
        scale = _largest(table)
        table = table / scale
        return table.sub_(table.mean(-1, keepdim=True)), scale
    keep = kept_tokens(mask, bias)
    padding = ~kept_pairs(keep)
    table = table.masked_fill(padding, 0)
    scale = _largest(table)
    table /= scale
    count = keep.sum(-1).clamp(min=1)[:, None, None, None]
    return table.sub_(table.sum(-1, keepdim=True) / count).masked_fill_(padding, 0), scale


def _largest(table: Tensor) -> Tensor:
    largest = torch.linalg.vector_norm(table, torch.inf, dim=(-2, -1), keepdim=True)
    return largest.clamp_(min=torch.finfo(table.dtype).tiny)


def _sketch(centred: Tensor, rank: int, seed: int, start: Tensor | None) -> Tensor:
    """Random columns ``[N, R]``, or ``[B, H, N, R]`` with a warm start in place of the first unless zero or NaN."""
    random = _random(centred.shape[-1], rank, seed, centred.dtype, centred.device)
    if start is None:
        return random
    warm = start[..., :rank].to(centred.dtype)
    length = torch.linalg.vector_norm(warm, dim=-2, keepdim=True)
    usable = (length > 0) & length.isfinite()
    warm = torch.where(usable, warm * (centred.shape[-1] ** 0.5 / length), random[:, : warm.shape[-1]])
    rest = random[:, warm.shape[-1] :].expand(*centred.shape[:2], -1, -1)
    return torch.cat([warm, rest], dim=-1)


@lru_cache(maxsize=8)
def _random(tokens: int, columns: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator, dtype=dtype).to(device)
