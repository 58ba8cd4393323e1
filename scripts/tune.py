"""Measure candidate tiles of the attention kernels on this GPU and write the tables that the kernels read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmark_rows import RESULTS, ROOT, machine, write_rows
from tune_kernels import MAX_MESSAGE, DeviceLost, Family, Target, make_runner, targets

from pairformer_fast.user_errors import run_script

TABLES = ROOT / "kernels" / "flash_bias"
HOPPER = (9, 0)
KEPT = 1.15
"""Slowest candidate, relative to the fastest, that stays in the table of the Hopper kernels for other lengths."""
TRY_SECONDS = 120
MAX_JOBS = 12
"""Processes that hold a problem on the GPU at a time."""

Row = dict[str, Any]


def main(
    only: Annotated[Family | None, typer.Option(help="Tune these kernels only.")] = None,
    output_folder: Annotated[
        Path | None, typer.Option(help="Where tables and log go; into the package and data/benchmarks if omitted.")
    ] = None,
    commit: Annotated[str | None, typer.Option(help="Commit of the code where git is not at hand.")] = None,
) -> None:
    """Measure, check every result against fp64, and rewrite the tables and tune.json, the log of all measurements."""
    if not torch.cuda.is_available():
        typer.echo("error: tuning measures kernels: it needs a CUDA GPU, and PyTorch sees none", err=True)
        raise typer.Exit(2)
    capability = torch.cuda.get_device_capability()
    if only is Family.HOPPER and capability != HOPPER:
        typer.echo(f"error: the Hopper kernels need compute capability {HOPPER}, this GPU has {capability}", err=True)
        raise typer.Exit(2)
    families = [only] if only else [family for family in Family if family is not Family.HOPPER or capability == HOPPER]
    log, tables = (output_folder or RESULTS) / "tune.json", output_folder or TABLES
    origin = machine(commit)
    rows: list[Row] = []
    for family in families:
        measured = _tune(targets(family))
        rows += measured
        write_rows(log, [{"suite": "tune", **row, **origin} for row in rows])
        if missing := _without_result(family, measured):
            typer.echo(f"error: no candidate works for {'; '.join(missing)}: {log} says why", err=True)
            raise typer.Exit(1)
        if family is Family.HOPPER:
            _write(tables / "hopper_tiles.json", hopper_table(measured, torch.cuda.get_device_name()))
        else:
            table = json.loads((TABLES / "tiles.json").read_text(encoding="utf-8"))
            _write(tables / "tiles.json", plain_table(measured, "sm_{}{}".format(*capability), table))


def hopper_table(rows: list[Row], device: str) -> dict[str, Any]:
    """Table of the Hopper kernels: the fastest candidate of each class and those nearly as fast."""
    kernels: dict[str, list[Row]] = {}
    for target in targets(Family.HOPPER):
        works = _works(target, rows)
        for row in works:
            cost = row["ms"] / works[0]["ms"]
            if cost <= KEPT:
                entry = {**target.limits, "tiles": row["tiles"], "cost": round(cost, 3)}
                kernels.setdefault(target.kind, []).append(entry)
    return {"device": device, "tokens": targets(Family.HOPPER)[0].tokens, "kernels": kernels}


def plain_table(rows: list[Row], architecture: str, table: dict[str, Any]) -> dict[str, Any]:
    """``table`` with the section of one architecture replaced by the fastest candidates.

    Entries for products in TF32 (``exact`` 0), which are not tuned here, stay; they come before those that need none.
    """
    section = {
        kind: [entry for entry in entries if "exact" in entry] for kind, entries in table.get(architecture, {}).items()
    }
    for target in targets(Family.PLAIN):
        entries, entry = (
            section.setdefault(target.kind, []),
            {**target.limits, "tiles": _works(target, rows)[0]["tiles"]},
        )
        place = sum("bytes" in other for other in entries) if "bytes" in entry else len(entries)
        entries.insert(place, entry)
    return {architecture: section, **{name: other for name, other in table.items() if name != architecture}}


def _works(target: Target, rows: Iterable[Row]) -> list[Row]:
    """Candidates of a target that gave a right result, fastest first."""
    mine = (row for row in rows if "ms" in row and target.identity.items() <= row.items())
    return sorted(mine, key=lambda row: row["ms"])


def _without_result(family: Family, rows: list[Row]) -> list[str]:
    return [_name(target.identity) for target in targets(family) if not _works(target, rows)]


def _tune(chosen: list[Target]) -> list[Row]:
    """One row for each candidate, with its time or its error."""
    began = time.monotonic()
    with ThreadPoolExecutor(min(MAX_JOBS, os.cpu_count() or 1)) as pool:
        tried = list(pool.map(_try, chosen, range(len(chosen))))
    print(f"compiled and tried {chosen[0].family} in {time.monotonic() - began:.0f} s", flush=True)
    rows = []
    for target, errors in zip(chosen, tried, strict=True):
        runner = make_runner(target, torch.device("cuda"))
        for tiles, error in zip(target.candidates, errors, strict=True):
            try:
                found = runner.measure(tiles) if error is None else {"error": error}
            except DeviceLost as lost:
                typer.echo(f"error: the device was lost, nothing is written: {lost}", err=True)
                raise typer.Exit(1) from lost
            rows.append({**target.identity, "tiles": list(tiles), **found})
            print(_line(rows[-1]), flush=True)
        del runner
        torch.cuda.empty_cache()
    print(f"{chosen[0].family} took {time.monotonic() - began:.0f} s", flush=True)
    return rows


def _try(target: Target, number: int) -> list[str | None]:
    """Error of each candidate in a process of its own, None where it ran."""
    command = [sys.executable, str(Path(__file__).with_name("tune_kernels.py")), target.family, str(number)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRY_SECONDS)
        output, end = done.stdout, f"crashed: {_last_error(done.stderr)}"
    except subprocess.TimeoutExpired as expired:
        printed = expired.stdout or b""
        output = printed.decode() if isinstance(printed, bytes) else printed
        end = f"hung, or took more than {TRY_SECONDS} s with those before it"
    reported = dict(json.loads(line) for line in output.splitlines())
    return [reported.get(place, end) for place in range(len(target.candidates))]


def _last_error(text: str) -> str:
    """The line of a traceback that names the error; PyTorch's messages go on after it."""
    lines = text.strip().splitlines() or [""]
    return next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1])[
        :MAX_MESSAGE
    ]


def _name(identity: Row) -> str:
    rank = "dense" if identity["rank"] is None else f"R={identity['rank']}"
    return " ".join([identity["family"], identity["kind"], identity["dtype"], f"D={identity['dim']}", rank])


def _line(row: Row) -> str:
    if "ms" in row:
        result = f"{row['ms']:.3f} ms, {row['registers']} registers, {row['spills']} spilled"
    else:
        result = f"ERROR {row['error']}"
    return f"{_name(row)} {row['tiles']}: {result}"


def _write(path: Path, table: dict[str, Any]) -> None:
    """Write a table with an entry a line; a run that is cut off leaves the file as it was."""
    text = re.sub(r"\{[^{}]*\}", lambda entry: json.dumps(json.loads(entry[0])), json.dumps(table, indent=2))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
