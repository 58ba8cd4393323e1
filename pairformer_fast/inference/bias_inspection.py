"""What the pair bias of one attention is like, and what factors of it cost: spectrum, ranks, bound, error, tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from pairformer_fast.bias import BiasFactors, Decision
from pairformer_fast.bias.certificate import TILE, kept_pairs, kept_tokens
from pairformer_fast.bias.costs import FORMS, measured_costs
from pairformer_fast.bias.methods import candidates, check_finite, factorize
from pairformer_fast.bias.policy import AUTO_METHOD
from pairformer_fast.bias.probe import Probe, ProbedError
from pairformer_fast.bias.svd import decompose
from pairformer_fast.bias.toeplitz import toeplitz
from pairformer_fast.config import Backend, BiasMethod, Frozen

RANKS = (4, 8, 16, 32, 64, 128)
"""Ranks of the ladder, as far as they are below N."""


class Spectrum(Frozen):
    """Singular values of a head's bias after subtracting every row's mean, which softmax ignores.

    Attributes
    ----------
    values : list of float
        Largest first, one for each token, to six digits.
    energy : list of float
        Share (0 to 1) of the sum of squares that the leading 1, 2, ... singular values hold.
    """

    values: list[float]
    energy: list[float]


class Quality(Frozen):
    """Error of factors, one entry a head.

    Attributes
    ----------
    rank : list of int
        Columns in use.
    eps : list of float
        Largest half range of the residual in a row.
    bound : list of float
        tanh(eps / 2), guaranteed bound on the total variation of attention weights.
    probed_mean, probed_std, probed_max : list of float
        Total variation (0 to 1) measured on sampled queries, and its spread over them. Never above the bound but for
        rounding of the attention weights, which shows where factors are exact.
    """

    rank: list[int]
    eps: list[float]
    bound: list[float]
    probed_mean: list[float]
    probed_std: list[float]
    probed_max: list[float]

    @classmethod
    def of(cls, factors: BiasFactors, probed: ProbedError) -> Quality:
        """Error of the first batch entry."""
        certificate = factors.certificate
        return cls(
            rank=factors.rank[0].tolist(),
            eps=certificate.eps[0].tolist(),
            bound=certificate.bound[0].tolist(),
            probed_mean=probed.mean[0].tolist(),
            probed_std=probed.std[0].tolist(),
            probed_max=probed.max[0].tolist(),
        )


class Rung(Quality):
    """Factors that ``method`` made when it was given ``at`` columns."""

    method: BiasMethod
    at: int


class TileMap(Frozen):
    """Where the residual of a head's factors is large.

    Attributes
    ----------
    deviation : list of list of float
        For each tile of :data:`TILE` x :data:`TILE` entries, the farthest that the residual is there from the median of
        its row, which softmax ignores. The largest of a map is one to two times the head's eps.
    dense : list of list of bool
        Tiles whose tanh(deviation / 2) is above the tolerance. With the residual at the median in these (dense tiles,
        shifted row by row) the certificate is within the tolerance.
    """

    deviation: list[list[float]]
    dense: list[list[bool]]


class PredictedCost(Frozen):
    """Time of this attention where it ran, relative to that with the dense bias; what ``auto`` decides by.

    Attributes
    ----------
    device : str
        Where :class:`~pairformer_fast.bias.costs.AttentionCosts` was measured.
    factors : float or None
        With the factors; None above the ranks measured.
    mixed : float or None
        With those tiles dense whose bound is above the tolerance.
    making : float
        What making factors of one rank takes on top.
    """

    device: str
    factors: float | None
    mixed: float | None
    making: float


class AttentionInspection(Frozen):
    """One attention with a pair bias; lists have one entry a head.

    Attributes
    ----------
    name : str
        Path of the module within the model.
    tokens, heads : int
        N and H.
    backend, choice : str
        What computed attention, and whether it took ``factors`` or the ``dense`` bias.
    dense_heads : list of int
        Which heads kept the dense bias.
    reason : str or None
        Why the bias stayed dense; None with factors.
    used : Quality
        Of what it took; a dense bias has rank N and no error.
    factors_method : BiasMethod
        What made ``factors``.
    factors : Quality
        Of the factors that the tiles are about: those taken, or those that a dense bias, of all heads or of some,
        stands for: of the given rank, or of the least rank within the tolerance.
    spectrum : list of Spectrum
    ladder : list of Rung
        Error by method and rank.
    tiles : list of TileMap
        Of ``factors``.
    predicted_cost : PredictedCost or None
        Of ``factors``, alone and with these tiles; None where nothing was measured.
    """

    name: str
    tokens: int
    heads: int
    backend: str
    choice: str
    dense_heads: list[int]
    reason: str | None
    used: Quality
    factors_method: BiasMethod
    factors: Quality
    spectrum: list[Spectrum]
    ladder: list[Rung]
    tiles: list[TileMap] = Field(description=f"{TILE} x {TILE} entries a tile")
    predicted_cost: PredictedCost | None

    @property
    def dense_share(self) -> float:
        """Share of the tiles of all heads that would stay dense, 0 to 1."""
        return _dense_share(self.tiles)


@torch.no_grad()
def inspect_decision(name: str, decision: Decision, methods: Sequence[BiasMethod]) -> AttentionInspection:
    """Measure the bias of one call of attention.

    Parameters
    ----------
    name : str
        Path of the attention module.
    decision : Decision
        The call, with a batch of one.
    methods : sequence of BiasMethod
        Those that the ladder is climbed with.

    Raises
    ------
    ValueError
        If the batch is larger, or the bias is NaN or infinite where both tokens are kept.
    """
    bias, q, k, mask = decision.outcome.bias, decision.q, decision.k, decision.mask
    if len(bias) != 1:
        raise ValueError(f"attention must have a batch of one to be inspected, but bias is {list(bias.shape)}")
    check_finite(bias, mask)
    config, outcome = decision.config, decision.outcome
    method = factor_method(config.bias)
    with torch.autocast(bias.device.type, enabled=False):
        probe = Probe(q, k, bias, mask)
        factors = outcome.factors
        if factors is None or factors.dense_heads.any():
            limit = {"tolerance": config.tolerance} if config.rank is None else {"rank": config.rank}
            factors = factorize(bias, method, **limit, certified=config.certified, q=q, k=k, mask=mask)
        probed = probe.error(factors.phi_q, factors.phi_k, factors.table)
        report = decision.report
        tiles = tile_maps(bias, factors, mask, config.tolerance)
        return AttentionInspection(
            name=name,
            tokens=bias.shape[-1],
            heads=bias.shape[1],
            backend=report.backend,
            choice=report.choice,
            dense_heads=list(report.dense_heads),
            reason=report.reason,
            used=Quality(**{field: list(getattr(report, field)) for field in Quality.model_fields}),
            factors_method=method,
            factors=Quality.of(factors, probed),
            spectrum=_spectrum(bias, mask),
            ladder=[rung for method in methods for rung in _climb(method, bias, probe, mask)],
            tiles=tiles,
            predicted_cost=_predicted_cost(Backend(report.backend), q, factors.phi_q.shape[-1], _dense_share(tiles)),
        )


def factor_method(method: BiasMethod) -> BiasMethod:
    """What makes factors under ``method``: ``svd`` where a dense bias is only to be judged."""
    if method is BiasMethod.AUTO:
        return AUTO_METHOD
    return BiasMethod.SVD if method is BiasMethod.DENSE else method


def tile_maps(bias: Tensor, factors: BiasFactors, mask: Tensor | None, tolerance: float) -> list[TileMap]:
    """Where factors are far from a bias ``[1, H, N, N]``, head by head.

    Parameters
    ----------
    bias : Tensor
        Dense.
    factors : BiasFactors
        In its place.
    mask : Tensor, optional
        Bool ``[1, I, N]`` or ``[1, N]``, True = keep. Padding counts neither as query nor as key.
    tolerance : float
        Largest bound on the change of attention weights that a tile of factors may cause, 0 to 1.
    """
    tokens = bias.shape[-1]
    residual = bias[0].double() - factors.phi_q[0].double() @ factors.phi_k[0].double().mT
    if factors.table is not None:
        residual -= toeplitz(factors.table.double(), tokens)
    dropped = ~kept_pairs(kept_tokens(mask, bias))[0]
    middle = residual.masked_fill(dropped, torch.nan).nanmedian(-1, keepdim=True).values
    distance = (residual - middle).abs().masked_fill(dropped, 0)
    count = -(-tokens // TILE)
    fill = count * TILE - tokens
    padded = torch.nn.functional.pad(distance, (0, fill, 0, fill))
    deviation = padded.unflatten(2, (count, TILE)).unflatten(1, (count, TILE)).amax((2, 4))
    dense = torch.tanh(deviation / 2) > tolerance
    return [TileMap(deviation=x, dense=d) for x, d in zip(deviation.tolist(), dense.tolist(), strict=True)]


def _dense_share(tiles: list[TileMap]) -> float:
    flags = [flag for tile_map in tiles for row in tile_map.dense for flag in row]
    return sum(flags) / len(flags)


def _predicted_cost(backend: Backend, q: Tensor, rank: int, dense_share: float) -> PredictedCost | None:
    costs, form, tokens = measured_costs(backend, q.device.type), FORMS[q.ndim], q.shape[-3]
    if costs is None:
        return None
    return PredictedCost(
        device=costs.device,
        factors=costs.factors(form, tokens, rank),
        mixed=costs.mixed(form, tokens, rank, dense_share),
        making=costs.making(form, tokens),
    )


def _spectrum(bias: Tensor, mask: Tensor | None) -> list[Spectrum]:
    values = decompose(bias, mask).values[0]
    squares = values.square().cumsum(-1)
    total = squares[:, -1:]
    energy = torch.where(total > 0, squares / total, 1.0)
    rounded = [[[float(f"{x:.6g}") for x in row] for row in table.tolist()] for table in (values, energy)]
    return [Spectrum(values=v, energy=e) for v, e in zip(*rounded, strict=True)]


def _climb(method: BiasMethod, bias: Tensor, probe: Probe, mask: Tensor | None) -> list[Rung]:
    tokens = bias.shape[-1]
    at_rank = candidates(bias, method, mask)
    rungs = []
    for rank in [rank for rank in RANKS if rank < tokens] or [tokens]:
        candidate = at_rank(rank)
        probed = probe.error(candidate.phi_q, candidate.phi_k, candidate.table)
        quality = Quality.of(candidate.certified(bias, mask), probed)
        rungs.append(Rung(method=method, at=rank, **quality.model_dump()))
    return rungs
