"""From a dense pair bias to factors: one function for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pairformer_fast.bias.certificate import certify, kept_pairs, kept_tokens
from pairformer_fast.bias.factors import BiasFactors
from pairformer_fast.bias.landmark import BiasLines, decompose_lines
from pairformer_fast.bias.probe import Probe
from pairformer_fast.bias.randomised import factorize_randomised
from pairformer_fast.bias.structured import relative_position
from pairformer_fast.bias.svd import Spectrum, decompose, refuse_gradient
from pairformer_fast.config import BiasMethod

RANK_LADDER = (4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Ranks tried in a search by tolerance, before the full rank."""

TABLE_WIDTH = 32
"""Default largest relative position with a table entry of its own, that of AF3's relative position encoding.

With it rank 8 moved the bundled model's CA atoms by 0.40 and 0.41 Å (106 and 227 residues, fp32, against the dense
bias); without a table it moved them by 2.7 and 4.6 Å.
"""

DECOMPOSED = (BiasMethod.SVD, BiasMethod.RANDOMISED, BiasMethod.STRUCTURED, BiasMethod.LANDMARK)
"""Methods that make factors from the bias itself."""


class MissingFactorNetworksError(LookupError, ValueError):
    """Learned factors were asked of a model that has no networks for them."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """Factors of one rank, not certified yet: ``bias ≈ phi_q @ phi_k.mT`` plus the table, if there is one.

    Attributes
    ----------
    phi_q, phi_k : Tensor
        ``[B, H, N, R]``.
    rank : Tensor
        ``[B, H]`` int64, columns in use.
    table : Tensor, optional
        ``[H, 2 W + 1]``.
    """

    phi_q: Tensor
    phi_k: Tensor
    rank: Tensor
    table: Tensor | None = None

    def replaced(self, other: Candidate, heads: Tensor) -> Candidate:
        """This, but ``other`` for ``heads`` (bool ``[B, H]``); the table is the same in both."""
        width = max(self.phi_q.shape[-1], other.phi_q.shape[-1])

        def chosen(mine: Tensor, theirs: Tensor) -> Tensor:
            mine, theirs = (pad(x, (0, width - x.shape[-1])) for x in (mine, theirs))
            return torch.where(heads[..., None, None], theirs, mine)

        rank = torch.where(heads, other.rank, self.rank)
        return Candidate(chosen(self.phi_q, other.phi_q), chosen(self.phi_k, other.phi_k), rank, table=self.table)

    def without(self, heads: Tensor) -> Candidate:
        """This, but nothing for ``heads`` (bool ``[B, H]``), nor columns that only they use; at least one stays."""
        phi_q, phi_k = (x.masked_fill(heads[..., None, None], 0) for x in (self.phi_q, self.phi_k))
        used = phi_q.any(dim=-2).flatten(0, 1).any(dim=0)
        used[0] = True
        return Candidate(phi_q[..., used], phi_k[..., used], self.rank.masked_fill(heads, 0), self.table)

    def certified(self, bias: Tensor, mask: Tensor | None) -> BiasFactors:
        """With the certificate."""
        certificate = certify(bias, self.phi_q, self.phi_k, mask, self.table)
        return BiasFactors(self.phi_q, self.phi_k, self.rank, certificate, table=self.table)


AtRank = Callable[[int], Candidate]
"""Factors of a rank; no head has more columns, some may have fewer."""

ErrorOf = Callable[[Candidate], Tensor]
"""What a tolerance is held against, ``[B, H]``."""


def factorize(
    bias: Tensor,
    method: BiasMethod | str = BiasMethod.SVD,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    certified: bool = False,
    q: Tensor | None = None,
    k: Tensor | None = None,
    mask: Tensor | None = None,
    width: int = TABLE_WIDTH,
    seed: int = 0,
    start: Tensor | None = None,
) -> BiasFactors:
    """Factors of a pair bias, of a given rank or within a given tolerance, with a certificate of their error.

    ``svd``
        The best factors of their rank in the Frobenius norm (:mod:`pairformer_fast.bias.svd`).
    ``randomised``
        Nearly the best ones, from a random sketch, for the GPU (:mod:`pairformer_fast.bias.randomised`).
    ``structured``
        A table of relative positions, and the best factors of the rest (:mod:`pairformer_fast.bias.structured`).
    ``landmark``
        From rows and columns at a few tokens; for a bias that is not formed at all there is
        :func:`~pairformer_fast.bias.landmark.factorize_lines`.

    Parameters
    ----------
    bias : Tensor
        ``[B, H, N, N]``.
    method : BiasMethod
        One of those above.
    rank : int, optional
        Of every head, cut to N.
    tolerance : float, optional
        Instead of a rank: the least rank of :data:`RANK_LADDER` per head whose error is within it, the full rank at the
        end. The error is the mean total variation (0 to 1) of attention weights probed on a sample of queries.
    certified : bool
        Hold the tolerance against the certificate's hard bound instead of the probe.
    q, k : Tensor, optional
        ``[B, I, N, H, D]`` or ``[B, N, H, D]``, not scaled; what the probe computes attention weights from.
    mask : Tensor, optional
        Bool ``[B, I, N]`` or ``[B, N]``, True = keep. Tokens that no row keeps are padding and never reach the factors.
    width : int
        ``structured``: largest relative position W with an entry of its own.
    seed : int
        ``randomised``: of the sketch.
    start : Tensor, optional
        ``randomised``: warm start ``[B, H, N, *]``, ``phi_k`` of the same attention in the recycle before.

    Returns
    -------
    BiasFactors
        Dtype of the bias; not differentiable.

    Raises
    ------
    MissingFactorNetworksError
        A ValueError: the method is ``learned``.
    ValueError
        If the method is unknown or makes no factors, not exactly one of rank and tolerance is given, q and k are
        missing, or the bias is NaN or infinite where both tokens are kept.
    RuntimeError
        If a gradient of the bias is wanted.

    Notes
    -----
    Source: FlashBias (Wu et al., NeurIPS 2025, arXiv 2505.12044).
    """
    method = checked_method(method)
    if (rank is None) == (tolerance is None):
        raise ValueError(f"give either rank or tolerance, but got rank {rank} and tolerance {tolerance}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be 1 or more, but got {rank}")
    if tolerance is not None and not certified and (q is None or k is None):
        raise ValueError("tolerance is on the error probed with q and k: pass them, or certified=True")
    refuse_gradient(bias)
    check_finite(bias, mask)

    with torch.no_grad(), torch.autocast(bias.device.type, enabled=False):
        at_rank = candidates(bias, method, mask, width=width, seed=seed, start=start)
        if tolerance is None:
            assert rank is not None
            return at_rank(min(rank, bias.shape[-1])).certified(bias, mask)
        if certified:
            error = certified_error(bias, mask)
        else:
            assert q is not None
            assert k is not None
            error = probed_error(Probe(q, k, bias, mask))
        return least_rank(at_rank, full_ladder(bias.shape[-1]), error, tolerance)[0].certified(bias, mask)


def checked_method(method: BiasMethod | str) -> BiasMethod:
    """The method by its name, if it makes factors from a dense bias."""
    names = ", ".join(f"'{name}'" for name in DECOMPOSED)
    if method == BiasMethod.LEARNED:
        raise MissingFactorNetworksError(
            "bias is 'learned', but the checkpoint carries no factor networks; choose 'svd', 'auto' or 'dense'"
        )
    if method not in DECOMPOSED:
        raise ValueError(f"method must be one of {names}, but got '{method}'")
    return BiasMethod(method)


def candidates(
    bias: Tensor,
    method: BiasMethod,
    mask: Tensor | None,
    *,
    width: int = TABLE_WIDTH,
    seed: int = 0,
    start: Tensor | None = None,
) -> AtRank:
    """Factors of any rank; the arguments are those of :func:`factorize`."""
    match method:
        case BiasMethod.RANDOMISED:
            return lambda rank: Candidate(*factorize_randomised(bias, mask, rank, seed=seed, start=start))
        case BiasMethod.LANDMARK:
            lines, keep = BiasLines.of(bias), kept_tokens(mask, bias)
            return lambda rank: _cut(decompose_lines(lines, keep, rank)[0], rank)
        case BiasMethod.STRUCTURED:
            table, rest = relative_position(bias, width, mask)
            of_rest = decompose(rest, mask)
            return lambda rank: _cut(of_rest, rank, table)
    spectrum = decompose(bias, mask)
    return lambda rank: _cut(spectrum, rank)


def full_ladder(tokens: int) -> list[int]:
    """:data:`RANK_LADDER` below N, and N."""
    return [*(rank for rank in RANK_LADDER if rank < tokens), tokens]


def least_rank(at_rank: AtRank, ladder: Sequence[int], error: ErrorOf, tolerance: float) -> tuple[Candidate, Tensor]:
    """Factors of the least rank of an ascending ladder within the tolerance, head by head.

    Returns
    -------
    candidate : Candidate
        The last rank of the ladder where none is within the tolerance.
    met : Tensor
        Bool ``[B, H]``, whether one is.
    """
    chosen = at_rank(ladder[0])
    met = error(chosen) <= tolerance
    for rank in ladder[1:]:
        if met.all():
            break
        candidate = at_rank(rank)
        chosen = chosen.replaced(candidate, ~met)
        met |= error(candidate) <= tolerance
    return chosen, met


def certified_error(bias: Tensor, mask: Tensor | None) -> ErrorOf:
    """The certificate's bound."""
    return lambda candidate: certify(bias, candidate.phi_q, candidate.phi_k, mask, candidate.table).bound


def probed_error(probe: Probe) -> ErrorOf:
    """The probed mean."""
    return lambda candidate: probe.error(candidate.phi_q, candidate.phi_k, candidate.table).mean


def check_finite(bias: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError if the bias is NaN or infinite where both tokens are kept."""
    wrong = ~bias.isfinite() & kept_pairs(kept_tokens(mask, bias))
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"bias has {int(wrong.sum())} NaN or infinite entries between kept tokens, the first at [b, h, i, j] = "
            f"{first}; drop tokens by mask rather than by infinite logits, and check the weights and the precision"
        )


def _cut(spectrum: Spectrum, rank: int, table: Tensor | None = None) -> Candidate:
    return Candidate(*spectrum.truncate(rank), spectrum.rank.clamp(max=rank), table)
