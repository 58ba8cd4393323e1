"""Time, memory and error of attention with a pair bias, ours and its peers', in one run on one GPU."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from benchmark_gpu import Ceilings, Stopwatch, Timing
from benchmark_implementations import IMPLEMENTATIONS, Implementation, Prepared
from benchmark_problem import Case, Kind, Problem
from benchmark_rows import machine, write_rows
from torch import Tensor

DIRECTIONS = ("fwd", "fwdbwd")
RANKS = (8, 16, 32, 64, 96)
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
MAX_MESSAGE = 300


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


class DeviceLost(RuntimeError):
    """The CUDA context is gone: no further kernel can run in this process."""


class Meter(Protocol):
    """What measures a call: a :class:`benchmark_gpu.Stopwatch`, or a stand-in where there is no GPU."""

    def time(self, call: Any) -> Timing: ...

    def peak_bytes(self, call: Any) -> int: ...


def cases() -> Iterator[Case]:
    """Every case, the targets first."""
    for n in (384, 768, 1024):
        for direction in DIRECTIONS:
            yield Case("targets", direction, n, n)
    for n in (256, 512, 2048):
        for direction in DIRECTIONS if n < 2048 else ("fwd",):
            yield Case("sizes", direction, n, n)
    for direction in DIRECTIONS:
        medium = Case("masked", direction, 768, 768, masked=True)
        yield medium
        yield replace(medium, section="fp16", dtype=torch.float16, masked=False)
        yield replace(medium, section="dim64", dim=64, masked=False)
        own = replace(medium, section="structured", masked=False, kinds=(Kind.STRUCTURED,), peers=False)
        yield own
        own = own if own.backward else replace(own, n=1024, rows=1024)
        for rank in RANKS:
            yield replace(own, section="ranks", rank=rank, kinds=(Kind.FACTORS,))
        for share in SHARES:
            yield replace(own, section="shares", dense_share=share, kinds=(Kind.MIXED,))
        for n in (384, 1024) if medium.backward else (384, 768, 1024, 2048):
            yield Case("single", direction, n, None, heads=16, dim=24)
    yield Case("long", "fwd", 4096, 4096)


@dataclass(frozen=True)
class Selection:
    """Part of the cases and implementations; empty means all."""

    sections: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    patterns: tuple[str, ...] = ()
    directions: tuple[str, ...] = ()

    @classmethod
    def parse(cls, only: str, sizes: str, impl: str, direction: str) -> Selection:
        """Read comma-separated options; a pattern with a leading ``!`` excludes.

        Raises
        ------
        ValueError
            If a section, size or direction is not one the benchmark has, or if no implementation is left.
        """
        known = list(dict.fromkeys(case.section for case in cases()))
        sections = tuple(part for name in _split(only) for part in (known[1:] if name == "extra" else [name]))
        if unknown := set(sections) - set(known):
            raise ValueError(f"--only knows extra, {', '.join(known)}, but got {', '.join(sorted(unknown))}")
        if direction and direction not in DIRECTIONS:
            raise ValueError(f"--direction must be fwd or fwdbwd, but got {direction}")
        measured = sorted({case.n for case in cases()})
        if unknown := set(_split(sizes)) - {str(n) for n in measured}:
            raise ValueError(f"--sizes knows {', '.join(map(str, measured))}, but got {', '.join(sorted(unknown))}")
        directions = (direction,) if direction else ()
        selection = cls(sections, tuple(int(n) for n in _split(sizes)), _split(impl), directions)
        if not any(selection.takes(implementation) for implementation in IMPLEMENTATIONS):
            names = ", ".join(implementation.name for implementation in IMPLEMENTATIONS)
            raise ValueError(f"--impl {impl} matches none of: {names}")
        return selection

    def cases(self) -> list[Case]:
        """The chosen cases."""
        chosen = (case for case in cases() if not self.sections or case.section in self.sections)
        chosen = (case for case in chosen if not self.sizes or case.n in self.sizes)
        return [case for case in chosen if not self.directions or case.direction in self.directions]

    def takes(self, implementation: Implementation) -> bool:
        """Whether a pattern names the implementation and none excludes it."""
        wanted = [pattern for pattern in self.patterns if not pattern.startswith("!")]
        unwanted = [pattern[1:] for pattern in self.patterns if pattern.startswith("!")]
        named = not wanted or any(fnmatch(implementation.name, pattern) for pattern in wanted)
        return named and not any(fnmatch(implementation.name, pattern) for pattern in unwanted)


def run(selection: Selection, output: Path, commit: str | None, resume: bool) -> list[str]:
    """Measure and write after every row; return the names of our own rows without a valid result.

    Raises
    ------
    DeviceLost
        If an implementation destroyed the CUDA context. Its row is written; a fresh process can resume.
    """
    rows: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8")) if resume and output.exists() else []
    done = {_key(row) for row in rows}
    origin = machine(commit)
    stopwatch = Stopwatch()

    def add(row: dict[str, Any]) -> None:
        rows.append({"suite": "attention", **row, **origin})
        write_rows(output, rows)
        print(_line(row), flush=True)

    ceilings = Ceilings.measure(stopwatch)
    if not done:
        for row in ceilings.rows():
            add(row)
    for case in selection.cases():
        for kind in (Kind.NONE, Kind.FACTORS, Kind.DENSE) if case.peers else ():
            floor = identity(case, "floor", kind) | {"op": "floor"} | ceilings.floor(case, kind)
            if _key(floor) not in done:
                add(floor)
        chosen = [one for one in IMPLEMENTATIONS if one.kind in case.kinds and (case.peers or one.ours)]
        chosen = [one for one in chosen if selection.takes(one)]
        chosen = [one for one in chosen if _key(identity(case, one.name, one.kind)) not in done]
        if not chosen:
            continue
        problem = Problem(case, torch.device("cuda"))
        for implementation in chosen:
            add(measure(problem, implementation, stopwatch))
            _release()
        del problem
        _release()
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
    row = identity(problem.case, implementation.name, implementation.kind) | {"version": implementation.version()}
    try:
        prepared = implementation.prepare(problem)
        errors = relative_errors(problem, implementation.kind, prepared)
        if wrong := _beyond_limits(problem.case, errors):
            return row | {"error": f"wrong result: relative error of {wrong}"}
        row |= {"rel_error": errors.pop("out"), "gradient_errors": errors or None}
        row["peak_bytes"] = meter.peak_bytes(prepared.run)
        timing = meter.time(prepared.run)
        return row | {"ms_median": timing.median, "ms_p20": timing.p20, "ms_p80": timing.p80}
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_MESSAGE]
        return row | {"error": message}


def relative_errors(problem: Problem, kind: Kind, prepared: Prepared) -> dict[str, float]:
    """Relative errors of output and gradients against fp64; infinite where anything is not finite."""
    expected = problem.expected(kind)
    out, gradients = prepared.run()
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
    return ", ".join(f"{name} {error:.2g} > {bound}" for name, error, bound in bounds if not error <= bound)


def _release() -> None:
    """Free what the last implementation held; find out whether the device survived it."""
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLost(str(error)) from error


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
    if "peak_bytes" in row:
        details.append(f"{row['peak_bytes'] / 2**20:.0f} MiB")
    if "rel_error" in row:
        errors = {"out": row["rel_error"], **(row["gradient_errors"] or {})}
        details.append(" ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    return " ".join([what, *details, f"ERROR {row['error']}" if "error" in row else ""]).strip()


def _split(option: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in option.split(",") if part.strip())
