"""Time, memory and error of making rank-R factors of a pair bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from benchmark_attention import Meter
from benchmark_gpu import NotCaptured, describe
from benchmark_rows import machine
from torch import Tensor

from pairformer_fast.bias import factorize
from pairformer_fast.bias.randomised import factorize_randomised

HEADS, BIAS_STD = 4, 2.0
DECAY = 0.75
"""Singular values fall as k^-DECAY, about as those of the bundled model's triangle attentions."""
CHANGE = 0.2
"""By how much, relative to its norm, a bias differs from that of the recycle before."""
RANKS = (16, 32, 64)
"""At SLOW_N; 32 at other N."""
SLOW_N = 1024
"""Largest N at which an exact decomposition is measured."""
LARGEST_EXCESS = 0.05
"""Of our error above the least one, by issue and documentation."""
TARGET_MS = {(1024, 32): 0.15}

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """A bias ``[1, HEADS, N, N]``, ``phi_k`` of the one before it, and the least error of a rank."""

    n: int
    rank: int
    bias: Tensor
    before: Tensor
    values: Tensor

    @classmethod
    def make(cls, n: int, rank: int, dtype: torch.dtype, device: torch.device) -> Problem:
        """Draw the bias, the same for every rank."""
        generator = torch.Generator(device).manual_seed(0)

        def drawn() -> Tensor:
            return torch.randn(1, HEADS, n, n, generator=generator, device=device)

        falling = torch.arange(1, n + 1, device=device) ** -DECAY
        bias, change = drawn() * falling @ drawn(), drawn()
        before = bias + CHANGE * change * bias.norm() / change.norm()
        bias, before = ((BIAS_STD * x / bias.std()).to(dtype) for x in (bias, before))
        table = centred(bias).double()
        values = torch.linalg.eigvalsh(table.mT @ table).clamp(min=0).flip(-1)
        return cls(n, rank, bias, factorize_randomised(before, None, rank).phi_k, values)

    def excess(self, factors: Factors) -> float:
        """Frobenius error above the least one of the rank, relative to that; the worst of the heads."""
        phi_q, phi_k = (x.double() for x in factors)
        found = torch.linalg.vector_norm(centred(self.bias).double() - phi_q @ phi_k.mT, dim=(-2, -1))
        return float((found / self.values[..., self.rank :].sum(-1).sqrt()).amax()) - 1


def centred(bias: Tensor) -> Tensor:
    """The bias in fp32 less the mean of each row, which softmax ignores."""
    return bias.float() - bias.float().mean(-1, keepdim=True)


def _randomised(problem: Problem) -> Factors:
    return factorize_randomised(problem.bias, None, problem.rank)[:2]


def _warm(problem: Problem) -> Factors:
    return factorize_randomised(problem.bias, None, problem.rank, start=problem.before)[:2]


def _certified(problem: Problem) -> Factors:
    factors = factorize(problem.bias, "randomised", rank=problem.rank)
    return factors.phi_q, factors.phi_k


def _lowrank(problem: Problem) -> Factors:
    left, values, right = torch.svd_lowrank(centred(problem.bias), q=problem.rank, niter=2)
    return left * values.unsqueeze(-2), right


def _exact(problem: Problem) -> Factors:
    left, values, right = torch.linalg.svd(centred(problem.bias))
    rank = problem.rank
    return left[..., :rank] * values[..., None, :rank], right.mT[..., :rank]


IMPLEMENTATIONS: dict[str, Callable[[Problem], Factors]] = {
    "pairformer_fast randomised": _randomised,
    "pairformer_fast randomised, from the recycle before": _warm,
    "pairformer_fast randomised, checked and certified": _certified,
    "torch.svd_lowrank": _lowrank,
    "torch.linalg.svd": _exact,
}


EAGER_ONLY = ("pairformer_fast randomised, checked and certified", "torch.svd_lowrank", "torch.linalg.svd")
"""No CUDA graph is tried of what waits for the device: after a capture that failed, ``torch.svd_lowrank`` could not
draw its random numbers ("Offset increment outside graph capture") even outside a capture."""


def factorisation_rows(
    sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, meter: Meter, commit: str | None
) -> Iterator[dict[str, Any]]:
    """One row for each size, rank and implementation, as soon as it is measured."""
    origin = machine(commit)
    for n in sizes:
        for rank in RANKS if n == SLOW_N else (32,):
            problem = Problem.make(n, rank, dtype, device)
            for name, implementation in IMPLEMENTATIONS.items():
                if implementation is _exact and n > SLOW_N:
                    continue
                row = {"suite": "factorisation", "op": "factorisation", "impl": name, "n": n, "batch": 1}
                row |= {"heads": HEADS, "rank": rank, "dtype": str(dtype).removeprefix("torch.")}
                yield {**row, **measure(problem, name, meter), **origin}


def measure(problem: Problem, name: str, meter: Meter) -> dict[str, Any]:
    """Error and times of one implementation; ``error`` in place of a speed where ours is beyond its limit."""

    def call() -> Factors:
        return IMPLEMENTATIONS[name](problem)

    def fault(factors: Factors) -> str:
        excess = problem.excess(factors)
        limit = LARGEST_EXCESS if name.startswith("pairformer_fast") else 1.0
        return "" if excess <= limit else f"{excess:.1%} above the least error"

    try:
        factors = call()
        found: dict[str, Any] = {"excess_error": problem.excess(factors), "peak_bytes": meter.peak_bytes(call)}
        if wrong := fault(factors):
            return found | {"error": wrong}
        timing = eager = meter.eager(call)
        found |= {"ms_eager": eager.median, "timing": "graph"}
        if name in EAGER_ONLY:
            found["timing"] = "eager"
        else:
            try:
                timing = meter.graph(call, fault)
            except NotCaptured as error:
                found |= {"timing": "eager", "graph_error": str(error)}
    except Exception as error:
        return {"error": describe(error)}
    target = TARGET_MS.get((problem.n, problem.rank)) if name == "pairformer_fast randomised" else None
    return {**found, "ms_median": timing.median, "ms_p20": timing.p20, "ms_p80": timing.p80, "target_ms": target}


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    what = f"n={row['n']} rank={row['rank']} {row['impl']}"
    if "error" in row:
        return f"{what} ERROR {row['error']}"
    target = "" if row["target_ms"] is None else f", target {row['target_ms']:g} ms"
    times = f"{row['ms_median']:.4g} ms as {row['timing']}, {row['ms_eager']:.4g} ms eager{target}"
    return f"{what} {times}, {row['excess_error']:.1%} above the least error"
