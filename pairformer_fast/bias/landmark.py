"""Factors from the rows and columns of a pair bias at a few landmark tokens: the whole bias need not be formed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from pairformer_fast.bias.probe import spread
from pairformer_fast.bias.svd import Spectrum, decompose, one_thread
from pairformer_fast.kernels.flash_bias import Factors

COLUMNS_PER_RANK, ROWS_PER_RANK = 2, 4
"""Landmarks for each unit of rank.

On the bundled model's biases at 227 tokens and ranks 8 to 32 the Frobenius error is then 1.3 to 1.4 times the least
possible. With as many rows as columns it was 5 to 10 times that: the core, which is inverted, is ill-conditioned.
"""

SAMPLED_ROWS = 16


class Landmarks(StrEnum):
    """How landmark tokens are chosen.

    ``leverage`` reads evenly spaced columns, takes the rows that pivoting finds in them, and the columns that pivoting
    finds in those; ``even`` takes evenly spaced rows and columns, and reads a quarter less. Both repeat exactly.
    """

    LEVERAGE = "leverage"
    EVEN = "even"


@dataclass(frozen=True)
class BiasLines:
    """A pair bias that is computed where it is asked for.

    Attributes
    ----------
    rows, columns : callable
        Given tokens ``[B, M]`` (int64), the bias ``[B, H, M, N]`` of these queries, or ``[B, H, N, M]`` of these keys.
        What they give for padding is ignored.
    """

    rows: Callable[[Tensor], Tensor]
    columns: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, bias: Tensor) -> BiasLines:
        """Lines of a dense bias ``[B, H, N, N]``."""
        entry = torch.arange(bias.shape[0], device=bias.device)[:, None]
        return cls(
            rows=lambda tokens: bias.permute(0, 2, 1, 3)[entry, tokens].permute(0, 2, 1, 3),
            columns=lambda tokens: bias.permute(0, 3, 1, 2)[entry, tokens].permute(0, 2, 3, 1),
        )

    @classmethod
    def projected(cls, z: Tensor, project: Callable[[Tensor], Tensor]) -> BiasLines:
        """Lines of the bias that a model makes of its pair representation, of which only these lines are projected.

        Parameters
        ----------
        z : Tensor
            ``[B, N, N, C_z]``; transposed in its tokens for the ending node.
        project : callable
            ``[B, M, N, C_z]`` to ``[B, M, N, H]``, such as layer norm and linear layer.
        """
        entry = torch.arange(z.shape[0], device=z.device)[:, None]
        return cls(
            rows=lambda tokens: project(z[entry, tokens]).permute(0, 3, 1, 2),
            columns=lambda tokens: project(z.transpose(1, 2)[entry, tokens]).permute(0, 3, 2, 1),
        )


@dataclass(frozen=True, eq=False)
class SampledFactors(Factors):
    """Factors of a bias that was never formed; their error is measured on some rows and guaranteed for no other.

    Attributes
    ----------
    phi_q, phi_k : Tensor
        ``[B, H, N, R]``, see :class:`~pairformer_fast.kernels.flash_bias.Factors`.
    rank : Tensor
        ``[B, H]`` int64, number of columns in use.
    sampled_rows : Tensor
        ``[B, S]`` int64, queries that were compared: no landmarks, as far as there are others.
    sampled_eps : Tensor
        ``[B, H, S]`` fp64, half the range of ``bias - phi_q @ phi_k.mT`` along these rows, over kept keys; zero for
        padding. No bound holds for other rows: for a certificate the dense bias is needed.
    """

    rank: Tensor
    sampled_rows: Tensor
    sampled_eps: Tensor


@torch.no_grad()
def factorize_lines(
    lines: BiasLines, keep: Tensor, rank: int, choice: Landmarks | str = Landmarks.LEVERAGE
) -> SampledFactors:
    """Factors of a bias of which only some lines are computed: 8 R and 16 for the error, of 2 N (``even``: 6 R and 16).

    Parameters
    ----------
    lines : BiasLines
        The bias.
    keep : Tensor
        Bool ``[B, N]``, True for tokens that are not padding.
    rank : int
        Largest rank R of a head.
    choice : Landmarks
        How landmarks are chosen.

    Raises
    ------
    ValueError
        If ``rank`` is less than 1, ``keep`` is no bool ``[B, N]``, or lines are NaN or infinite between kept tokens.
    """
    spectrum, landmarks = decompose_lines(lines, keep, rank, choice)
    phi_q, phi_k = spectrum.truncate(rank)
    others = keep.scatter(1, landmarks, False)
    sampled = spread(torch.where(others.any(1, keepdim=True), others, keep), SAMPLED_ROWS)
    want = _rows(lines, keep, sampled).double()
    residual = want - _at(phi_q.double(), sampled) @ phi_k.double().mT
    dropped = ~keep[:, None, None, :]
    span = residual.masked_fill(dropped, -torch.inf).amax(-1) - residual.masked_fill(dropped, torch.inf).amin(-1)
    eps = (span / 2).masked_fill(~keep.gather(1, sampled)[:, None, :], 0)
    return SampledFactors(phi_q, phi_k, spectrum.rank.clamp(max=rank), sampled, eps)


@torch.no_grad()
def decompose_lines(
    lines: BiasLines, keep: Tensor, rank: int, choice: Landmarks | str = Landmarks.LEVERAGE
) -> tuple[Spectrum, Tensor]:
    r"""Approximate leading part of the decomposition of :func:`~pairformer_fast.bias.svd.decompose`, from landmarks.

    With C the columns of the bias A at :data:`COLUMNS_PER_RANK` R landmarks, less each row's mean in them, R its rows
    at :data:`ROWS_PER_RANK` R landmarks less the same means, and W where they cross: A is close to C W\ :sup:`+` R,
    exact if A is of no higher rank than W. The pseudo-inverse drops singular values within rounding of zero, and the
    product, of thin matrices, is decomposed anew and cut to the rank, all in fp64. Where the landmarks would be all
    tokens the bias is read as a whole and decomposed exactly.

    Parameters
    ----------
    lines, keep, rank, choice
        See :func:`factorize_lines`.

    Returns
    -------
    spectrum : Spectrum
        At most R triplets (N where the bias was read as a whole).
    landmarks : Tensor
        ``[B, M]`` int64, tokens whose rows were read.

    Notes
    -----
    Source: CUR (Mahoney & Drineas, PNAS 106, 697, 2009) with the core of Nyström's method (Williams & Seeger, NIPS
    2000); more rows than columns as in Nakatsukasa, arXiv 2009.11392; pivots by Gram-Schmidt, as in a QR decomposition
    with column pivoting.
    """
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, but got {rank}")
    if keep.ndim != 2 or keep.dtype != torch.bool:
        raise ValueError(f"keep must be bool [B, N], but got {keep.dtype} of shape {list(keep.shape)}")
    tokens = keep.shape[1]
    if ROWS_PER_RANK * rank >= tokens:
        everything = torch.arange(tokens, device=keep.device).expand_as(keep)
        return decompose(_rows(lines, keep, everything), keep), everything

    at_rows, rows, at_columns = _choose(lines, keep, rank, Landmarks(choice))
    columns, means = _without_means(_columns(lines, keep, at_columns), keep, keep.gather(1, at_columns))
    outside = ~_both(keep.gather(1, at_rows), keep)
    norm = torch.linalg.vector_norm(rows.double(), dim=(-2, -1))
    dtype = rows.dtype
    rows = (rows.double() - _at(means, at_rows)).masked_fill(outside, 0)

    with one_thread():
        of_rows, values, of_columns = torch.linalg.svd(_at(columns, at_rows), full_matrices=False)
        precision = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        inverse = torch.where(values > 16 * precision * values[..., :1], 1 / values, 0).unsqueeze(-2)
        left = torch.linalg.qr(columns @ (of_columns.mT * inverse))
        right = torch.linalg.qr(rows.mT @ of_rows)
        small = torch.linalg.svd(left.R @ right.R.mT)

    values = small.S[..., :rank]
    rounding = 16 * torch.finfo(torch.float64).eps * tokens * norm
    floor = torch.maximum(values[..., 0] * precision, rounding).clamp(min=torch.finfo(torch.float64).tiny)[..., None]
    root = values.sqrt().unsqueeze(-2)
    padding = ~keep[:, None, :, None]
    phi_q, phi_k = left.Q @ small.U[..., :rank] * root, right.Q @ small.Vh.mT[..., :rank] * root
    phi_q, phi_k = (x.masked_fill(padding, 0).to(dtype) for x in (phi_q, phi_k))
    return Spectrum(values, phi_q, phi_k, (values > floor).sum(-1)), at_rows


def _choose(lines: BiasLines, keep: Tensor, rank: int, choice: Landmarks) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[B, M]`` of the rows, these rows ``[B, H, M, N]``, and tokens of the columns."""
    at_rows, at_columns = spread(keep, ROWS_PER_RANK * rank), spread(keep, COLUMNS_PER_RANK * rank)
    if choice is Landmarks.EVEN:
        return at_rows, _rows(lines, keep, at_rows), at_columns
    seen, _ = _without_means(_columns(lines, keep, at_columns), keep, keep.gather(1, at_columns))
    at_rows = _pivots(seen.permute(0, 2, 1, 3).flatten(2), keep, at_rows.shape[1])
    rows = _rows(lines, keep, at_rows)
    seen, _ = _without_means(rows, keep.gather(1, at_rows), keep)
    return at_rows, rows, _pivots(seen.permute(0, 3, 1, 2).flatten(2), keep, at_columns.shape[1])


def _pivots(features: Tensor, keep: Tensor, count: int) -> Tensor:
    """``[B, count]`` tokens, each the one whose ``features [B, N, F]`` stick out most from the span of those before."""
    left = features.clone()
    entry = torch.arange(left.shape[0], device=left.device)
    rank_of = torch.zeros_like(keep, dtype=left.dtype).masked_fill(~keep, -1)
    chosen = []
    for _ in range(count):
        token = torch.where(rank_of < 0, rank_of, left.square().sum(-1)).argmax(1)
        chosen.append(token)
        rank_of[entry, token] = -2
        direction = torch.nn.functional.normalize(left[entry, token], dim=-1, eps=torch.finfo(left.dtype).tiny)
        left -= (left @ direction.unsqueeze(-1)) * direction.unsqueeze(1)
    return torch.stack(chosen, dim=1)


def _without_means(table: Tensor, of_row: Tensor, of_column: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, H, X, Y]`` less each row's mean over kept columns, and the means ``[B, H, X, 1]``, in fp64."""
    table = table.double()
    count = of_column.sum(-1).clamp(min=1)[:, None, None, None]
    means = table.sum(-1, keepdim=True) / count
    return (table - means).masked_fill(~_both(of_row, of_column), 0), means


def _both(of_row: Tensor, of_column: Tensor) -> Tensor:
    return (of_row[:, :, None] & of_column[:, None, :]).unsqueeze(1)


def _at(table: Tensor, tokens: Tensor) -> Tensor:
    """Rows ``[B, H, M, X]`` of ``[B, H, N, X]``."""
    return table.take_along_dim(tokens[:, None, :, None], dim=2)


def _rows(lines: BiasLines, keep: Tensor, tokens: Tensor) -> Tensor:
    """``[B, H, M, N]``, zero for padding."""
    return _finite(lines.rows(tokens).masked_fill(~_both(keep.gather(1, tokens), keep), 0))


def _columns(lines: BiasLines, keep: Tensor, tokens: Tensor) -> Tensor:
    """``[B, H, N, M]``, zero for padding."""
    return _finite(lines.columns(tokens).masked_fill(~_both(keep, keep.gather(1, tokens)), 0))


def _finite(table: Tensor) -> Tensor:
    if not table.isfinite().all():
        raise ValueError(
            "lines of the bias are NaN or infinite between kept tokens; drop tokens by mask rather than by infinite "
            "logits, and check the weights and the precision"
        )
    return table
