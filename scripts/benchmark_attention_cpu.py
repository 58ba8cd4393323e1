"""The suite ``attention-cpu``: attention by the form of its bias, and making factors, with one thread of a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmark_attention import identity, relative_errors
from benchmark_implementations import Prepared
from benchmark_problem import Case, Kind, Problem
from benchmark_rows import machine
from torch import Tensor

from pairformer_fast.bias.policy import factorize
from pairformer_fast.config import AttentionConfig, Backend, BiasMethod
from pairformer_fast.kernels.flash_bias import Factors, flash_bias_attention

SIZES = (128, 256, 512, 1024)
ROWS = 64
"""Rows of triangle attention that are computed; the time of all N is N / ROWS times as long."""
RANKS, SHARES, RANKS_N = (4, 8, 16, 32, 64, 96, 128), (0.0, 0.1, 0.25, 0.5, 1.0), 1024
METHODS = (BiasMethod.RANDOMISED, BiasMethod.SVD)
REPEATS = 5
LARGEST_ERROR = 1e-3


def attention_cpu_rows(sizes: tuple[int, ...], commit: str | None) -> Iterator[dict[str, Any]]:
    """One row for each case and form of the bias, then one for each way to make factors; CPU time of one thread.

    Raises
    ------
    ValueError
        If a result is wrong.
    """
    torch.set_num_threads(1)
    origin = machine(commit)
    for case in _cases(sizes):
        problem = Problem(case, torch.device("cpu"))
        for kind in case.kinds:
            row = identity(case, f"pairformer_fast {kind}", kind) | _measured(problem, kind)
            yield {"suite": "attention_cpu", **row, **origin}
    for n in sizes:
        for form, case in {"triangle": _triangle("making", n), "single": _single("making", n)}.items():
            problem = Problem(case, torch.device("cpu"))
            for method in METHODS:
                name = f"pairformer_fast {method}, checked and certified"
                row = (
                    identity(case, name, Kind.FACTORS)
                    | {"op": "factorisation", "form": form}
                    | _times(_making(problem, method))
                )
                yield {"suite": "attention_cpu", **row, **origin}


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    what = f"{row['section']} {row['op']} n={row['n']} rank={row['rank']} share={row['dense_share']} {row['impl']}"
    return f"{what} {row['ms_median']:.4g} ms"


def _triangle(section: str, n: int, **more: Any) -> Case:
    return Case(section, "fwd", n, min(n, ROWS), dtype=torch.float32, **more)


def _single(section: str, n: int) -> Case:
    return Case(section, "fwd", n, None, heads=16, dim=24, dtype=torch.float32)


def _cases(sizes: tuple[int, ...]) -> Iterator[Case]:
    for n in sizes:
        yield _triangle("sizes", n)
        yield _single("single", n)
    for rank in RANKS:
        yield _triangle("ranks", RANKS_N, rank=rank, kinds=(Kind.FACTORS,))
    for share in SHARES:
        yield _triangle("shares", RANKS_N, dense_share=share, kinds=(Kind.MIXED,))


def _measured(problem: Problem, kind: Kind) -> dict[str, Any]:
    q, k, v = (x if problem.case.rows is None else x.unsqueeze(0) for x in (problem.q, problem.k, problem.v))
    bias = _bias(problem, kind)

    def attend() -> Tensor:
        return flash_bias_attention(q, k, v, bias, None, Backend.TORCH)

    prepared = Prepared(attend, {}, lambda x: x, lambda x: x.view(problem.q.shape), None)
    error = relative_errors(problem, kind, prepared, prepared.run())["out"]
    if not error <= LARGEST_ERROR:
        raise ValueError(f"{kind} at n = {problem.case.n}: relative error {error:.2g} > {LARGEST_ERROR}")
    return {"rel_error": error} | _times(prepared.run)


def _bias(problem: Problem, kind: Kind) -> Tensor | Factors | None:
    phi_q, phi_k, dense, flags = (
        x.unsqueeze(0) for x in (problem.phi_q, problem.phi_k, problem.dense, problem.dense_tiles)
    )
    match kind:
        case Kind.NONE:
            return None
        case Kind.DENSE:
            return dense
        case Kind.MIXED:
            return Factors(phi_q, phi_k, dense=problem.mixed.unsqueeze(0), dense_tiles=flags)
    return Factors(phi_q, phi_k)


def _making(problem: Problem, method: BiasMethod) -> Callable[[], object]:
    """Factors of one rank as a model makes them: finite or not, decomposed, probed and certified."""
    q, k = (x if problem.case.rows is None else x.unsqueeze(0) for x in (problem.q, problem.k))
    noise = 0.1 * torch.randn(problem.dense.shape, generator=torch.Generator().manual_seed(2))
    bias, config = (problem.dense + noise).unsqueeze(0), AttentionConfig(bias=method, rank=problem.case.rank)
    return lambda: factorize(bias, config, q, k, None)


def _times(call: Callable[[], object]) -> dict[str, Any]:
    call()
    times = []
    for _ in range(REPEATS):
        began = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - began))
    low, high = (statistics.quantiles(times, n=5)[at] for at in (0, -1))
    return {"timing": "cpu", "ms_median": statistics.median(times), "ms_p20": low, "ms_p80": high}
