"""What a pair bias becomes in attention: which rank each head needs, and whether factors are worth it.

``auto`` asks the measured costs of its device (:mod:`pairformer_fast.bias.costs`) before it touches a bias. Factors are
made only of ranks at which attention and the search up to them together take less time than attention with the dense
bias, and only where the whole search takes no more than :data:`LARGEST_LOSS` of that time: so much is lost if every
rank then misses the tolerance. By the tables shipped no rank of any size passes:

* With Triton on an H100 factors of rank 32 take 0.89 to 0.99 of the time of the dense bias in triangle attention. Up to
  2048 tokens making and judging them takes more than that saves. At 4096 both together would take 0.93, but a search
  that ends without factors 0.037 for each rank. With a quarter of the tiles dense attention takes 1.06 to 1.15.
* On one thread of a Xeon PyTorch's fused triangle attention takes 1.7 to 3.2 times as long with factors of rank 32 as
  with the dense bias, and at rank 4 still 1.08 times or more. For attention of single tokens making them takes 17 times
  as long as attention or more.

Heads that stay dense beside factors are dense tiles to the kernels. ``auto`` asks the tables what these cost; where a
user names a method, heads that miss the tolerance keep their bias without asking.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from pairformer_fast.bias.certificate import TILE, Certificate
from pairformer_fast.bias.costs import FORMS, measured_costs
from pairformer_fast.bias.factors import BiasFactors
from pairformer_fast.bias.methods import (
    Candidate,
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

AUTO_METHOD = BiasMethod.RANDOMISED
"""What ``auto`` makes factors with: of all methods the one that takes least time to make them."""

LARGEST_LOSS = 0.03
"""Largest share of the time of attention that ``auto`` may spend on factors which it then does not take."""

LARGEST_RANK_SHARE = 0.5
"""A head keeps its dense bias if a tolerance asks for a rank above this share of N.

Factors of rank R lengthen every dot product from D to D + R and are 2 N R numbers where the table is N^2: from
R = N / 2 on they are no smaller than the bias they replace.
"""


@dataclass(frozen=True)
class Plan:
    """What factors may be tried before the bias is looked at.

    Attributes
    ----------
    ranks : list of int
        Ascending; empty if the bias stays dense whatever it is.
    reason : str
        Why it stays dense, or does if every head misses the tolerance at these ranks.
    """

    ranks: list[int]
    reason: str

    @classmethod
    def of(cls, config: AttentionConfig, q: Tensor, form: str) -> Plan:
        """Plan for attention of one of :data:`~pairformer_fast.bias.costs.FORMS`, of as many tokens as ``q`` has."""
        tokens = q.shape[-3]
        limit = int(LARGEST_RANK_SHARE * tokens)
        if config.bias is BiasMethod.AUTO:
            return _paying(config.rank, limit, chosen_backend(config.backend, q), q.device.type, form, tokens)
        ranks = _ladder(limit) if config.rank is None else [min(config.rank, tokens)]
        return cls(ranks, f"no head is within the tolerance at a rank up to {limit}, half of the tokens")


def _ladder(limit: int) -> list[int]:
    return full_ladder(limit) if limit else []


@torch.compiler.assume_constant_result
def _paying(rank: int | None, limit: int, backend: Backend, device: str, form: str, tokens: int) -> Plan:
    """The plan of ``auto``: of the given rank, or of all up to a limit, those that pay."""
    return _by_costs(rank, limit, backend, device, form, tokens)


@cache
def _by_costs(rank: int | None, limit: int, backend: Backend, device: str, form: str, tokens: int) -> Plan:
    costs = measured_costs(backend, device)
    if costs is None:
        return Plan([], f"what factors cost with backend '{backend}' on {device} was not measured")
    ranks = [one for one in (_ladder(limit) if rank is None else [rank]) if one <= limit]
    times = {one: time for one in ranks if (time := costs.factors(form, tokens, one)) is not None}
    if not times:
        return Plan([], f"no measured rank that could be tried is at most {limit}, half of the tokens")
    making, least = costs.making(form, tokens), min(times, key=lambda one: times[one])
    predicted = (
        f"{form} attention of {tokens} tokens with factors of rank {least} would take {times[least]:.2f} of the time "
        f"with the dense bias, and making them {making:.2f} (measured on {costs.device})"
    )
    paying: list[int] = []
    for one, time in times.items():
        if time + (len(paying) + 1) * making < 1:
            paying.append(one)
    if not paying:
        return Plan([], predicted)
    if len(paying) * making > LARGEST_LOSS:
        return Plan([], f"{predicted}: a search of {len(paying)} ranks in vain would lose more than {LARGEST_LOSS:.0%}")
    return Plan(paying, f"no head is within the tolerance at a rank up to {paying[-1]}, the largest that pays")


@dataclass(frozen=True, eq=False)
class Factorization:
    """Outcome of :func:`factorize`.

    Attributes
    ----------
    bias : Tensor
        The dense bias, ``[B, H, N, N]``.
    factors : BiasFactors, optional
        What replaces it; None if the dense bias was kept. Heads that keep theirs have all tiles dense.
    probed : ProbedError, optional
        Measured error of the factors; None without them.
    reason : str, optional
        Why the dense bias was kept; None with factors.
    """

    bias: Tensor
    factors: BiasFactors | None = None
    probed: ProbedError | None = None
    reason: str | None = None

    @property
    def for_attention(self) -> Tensor | BiasFactors:
        """What attention should take as its bias."""
        return self.bias if self.factors is None else self.factors


def keeps_dense(config: AttentionConfig, q: Tensor) -> bool:
    """Whether the bias stays dense whatever it is, in any form of attention of as many tokens as ``q`` has."""
    if config.bias is BiasMethod.AUTO:
        return not any(Plan.of(config, q, form).ranks for form in FORMS.values())
    return config.bias is BiasMethod.DENSE


@torch.no_grad()
def factorize(
    bias: Tensor, config: AttentionConfig, q: Tensor, k: Tensor, mask: Tensor | None, start: Tensor | None = None
) -> Factorization:
    """Do with a pair bias as ``config`` asks; :func:`pairformer_fast.bias.methods.factorize` makes the factors only.

    ``svd``, ``randomised``, ``structured`` and ``landmark`` take ``config.rank`` (at most N), or the least rank of
    :data:`~pairformer_fast.bias.methods.RANK_LADDER` per head whose error is within ``config.tolerance``. Heads that
    miss it at every rank up to :data:`LARGEST_RANK_SHARE` of N keep the dense bias, the others have factors. ``auto``
    does so by :data:`AUTO_METHOD` with the ranks that pay (:class:`Plan`), keeps the dense bias if there are none, and
    in all heads if attention with some dense heads would take longer than with all. The error is the probed mean
    total variation, or the certificate's bound if ``config.certified``.

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
        If the bias is NaN or infinite where both tokens are kept; one that stays dense by plan is not looked at.
    """
    if config.bias is BiasMethod.DENSE:
        return Factorization(bias, reason="asked for")
    automatic, form = config.bias is BiasMethod.AUTO, FORMS[q.ndim]
    method = AUTO_METHOD if automatic else checked_method(config.bias)
    plan = Plan.of(config, q, form)
    if not plan.ranks:
        return Factorization(bias, reason=plan.reason)
    check_finite(bias, mask)

    with torch.autocast(bias.device.type, enabled=False):
        probe = Probe(q, k, bias, mask)
        error = certified_error(bias, mask) if config.certified else probed_error(probe)
        at_rank = candidates(bias, method, mask, start=None if config.rank is None else start)
        if config.rank is not None and not automatic:
            chosen = at_rank(plan.ranks[0])
            met = torch.ones_like(chosen.rank, dtype=torch.bool)
        else:
            chosen, met = least_rank(at_rank, plan.ranks, error, config.tolerance)
        if not met.any():
            return Factorization(bias, reason=plan.reason)
        if met.all():
            factors = chosen.certified(bias, mask)
            return Factorization(bias, factors, probe.error(factors.phi_q, factors.phi_k, factors.table))
        chosen = chosen.without(~met)
        if automatic and (slower := _slower_mixed(config, q, form, chosen, ~met)):
            return Factorization(bias, reason=slower)
        probed = probe.error(chosen.phi_q, chosen.phi_k, chosen.table)
        return _mixed(bias, chosen.certified(bias, mask), probed, ~met)


def _slower_mixed(config: AttentionConfig, q: Tensor, form: str, chosen: Candidate, dense: Tensor) -> str | None:
    """Why all heads are better left dense than some (``dense``, bool ``[B, H]``); None if they are not."""
    costs = measured_costs(chosen_backend(config.backend, q), q.device.type)
    share, rank = float(dense.float().mean()), chosen.phi_q.shape[-1]
    mixed = None if costs is None else costs.mixed(form, q.shape[-3], rank, share)
    if mixed is not None and mixed < 1:
        return None
    time = "a time that was not measured" if mixed is None else f"{mixed:.2f} of the time of the dense bias"
    return f"{share:.0%} of the heads miss the tolerance, and with these dense attention would take {time}"


def _mixed(bias: Tensor, factors: BiasFactors, probed: ProbedError, dense: Tensor) -> Factorization:
    """Factors in some heads, every tile of the others (``dense``, bool ``[B, H]``) dense, which is exact."""
    tiles = -(-bias.shape[-1] // TILE)
    certificate = Certificate(
        factors.certificate.eps_row.masked_fill(dense[..., None], 0),
        factors.certificate.eps_tile.masked_fill(dense[..., None, None], 0),
    )
    flags = dense[..., None, None].expand(-1, -1, tiles, tiles).contiguous()
    mixed = replace(factors, certificate=certificate, dense=bias, dense_tiles=flags)
    exact = ProbedError(*(error.masked_fill(dense, 0) for error in (probed.mean, probed.std, probed.max)))
    return Factorization(bias, mixed, exact)
