"""Low-rank factors of a pair bias from a random sketch: matrix products and Cholesky factors only, made for the GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pairformer_fast.bias.certificate import kept_pairs, kept_tokens
from pairformer_fast.bias.svd import decompose, refuse_gradient
from pairformer_fast.kernels.low_rank import balanced, centred, inverse_cholesky
from pairformer_fast.kernels.low_rank.reference import project
from pairformer_fast.kernels.weight_gradient import product_fp32

LARGEST_SHARE = 0.25
"""A rank above this share of N is left to the exact decomposition."""
SMALLEST, LARGEST = 1e-32, 1e34
"""Sizes of biases that are scaled to 1; beyond them the scale itself, or what it multiplies, would leave fp32."""


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
    balanced. Products with A read the table as it lies: in bf16 both operands are bf16, for tensor cores, with sums in
    fp32; otherwise they are in fp32 (fp64 for fp64). Bases are orthogonalised by :func:`orthogonalised`. Nothing waits
    for the device, so that a CUDA graph can record it (from the second call of a shape on).

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

    products = _Centred.of(bias, mask)
    saved = start is not None and start.shape[-1] >= rank
    basis = products.times(_sketch(products, rank, seed, start))
    for _ in range(_iterations(rank) - saved):
        basis = orthogonalised(products.times_centred(products.transposed_times(basis)))
    projected = products.transposed_times(basis)
    phi_q, phi_k, used = balanced(basis, projected, products.padding, products.kept, products.unit, bias.dtype)
    phi_q, phi_k = (x.unflatten(0, bias.shape[:2]) for x in (phi_q, phi_k))
    return RandomisedFactors(phi_q, phi_k, used.sum(-1).view(bias.shape[:2]))


class _Centred(NamedTuple):
    """Products with the bias A less the mean of each row, A P with P = I - 1 1^T / N, from the table as it lies.

    P is left to the thin operands, of which centring costs next to nothing: neither a centred table is made nor, of a
    bias in bf16, one in fp32. What a product takes is rounded to the dtype of the table, so that tensor cores can
    compute it; sums are in fp32. Rounding of thin operands turns a basis a little, but all of it is multiplied by A
    once more: what :func:`_iterations` reports holds for bf16, too.

    Attributes
    ----------
    table : Tensor
        ``[B H, N, N]``, zero in padding.
    unit : Tensor
        ``[B H, 1, 1]`` in the dtype of sums: what brings the largest entry to 1 / N. Thin operands carry it, so that
        products of huge entries stay finite and rounding floors have one size.
    padding : Tensor or None
        ``[B H, N, 1]``, True for padding.
    kept : Tensor or None
        ``[B H, 1, 1]``, tokens that are kept.
    """

    table: Tensor
    unit: Tensor
    padding: Tensor | None
    kept: Tensor | None

    @classmethod
    def of(cls, bias: Tensor, mask: Tensor | None) -> _Centred:
        table = bias.float() if bias.dtype == torch.float16 else bias  # its range is too small for scaled operands
        padding = kept = None
        if mask is not None:
            keep = kept_tokens(mask, bias)
            table = table.masked_fill(~kept_pairs(keep), 0)
            keep = keep.repeat_interleave(bias.shape[1], dim=0)[..., None]
            padding, kept = ~keep, keep.sum(-2, keepdim=True).clamp(min=1)
        table = table.flatten(0, 1)
        if 1 not in table.stride()[-2:]:
            table = table.contiguous()
        wide = torch.promote_types(table.dtype, torch.float32)
        largest = torch.linalg.vector_norm(table, torch.inf, dim=(-2, -1), keepdim=True).to(wide)
        unit = largest.clamp(SMALLEST, LARGEST).reciprocal() / bias.shape[-1]
        return cls(table, unit, padding, kept)

    def scaled(self, thin: Tensor, scale: Tensor) -> Tensor:
        """``[B H, N, L]`` times ``scale`` in the dtype of the table, by one operation."""
        return torch.mul(thin, scale, out=thin.new_empty(len(self.table), *thin.shape[-2:], dtype=self.table.dtype))

    def times(self, thin: Tensor) -> Tensor:
        """A X at the size of ``unit``, for centred columns X."""
        return product_fp32(self.table, self.scaled(thin, self.unit))

    def times_centred(self, thin: Tensor) -> Tensor:
        """A P X at the size of ``unit``."""
        return product_fp32(self.table, centred(thin, self.kept, self.unit, self.table.dtype))

    def transposed_times(self, thin: Tensor) -> Tensor:
        """A^T X at the size of ``unit``."""
        return product_fp32(self.table.mT, self.scaled(thin, self.unit))


def _iterations(rank: int) -> int:
    """Power iterations that bring the Frobenius error within 5 % of the least possible on trained biases.

    A sketch wider than the rank would need fewer, and then the eigenvectors of a small matrix to be cut to the rank: on
    a GPU they cost more than all products together. On the 168 biases that the bundled model has for the chains of
    ``data/golden`` and a further domain (106 to 231 residues, both recycles) the error exceeded the least one by 4.6 %
    at most at rank 4, 2.7 % at 8, 4.7 % at 16, 2.8 % at 24, 4.3 % at 32 and 2.1 % at 48, where the rank was no more
    than :data:`LARGEST_SHARE` of N; with an iteration less and a start from the recycle before by 1.8 %, 1.7 %, 2.0 %,
    2.2 %, 4.3 % and 1.9 %. From the attention before, instead, it was up to 16 % at rank 32.

    In bf16, with what the products take rounded to it, on 112 of them (``golden.fasta`` and the domain), from which the
    figures of rank 24 above are, too: 3.8 % at rank 4, 2.2 % at 8, 4.9 % at 16, 2.8 % at 24, 4.2 % at 32 and 2.0 % at
    48; from the recycle before 1.9 %, 1.6 %, 2.0 %, 2.2 %, 4.3 % and 2.0 %. With two iterations rank 24 was between 4.4
    % and 5.0 %, by what operands were multiplied with before they were rounded.
    """
    if rank <= 24:
        return max(3, 32 // rank)
    return 2 if rank <= 32 else 3


def orthogonalised(columns: Tensor) -> Tensor:
    """Orthonormal basis ``[.., N, L]`` fp64 of the column space of ``columns``, by Cholesky of the Gram matrix.

    For fp32 columns the Gram matrix is formed and factorised in fp64, which bears its squared condition number as well
    as a product with the inverse of the factor, which is meant to be cheaper on a GPU than solving for N rows. Its
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
    return wide @ inverse_cholesky(wide.mT @ wide, (4 * torch.finfo(columns.dtype).eps) ** 2).mT


def _sketch(products: _Centred, rank: int, seed: int, start: Tensor | None) -> Tensor:
    """Centred random columns ``[N, R]``, or ``[B H, N, R]``, a warm start in place of the first unless zero or NaN."""
    tokens, dtype = products.table.shape[-1], products.unit.dtype
    random = _random(tokens, rank, seed, dtype, products.table.device)
    if start is not None:
        warm = start[..., :rank].to(dtype).flatten(0, 1)
        length = torch.linalg.vector_norm(warm, dim=-2, keepdim=True)
        usable = (length > 0) & length.isfinite()
        warm = torch.where(usable, warm * (tokens**0.5 / length), random[:, : warm.shape[-1]])
        random = torch.cat([warm, random[:, warm.shape[-1] :].expand(len(warm), -1, -1)], dim=-1)
    if products.padding is not None:
        random = project(random.masked_fill(products.padding, 0), products.kept)
    return random


@lru_cache(maxsize=8)
def _random(tokens: int, columns: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(tokens, columns, generator=generator, dtype=dtype)
    return (random - random.mean(0)).to(device)
