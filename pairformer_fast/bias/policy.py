"""What a pair bias becomes: which rank each head needs, and whether factors are worth it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pairformer_fast.bias.certificate import certify, kept_tokens
from pairformer_fast.bias.factors import BiasFactors
from pairformer_fast.bias.probe import Probe, ProbedError
from pairformer_fast.bias.svd import Spectrum, decompose
from pairformer_fast.config import AttentionConfig, BiasMethod

RANK_LADDER = (4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Ranks tried in a search by tolerance, before the full rank."""

LARGEST_RANK_SHARE = 0.5
"""``auto`` keeps the dense bias if a head needs a rank above this share of N.

Factors of rank R lengthen every dot product from D to D + R and are 2 N R numbers where the table is N^2: from
R = N / 2 on they are no smaller than the bias they replace.
"""


class MissingFactorNetworksError(LookupError, ValueError):
    """Learned factors were asked of a model that has no networks for them."""


@dataclass(frozen=True, eq=False)
class Factorization:
    """Outcome of :func:`factorize`.

    Attributes
    ----------
    bias : Tensor
        The dense bias, ``[B, H, N, N]``.
    factors : BiasFactors, optional
        What replaces it; None if the dense bias was kept.
    probed : ProbedError, optional
        Measured error of the factors; None without them.
    """

    bias: Tensor
    factors: BiasFactors | None = None
    probed: ProbedError | None = None

    @property
    def for_attention(self) -> Tensor | BiasFactors:
        """What attention should take as its bias."""
        return self.bias if self.factors is None else self.factors


@torch.no_grad()
def factorize(bias: Tensor, config: AttentionConfig, q: Tensor, k: Tensor, mask: Tensor | None) -> Factorization:
    """Turn a pair bias into factors as ``config`` asks.

    ``svd`` takes ``config.rank`` (at most N), or the least rank of :data:`RANK_LADDER` per head whose error is within
    ``config.tolerance``, the full rank at the end. ``auto`` does the same but keeps the dense bias if some head misses
    the tolerance at every rank up to :data:`LARGEST_RANK_SHARE` of N. The error is the probed mean total variation, or
    the certificate's bound if ``config.certified``.

    Parameters
    ----------
    bias : Tensor
        ``[B, H, N, N]``.
    config : AttentionConfig
        Method, rank or tolerance.
    q, k : Tensor
        ``[B, I, N, H, D]`` or ``[B, N, H, D]``, not scaled; the probe computes attention weights from them.
    mask : Tensor, optional
        Bool ``[B, I, N]`` or ``[B, N]``, True = keep.

    Raises
    ------
    MissingFactorNetworksError
        A ValueError: ``config.bias`` is ``learned``.
    ValueError
        If the bias is NaN or infinite where both tokens are kept.
    """
    if config.bias is BiasMethod.DENSE:
        return Factorization(bias)
    if config.bias is BiasMethod.LEARNED:
        raise MissingFactorNetworksError(
            "bias is 'learned', but the checkpoint carries no factor networks; choose 'svd', 'auto' or 'dense'"
        )
    _check_finite(bias, kept_tokens(mask, bias))

    with torch.autocast(bias.device.type, enabled=False):
        return _decomposed(bias, config, q, k, mask)


def _decomposed(bias: Tensor, config: AttentionConfig, q: Tensor, k: Tensor, mask: Tensor | None) -> Factorization:
    spectrum = decompose(bias, mask)
    probe = Probe(q, k, bias, mask)

    def error(phi_q: Tensor, phi_k: Tensor) -> Tensor:
        if config.certified:
            return certify(bias, phi_q, phi_k, mask).bound
        return probe.error(phi_q, phi_k).mean

    tokens = bias.shape[-1]
    if config.bias is BiasMethod.SVD:
        rank = _svd_rank(spectrum, config, error, tokens)
    else:
        paying = _paying_rank(spectrum, config, error, tokens)
        if paying is None:
            return Factorization(bias)
        rank = paying

    phi_q, phi_k = spectrum.truncate(rank)
    certificate = certify(bias, phi_q, phi_k, mask)
    factors = BiasFactors(phi_q, phi_k, torch.minimum(rank, spectrum.rank), certificate)
    return Factorization(bias, factors, probe.error(phi_q, phi_k))


def _svd_rank(
    spectrum: Spectrum, config: AttentionConfig, error: Callable[[Tensor, Tensor], Tensor], tokens: int
) -> Tensor:
    if config.rank is not None:
        return torch.full_like(spectrum.rank, min(config.rank, tokens))
    ladder = [rank for rank in RANK_LADDER if rank < tokens]
    rank, met = _least_rank(spectrum, ladder, error, config.tolerance)
    return rank.masked_fill(~met, tokens)


def _paying_rank(
    spectrum: Spectrum, config: AttentionConfig, error: Callable[[Tensor, Tensor], Tensor], tokens: int
) -> Tensor | None:
    limit = int(LARGEST_RANK_SHARE * tokens)
    if config.rank is not None:
        ladder = [config.rank] if config.rank <= limit else []
    else:
        ladder = [rank for rank in (*RANK_LADDER, limit) if 0 < rank <= limit]
    rank, met = _least_rank(spectrum, sorted(set(ladder)), error, config.tolerance)
    return rank if met.all() else None


def _least_rank(
    spectrum: Spectrum, ladder: Sequence[int], error: Callable[[Tensor, Tensor], Tensor], tolerance: float
) -> tuple[Tensor, Tensor]:
    """Least rank of an ascending ladder within the tolerance, and whether there is one, both ``[B, H]``."""
    chosen = torch.zeros_like(spectrum.rank)
    met = torch.zeros_like(spectrum.rank, dtype=torch.bool)
    for rank in ladder:
        within = error(*spectrum.truncate(rank)) <= tolerance
        chosen = chosen.masked_fill(within & ~met, rank)
        met |= within
        if met.all():
            break
    return chosen, met


def _check_finite(bias: Tensor, keep: Tensor) -> None:
    wrong = ~bias.isfinite() & (keep[:, :, None] & keep[:, None, :]).unsqueeze(1)
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"bias has {int(wrong.sum())} NaN or infinite entries between kept tokens, the first at [b, h, i, j] = "
            f"{first}; drop tokens by mask rather than by infinite logits, and check the weights and the precision"
        )
