"""Inputs of one case of the attention benchmark, and the fp64 computation that results are held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor

TILE = 64
TABLE_WIDTH = 32
BIAS_STD = 2.0
SAMPLED_ROWS = 4
CHUNKED_SCORES = 2**25
"""Scores that the fp64 computation holds at once."""


class Kind(StrEnum):
    """Form in which an implementation is given the pair bias."""

    NONE = "no bias"
    FACTORS = "factors"
    STRUCTURED = "structured"
    MIXED = "mixed"
    DENSE = "dense"


@dataclass(frozen=True)
class Case:
    """One shape and direction; ``rows`` is I of triangle attention, None for single attention."""

    section: str
    direction: str
    n: int
    rows: int | None
    heads: int = 4
    dim: int = 32
    rank: int = 32
    dtype: torch.dtype = torch.bfloat16
    dense_share: float = 0.25
    masked: bool = False
    kinds: tuple[Kind, ...] = (Kind.NONE, Kind.FACTORS, Kind.MIXED, Kind.DENSE)
    peers: bool = True

    @property
    def op(self) -> str:
        return "single_attention" if self.rows is None else "triangle_attention"

    @property
    def backward(self) -> bool:
        return self.direction == "fwdbwd"


@dataclass(frozen=True)
class Expected:
    """fp64 results: output and gradients of q, k, v in the sampled rows, gradient of the bias summed over all rows."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    bias: dict[str, Tensor]


@dataclass
class Problem:
    """Inputs of a case: q, k, v, dout ``[I, N, H, D]``, factors ``[H, N, R]``, dense tables ``[H, N, N]``.

    ``dense`` is the product of the factors rounded to their dtype, so that dense and factor forms compute the same
    function. ``mixed`` differs from it: an implementation that ignores the flags is found out.
    """

    case: Case
    device: torch.device
    _expected: dict[Kind, Expected] = field(default_factory=dict)

    def __post_init__(self) -> None:
        case, shape = self.case, (self.case.rows or 1, self.case.n, self.case.heads, self.case.dim)
        self.generator = torch.Generator(self.device).manual_seed(1)
        self.q, self.k, self.v = (self._normal(shape) for _ in range(3))
        self.dout = self._normal(shape) if case.backward else None
        scale = (BIAS_STD / case.rank**0.5) ** 0.5
        self.phi_q, self.phi_k = (self._normal((case.heads, case.n, case.rank), scale) for _ in range(2))
        self.table = self._normal((case.heads, 2 * TABLE_WIDTH + 1))
        tiles = -(-case.n // TILE)
        drawn = torch.rand((case.heads, tiles, tiles), device=self.device, generator=self.generator)
        self.dense_tiles = drawn < case.dense_share
        kept = int(0.85 * case.n) if case.masked else case.n
        self.mask = (torch.arange(case.n, device=self.device) < kept) if case.masked else None
        self.rows = torch.linspace(0, shape[0] - 1, min(SAMPLED_ROWS, shape[0])).long().tolist()

    @cached_property
    def dense(self) -> Tensor:
        return self.phi_q @ self.phi_k.mT

    @cached_property
    def mixed(self) -> Tensor:
        return self._normal(self.dense.shape, BIAS_STD)

    def expected(self, kind: Kind) -> Expected:
        """What an implementation should give that has the bias as ``kind``."""
        if kind not in self._expected:
            self._expected[kind] = self._compute(kind)
        return self._expected[kind]

    def _normal(self, shape: tuple[int, ...], std: float = 1.0) -> Tensor:
        drawn = torch.empty(shape, dtype=self.case.dtype, device=self.device)
        return drawn.normal_(0.0, std, generator=self.generator)

    @cached_property
    def _offsets(self) -> Tensor:
        tokens = torch.arange(self.case.n, device=self.device)
        return (tokens[:, None] - tokens).clamp(-TABLE_WIDTH, TABLE_WIDTH) + TABLE_WIDTH  # [N, N]

    @cached_property
    def _flagged(self) -> Tensor:
        flagged = self.dense_tiles.repeat_interleave(TILE, -1).repeat_interleave(TILE, -2)
        return flagged[:, : self.case.n, : self.case.n]  # [H, N, N]

    def _bias(self, kind: Kind) -> Tensor | None:
        if kind is Kind.NONE:
            return None
        if kind is Kind.DENSE:
            return self.dense.double()
        bias = self.phi_q.double() @ self.phi_k.double().mT
        if kind is Kind.STRUCTURED:
            bias += self.table.double()[:, self._offsets]
        return torch.where(self._flagged, self.mixed.double(), bias) if kind is Kind.MIXED else bias

    def _compute(self, kind: Kind) -> Expected:
        bias = self._bias(kind)
        sampled: dict[str, list[Tensor]] = {"out": [], "dq": [], "dk": [], "dv": []}
        for row in self.rows:
            q, k, v = self._doubled((self.q, self.k, self.v), row, row + 1)
            weights = self._weights(q, k, bias)
            sampled["out"].append(weights @ v)
            if self.dout is not None:
                (dout,) = self._doubled((self.dout,), row, row + 1)
                dscores = _gradient_of_scores(weights, dout, v)
                sampled["dq"].append(dscores @ k * self.case.dim**-0.5)
                sampled["dk"].append(dscores.mT @ q * self.case.dim**-0.5)
                sampled["dv"].append(weights.mT @ dout)
        none = torch.empty(0)
        stacked = {name: torch.cat(values).transpose(1, 2) if values else none for name, values in sampled.items()}
        if bias is None or self.dout is None:
            return Expected(**stacked, bias={})
        dbias = torch.zeros_like(bias)
        chunk = max(1, CHUNKED_SCORES // bias.numel())
        for row in range(0, self.q.shape[0], chunk):
            q, k, v, dout = self._doubled((self.q, self.k, self.v, self.dout), row, row + chunk)
            dbias += _gradient_of_scores(self._weights(q, k, bias), dout, v).sum(0)
        return Expected(**stacked, bias=self._bias_gradients(kind, dbias))

    def _doubled(self, tensors: tuple[Tensor, ...], start: int, stop: int) -> list[Tensor]:
        """Rows of ``tensors``, fp64 ``[I, H, N, D]``."""
        return [x[start:stop].double().transpose(1, 2) for x in tensors]

    def _weights(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        scores = (q @ k.mT).mul_(self.case.dim**-0.5)  # [I, H, N, N]
        if bias is not None:
            scores += bias
        if self.mask is not None:
            scores.masked_fill_(~self.mask, -torch.inf)
        return scores.softmax(-1)

    def _bias_gradients(self, kind: Kind, dbias: Tensor) -> dict[str, Tensor]:
        if kind is Kind.DENSE:
            return {"bias": dbias}
        gradients = {}
        low_rank = dbias
        if kind is Kind.MIXED:
            gradients["dense"] = dbias * self._flagged
            low_rank = dbias * ~self._flagged
        if kind is Kind.STRUCTURED:
            table = torch.zeros(self.table.shape, dtype=torch.float64, device=self.device)
            gradients["table"] = table.index_add_(1, self._offsets.flatten(), dbias.flatten(1))
        gradients["phi_q"] = low_rank @ self.phi_k.double()
        gradients["phi_k"] = low_rank.mT @ self.phi_q.double()
        return gradients


def _gradient_of_scores(weights: Tensor, dout: Tensor, v: Tensor) -> Tensor:
    dweights = dout @ v.mT
    return dweights.sub_((weights * dweights).sum(-1, keepdim=True)).mul_(weights)
