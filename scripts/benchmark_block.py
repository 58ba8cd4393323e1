"""Time, memory and error of a whole Pairformer block and of operations in it, ours and its peers', on one GPU."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import torch
from benchmark_attention import Meter
from benchmark_block_floor import floor
from benchmark_block_implementations import Implementation, Prepared
from benchmark_block_problem import UPDATES, Case, Problem
from benchmark_block_selection import BlockSelection
from benchmark_block_targets import print_summary
from benchmark_gpu import Ceilings, NotCaptured, RestoringStopwatch, Stopwatch, describe, release
from benchmark_rows import machine, read_rows, write_rows

LIMITS = {torch.bfloat16: 1.0, torch.float32: 1e-3}
"""By the dtype that is computed in: what the largest accepted relative errors below are multiplied by."""
LARGEST_ERROR = {
    "s": 0.03,
    "z": 0.03,
    "single_update": 0.03,
    "update": 0.03,
    "projected": 0.03,
    "bias": 0.03,
    "ds": 0.05,
    "dz": 0.05,
    "parameters": 0.05,
}
"""PyTorch loses about a third of these in bf16."""
LARGEST_OF_ONE_PARAMETER = 0.15
LARGEST_BY_FACTORS = 0.15
"""For updates of a block that replaces pair biases by factors, at any dtype; the default tolerance gives 0.06."""


def run(selection: BlockSelection, output: Path, commit: str | None, resume: bool, deadline: float) -> list[str]:
    """Measure and write after every row; return the names of our own rows without a valid result.

    No row is begun after ``deadline`` (of :func:`time.monotonic`).

    Raises
    ------
    benchmark_gpu.DeviceLost
        If an implementation destroyed the CUDA context. Its row is written; a fresh process can resume.
    """
    rows: list[dict[str, Any]] = read_rows(output) if resume else []
    done = {_key(row) for row in rows}
    origin = machine(commit)

    def add(row: dict[str, Any], began: float) -> None:
        rows.append({"suite": "block", **row, **origin})
        write_rows(output, rows)
        print(f"{_line(row)} [{time.monotonic() - began:.1f} s]", flush=True)

    gc.freeze()  # what is imported by now need not be searched after every row
    began = time.monotonic()
    ceilings = Ceilings.measure(Stopwatch())
    if not done:
        for row in ceilings.rows():
            add(row, began)
    left = 0
    for case in selection.cases():
        bound = identity(case, "floor") | floor(case, ceilings)
        if _key(bound) not in done:
            add(bound, time.monotonic())
        chosen = [one for one in selection.implementations(case) if _key(identity(case, one.name)) not in done]
        problem = None
        for position, implementation in enumerate(chosen):
            began = time.monotonic()
            if began > deadline:
                left += len(chosen) - position
                break
            problem = problem or Problem(case, torch.device("cuda"))
            add(measure(problem, implementation, RestoringStopwatch(problem.restore)), began)
            release()
        del problem
        release()
    if left:
        print(f"out of time: {left} rows not measured; --resume measures them")
    print_summary(rows)
    return [_line(row) for row in rows if row["impl"].startswith("pairformer_fast") and "error" in row]


def identity(case: Case, name: str) -> dict[str, Any]:
    """Keys that say what was measured."""
    return {
        "section": case.section,
        "op": case.op,
        "impl": name,
        "direction": case.direction,
        "n": case.n,
        "batch": 1,
        "heads": case.config.no_heads_pair,
        "dim": case.config.c_hidden_pair_att,
        "rank": None,
        "c_z": case.config.c_z,
        "c_s": case.config.c_s,
        "dtype": str(case.compute).removeprefix("torch."),
        "autocast": case.compute is not case.dtype,
    }


def measure(problem: Problem, implementation: Implementation, meter: Meter) -> dict[str, Any]:
    """One row: errors against the exact block, then time and memory; ``error`` instead where the result is wrong."""
    case = problem.case
    row = identity(case, implementation.name) | {"version": implementation.version()}
    try:
        prepared = implementation.prepare(problem)
        problem.restore()
        errors = problem.errors(prepared.run())
        row |= {"exact": str(problem.exact).removeprefix("torch."), "biases": prepared.biases()}
        if wrong := beyond_limits(case, errors, row["biases"]):
            return row | {"error": f"wrong result: {wrong}"}
        row |= {
            "rel_error": max(errors[name] for name in UPDATES if name in errors),
            "errors": errors,
        }
        row["peak_bytes"] = meter.peak_bytes(prepared.run) + problem.input_bytes
        row["peak_multiple"] = row["peak_bytes"] / case.pair_bytes
        return row | _times(problem, prepared, meter, row["biases"])
    except Exception as error:
        return row | {"error": describe(error)}


def beyond_limits(case: Case, errors: dict[str, float], biases: dict[str, Any] | None) -> str:
    """What is too large among ``errors``; empty if nothing is."""
    factor = LIMITS[case.compute]
    limits = {name: factor * limit for name, limit in LARGEST_ERROR.items()}
    limits["worst parameter"] = factor * LARGEST_OF_ONE_PARAMETER
    if any(form != "dense" for form in (biases or {}).values()):
        limits |= {"s": LARGEST_BY_FACTORS, "z": LARGEST_BY_FACTORS}
    beyond = [f"{name} {error:.2g} > {limits[name]:.2g}" for name, error in errors.items() if not error <= limits[name]]
    return f"relative error of {', '.join(beyond)}" if beyond else ""


def _times(problem: Problem, prepared: Prepared, meter: Meter, biases: dict[str, Any] | None) -> dict[str, Any]:
    """Times of graph replays where they give the right result, and of eager calls always."""
    try:
        timing = meter.graph(prepared.run, lambda result: beyond_limits(problem.case, problem.errors(result), biases))
        found: dict[str, Any] = {"timing": "graph"}
        eager = meter.eager(prepared.run)
    except NotCaptured as error:
        release()
        timing = eager = meter.eager(prepared.run)
        found = {"timing": "eager", "graph_error": str(error)}
    return {"ms_median": timing.median, "ms_p20": timing.p20, "ms_p80": timing.p80, "ms_eager": eager.median, **found}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("section", "op", "impl", "direction", "n"))


def _line(row: dict[str, Any]) -> str:
    if row["op"] == "ceiling":
        return f"ceiling {row['impl']}: {row['value']:.4g} {row['unit']}"
    op = "" if row["op"] == "pairformer_block" else f" {row['op']}"
    details = [f"{row['section']}{op} n={row['n']} {row['impl']}"]
    if "ms_median" in row:
        details.append(f"{row['ms_median']:.4g} ms")
    if row.get("timing") == "eager":
        details.append(f"(eager: {row['graph_error'][:90]})")
    elif "ms_eager" in row:
        details.append(f"({row['ms_eager']:.4g} eager)")
    if "peak_multiple" in row:
        details.append(f"{row['peak_multiple']:.2f} z")
    details += [f"{name} {error:.1e}" for name, error in row.get("errors", {}).items()]
    if row.get("biases"):
        ranks = {name: form if form == "dense" else f"rank {max(form)}" for name, form in row["biases"].items()}
        details.append(", ".join(f"{name} {form}" for name, form in ranks.items()))
    return " ".join([*details, f"ERROR {row['error'][:160]}" if "error" in row else ""]).strip()
