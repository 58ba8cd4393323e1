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
        dbias = None if bias is None else torch.zeros_like(bias)
        needed = range(self.q.shape[0]) if self.dout is not None and dbias is not None else self.rows
        scale = self.case.dim**-0.5
        for row in needed:
            q, k, v = (x[row].double().transpose(0, 1) for x in (self.q, self.k, self.v))  # [H, N, D]
            scores = (q @ k.mT).mul_(scale)
            if bias is not None:
                scores += bias
            if self.mask is not None:
                scores.masked_fill_(~self.mask, -torch.inf)
            weights = scores.softmax(-1)  # [H, N, N]
            results = {"out": weights @ v}
            if self.dout is not None:
                dout = self.dout[row].double().transpose(0, 1)
                dscores = dout @ v.mT
                dscores = weights * dscores.sub_((weights * dscores).sum(-1, keepdim=True))
                results |= {"dq": dscores @ k * scale, "dk": dscores.mT @ q * scale, "dv": weights.mT @ dout}
                if dbias is not None:
                    dbias += dscores
            if row in self.rows:
                for name, value in results.items():
                    sampled[name].append(value.transpose(0, 1))
        none = torch.empty(0)
        stacked = {name: torch.stack(values) if values else none for name, values in sampled.items()}
        gradients = {} if dbias is None or self.dout is None else self._bias_gradients(kind, dbias)
        return Expected(**stacked, bias=gradients)

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
