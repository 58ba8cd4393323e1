"""Time, memory and error of attention with a pair bias, ours and its peers', in one run on one GPU."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from benchmark_gpu import Ceilings, NotCaptured, Stopwatch, Timing, describe, release
from benchmark_implementations import Implementation, Prepared
from benchmark_problem import Case, Kind, Problem
from benchmark_rows import machine, read_rows, write_rows
from benchmark_selection import Selection
from benchmark_targets import print_summary
from torch import Tensor

EAGER_SECTIONS, EAGER_N = ("targets", "sizes"), 768
"""Where the time of the plain Python call is measured too: up to this N it can be the host's."""


class Limits(NamedTuple):
    """Largest accepted relative errors (Frobenius norm) of the output, of dq, dk, dv and of the bias's gradient."""

    out: float
    gradient: float
    bias: float


LIMITS = {
    torch.bfloat16: Limits(0.015, 0.03, 0.1),
    torch.float16: Limits(0.003, 0.006, 0.03),
    torch.float32: Limits(1e-3, 2e-3, 5e-3),
}


class Meter(Protocol):
    """What measures a call: a :class:`benchmark_gpu.Stopwatch`, or a stand-in where there is no GPU."""

    def graph(self, call: Any, fault: Any) -> Timing: ...

    def eager(self, call: Any) -> Timing: ...

    def peak_bytes(self, call: Any) -> int: ...


def run(selection: Selection, output: Path, commit: str | None, resume: bool, deadline: float) -> list[str]:
    """Measure and write after every row; return the names of our own rows without a valid result.

    No row is begun after ``deadline`` (of :func:`time.monotonic`).

    Raises
    ------
    DeviceLost
        If an implementation destroyed the CUDA context. Its row is written; a fresh process can resume.
    """
    rows: list[dict[str, Any]] = read_rows(output) if resume else []
    done = {_key(row) for row in rows}
    origin = machine(commit)
    stopwatch = Stopwatch()

    def add(row: dict[str, Any], began: float) -> None:
        rows.append({"suite": "attention", **row, **origin})
        write_rows(output, rows)
        print(f"{_line(row)} [{time.monotonic() - began:.1f} s]", flush=True)

    gc.freeze()  # what is imported by now need not be searched after every row
    began = time.monotonic()
    ceilings = Ceilings.measure(stopwatch)
    if not done:
        for row in ceilings.rows():
            add(row, began)
    left = 0
    for case in selection.cases():
        began = time.monotonic()
        for kind in (Kind.NONE, Kind.FACTORS, Kind.DENSE) if case.peers else ():
            floor = identity(case, "floor", kind) | {"op": "floor"} | ceilings.floor(case, kind)
            if _key(floor) not in done:
                add(floor, began)
        chosen = [
            one for one in selection.implementations(case) if _key(identity(case, one.name, one.kind)) not in done
        ]
        problem = None
        for position, implementation in enumerate(chosen):
            began = time.monotonic()
            if began > deadline:
                left += len(chosen) - position
                break
            problem = problem or Problem(case, torch.device("cuda"))
            add(measure(problem, implementation, stopwatch), began)
            release()
        del problem
        release()
    if left:
        print(f"out of time: {left} rows not measured; --resume measures them")
    if any(row.get("section") == "targets" for row in rows):
        print_summary(rows)
    return [_line(row) for row in rows if row["impl"].startswith("pairformer_fast") and "error" in row]


def identity(case: Case, name: str, kind: Kind) -> dict[str, Any]:
    """Keys that say what was measured."""
    return {
        "section": case.section,
        "op": case.op,
        "impl": name,
        "bias": str(kind),
        "direction": case.direction,
        "n": case.n,
        "rows": case.rows,
        "batch": 1,
        "heads": case.heads,
        "dim": case.dim,
        "rank": case.rank if kind in (Kind.FACTORS, Kind.STRUCTURED, Kind.MIXED) else None,
        "dense_share": case.dense_share if kind is Kind.MIXED else None,
        "masked": case.masked,
        "dtype": str(case.dtype).removeprefix("torch."),
    }


def measure(problem: Problem, implementation: Implementation, meter: Meter) -> dict[str, Any]:
    """One row: errors against fp64, then time and memory; ``error`` in place of a speed where the result is wrong."""
    case = problem.case
    row = identity(case, implementation.name, implementation.kind) | {"version": implementation.version()}
    try:
        prepared = implementation.prepare(problem)
        errors = relative_errors(problem, implementation.kind, prepared, prepared.run())
        if wrong := _beyond_limits(case, errors):
            return row | {"error": f"wrong result: {wrong}"}
        row |= {"rel_error": errors.pop("out"), "gradient_errors": errors or None}
        row["gradients_checked_at"] = _checked(problem, implementation.kind) if case.backward else None
        row["peak_bytes"] = meter.peak_bytes(prepared.run)
        return row | _times(problem, implementation.kind, prepared, meter)
    except Exception as error:
        return row | {"error": describe(error)}


def _times(problem: Problem, kind: Kind, prepared: Prepared, meter: Meter) -> dict[str, Any]:
    """Times of graph replays, or of eager calls where the implementation cannot be captured."""

    def fault(result: Any) -> str:
        return _beyond_limits(problem.case, relative_errors(problem, kind, prepared, result))

    case, found = problem.case, {}
    try:
        timing = meter.graph(prepared.run, fault)
        found["timing"] = "graph"
    except NotCaptured as error:
        found |= {"timing": "eager", "graph_error": str(error)}
    if found["timing"] == "eager":
        timing = meter.eager(prepared.run)
        found["ms_eager"] = timing.median
    elif case.section in EAGER_SECTIONS and case.n <= EAGER_N:
        found["ms_eager"] = meter.eager(prepared.run).median
    return {"ms_median": timing.median, "ms_p20": timing.p20, "ms_p80": timing.p80, **found}


def _checked(problem: Problem, kind: Kind) -> dict[str, Any]:
    """What the gradients were compared at: q, k, v in sampled rows i, those of the bias summed over all rows."""
    checked: dict[str, Any] = {"n": problem.case.n, "rows": problem.rows}
    return checked if kind is Kind.NONE else checked | {"rows_of_bias": problem.q.shape[0]}


def relative_errors(
    problem: Problem, kind: Kind, prepared: Prepared, result: tuple[Tensor, dict[str, Tensor]]
) -> dict[str, float]:
    """Relative errors of output and gradients against fp64; infinite where anything is not finite."""
    expected = problem.expected(kind)
    out, gradients = result
    found = {"out": _error(prepared.unpack_out(out)[problem.rows], expected.out, out)}
    for name, gradient in gradients.items():
        if name in ("q", "k", "v"):
            sampled = prepared.unpack(gradient)[problem.rows]
            found[f"d{name}"] = _error(sampled, getattr(expected, f"d{name}"), gradient)
        else:
            want = expected.bias[name]
            found[f"d{name}"] = _error(gradient.reshape(want.shape), want, gradient)
    return found


def _error(got: Tensor, want: Tensor, whole: Tensor) -> float:
    if not torch.isfinite(whole.detach()).all():
        return float("inf")
    norm = want.norm()
    difference = (got.detach().double() - want).norm()
    return float(difference / norm) if norm > 0 else float(difference)


def _beyond_limits(case: Case, errors: dict[str, float]) -> str:
    limits = LIMITS[case.dtype]
    known = {"out": limits.out} | dict.fromkeys(("dq", "dk", "dv"), limits.gradient)
    bounds = [(name, error, known.get(name, limits.bias)) for name, error in errors.items()]
    beyond = [f"{name} {error:.2g} > {bound}" for name, error, bound in bounds if not error <= bound]
    return f"relative error of {', '.join(beyond)}" if beyond else ""


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("section", "op", "impl", "bias", "direction", "n", "rows", "rank", "dtype", "dense_share")
    return tuple(row.get(name) for name in names)


def _line(row: dict[str, Any]) -> str:
    if row["op"] == "ceiling":
        return f"ceiling {row['impl']}: {row['value']:.4g} {row['unit']}"
    name = f"floor, {row['bias']}" if row["op"] == "floor" else row["impl"]
    what = f"{row['section']} {row['direction']} n={row['n']} {name}"
    details = [f"{name}={row[name]}" for name in ("rank", "dense_share") if row[name] is not None]
    if "ms_median" in row:
        details.append(f"{row['ms_median']:.4g} ms")
    if row.get("timing") == "eager":
        details.append(f"(eager: {row['graph_error']})")
    elif "ms_eager" in row:
        details.append(f"({row['ms_eager']:.4g} ms eager)")
    if "peak_bytes" in row:
        details.append(f"{row['peak_bytes'] / 2**20:.0f} MiB")
    if "rel_error" in row:
        errors = {"out": row["rel_error"], **(row["gradient_errors"] or {})}
        details.append(" ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    return " ".join([what, *details, f"ERROR {row['error']}" if "error" in row else ""]).strip()
