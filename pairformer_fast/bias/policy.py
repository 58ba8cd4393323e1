"""What a pair bias becomes in attention: which rank each head needs, and whether factors are worth it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pairformer_fast.bias.factors import BiasFactors
from pairformer_fast.bias.methods import (
    RANK_LADDER,
    AtRank,
    Candidate,
    ErrorOf,
    candidates,
    certified_error,
    check_finite,
    checked_method,
    full_ladder,
    least_rank,
    probed_error,
)
from pairformer_fast.bias.probe import Probe, ProbedError
from pairformer_fast.config import AttentionConfig, Backend, BiasMethod
from pairformer_fast.kernels.flash_bias import chosen_backend

LARGEST_RANK_SHARE = 0.5
"""``auto`` keeps the dense bias if a head needs a rank above this share of N.

Factors of rank R lengthen every dot product from D to D + R and are 2 N R numbers where the table is N^2: from
R = N / 2 on they are no smaller than the bias they replace.
"""


DECOMPOSED_ON = (Backend.REFERENCE, Backend.TORCH)
"""Backends on which ``auto`` decomposes a bias at all.

With the Triton kernels it keeps the dense bias, by the costs measured on an H100 (:mod:`pairformer_fast.bias.costs`):

* Factors of rank 32 take 0.95 to 0.99 of the time of the dense bias in triangle attention of 256 to 1024 tokens. What
  they save, 0.1 ms at 1024 tokens and less below, is all that making and judging them may cost; ``randomised`` takes
  0.35 ms to make them there. At 2048 tokens they save 1.5 ms and are made in 0.84 ms, but in 2.1 ms with the check and
  the certificate that every call has (``data/benchmarks/factorisation.json``). At 4096 they save 13 ms; making them
  is not measured there.
* Factors with a quarter of the tiles dense take 1.06 to 1.15 of the time of the dense bias in triangle attention of any
  size, at 1024 tokens 1.11 even with no tile flagged. So they are never worth choosing there; in attention of single
  tokens they save 9 us at 2048.
"""


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


def keeps_dense(config: AttentionConfig, q: Tensor) -> bool:
    """Whether the bias of attention with queries like ``q`` stays dense whatever it is."""
    if config.bias is BiasMethod.AUTO:
        return chosen_backend(config.backend, q) not in DECOMPOSED_ON
    return config.bias is BiasMethod.DENSE


@torch.no_grad()
def factorize(
    bias: Tensor, config: AttentionConfig, q: Tensor, k: Tensor, mask: Tensor | None, start: Tensor | None = None
) -> Factorization:
    """Do with a pair bias as ``config`` asks; :func:`pairformer_fast.bias.methods.factorize` makes the factors only.

    ``svd``, ``randomised``, ``structured`` and ``landmark`` take ``config.rank`` (at most N), or the least rank of
    :data:`~pairformer_fast.bias.methods.RANK_LADDER` per head whose error is within ``config.tolerance``, the full rank
    at the end. ``auto`` does so by ``svd`` but keeps the dense bias if some head misses the tolerance at every rank up
    to :data:`LARGEST_RANK_SHARE` of N, and where the backend is none of :data:`DECOMPOSED_ON`. The
    error is the probed mean total variation, or the certificate's bound if
    ``config.certified``.

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
    start : Tensor, optional
        Warm start of ``randomised`` at ``config.rank``: ``phi_k`` of the same attention in the recycle before.

    Raises
    ------
    MissingFactorNetworksError
        A ValueError: ``config.bias`` is ``learned``.
    ValueError
        If the bias is NaN or infinite where both tokens are kept.
    """
    if keeps_dense(config, q):
        return Factorization(bias)
    method = BiasMethod.SVD if config.bias is BiasMethod.AUTO else checked_method(config.bias)
    check_finite(bias, mask)

    with torch.autocast(bias.device.type, enabled=False):
        probe = Probe(q, k, bias, mask)
        error = certified_error(bias, mask) if config.certified else probed_error(probe)
        at_rank = candidates(bias, method, mask, start=None if config.rank is None else start)
        chosen = _chosen(at_rank, config, error, bias.shape[-1])
        if chosen is None:
            return Factorization(bias)
        return Factorization(bias, chosen.certified(bias, mask), probe.error(chosen.phi_q, chosen.phi_k, chosen.table))


def _chosen(at_rank: AtRank, config: AttentionConfig, error: ErrorOf, tokens: int) -> Candidate | None:
    """None if the dense bias is the better choice."""
    if config.bias is BiasMethod.AUTO:
        ladder = _paying_ladder(config, tokens)
        if not ladder:
            return None
        chosen, met = least_rank(at_rank, ladder, error, config.tolerance)
        return chosen if met.all() else None
    if config.rank is not None:
        return at_rank(min(config.rank, tokens))
    return least_rank(at_rank, full_ladder(tokens), error, config.tolerance)[0]


def _paying_ladder(config: AttentionConfig, tokens: int) -> list[int]:
    limit = int(LARGEST_RANK_SHARE * tokens)
    if config.rank is not None:
        return [config.rank] if config.rank <= limit else []
    return sorted({rank for rank in (*RANK_LADDER, limit) if 0 < rank <= limit})
