"""Measure, and write every number that the documentation quotes to data/benchmarks/SUITE.json."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import torch
import typer
from benchmark_rows import RESULTS, ROOT, read_rows, write_rows

from pairformer_fast.inference.errors import InputError
from pairformer_fast.model.checkpoint import CheckpointError
from pairformer_fast.user_errors import run_app

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def fold(
    fasta: Annotated[Path, typer.Argument(help="Jobs to fold.")] = ROOT / "data" / "golden" / "golden.fasta",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each setting; the fastest counts.")] = 1,
    output: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "fold.json",
) -> None:
    """Time, memory and change of structure of every way to treat the pair bias, against the reference."""
    from benchmark_folding import fold_rows

    _make_folder(output)
    write_rows(output, fold_rows(fasta, repeats))
    print(f"wrote {output}")


@app.command()
def accuracy(
    data: Annotated[Path, typer.Option(help="Shards of scripts/prepare_antibody_data.py.")] = Path("runs/data"),
    checkpoint: Annotated[Path | None, typer.Option(help="Weights; the bundled ones if omitted.")] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="Score flash-abb's Fv, too: the file that keeps them, made if missing with the extra [train]."
        ),
    ] = None,
    split: Annotated[
        Literal["val", "crystal"] | None,
        typer.Option(help="VH of the validation set or Fv crystals alone; rows that --output has of the other stay."),
    ] = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "accuracy.json",
) -> None:
    """Accuracy by region, stereochemistry and calibration of pLDDT on the hold-outs."""
    from benchmark_accuracy import SPLITS, accuracy_rows, beside

    _make_folder(output)
    if split:
        beside([], output)
    rows = []
    for row in accuracy_rows(data, checkpoint, teacher, [split] if split else SPLITS):
        rows.append(row)
        print({key: value for key, value in row.items() if key not in ("scores", "training")}, flush=True)
    write_rows(output, beside(rows, output) if split else rows)
    print(f"wrote {output}")


@app.command()
def attention(
    only: Annotated[str, typer.Option(help="Sections, comma-separated; 'extra' is all but targets.")] = "",
    sizes: Annotated[str, typer.Option(help="Values of N, comma-separated; all if omitted.")] = "",
    impl: Annotated[str, typer.Option(help="Implementations, shell patterns, comma-separated.")] = "*",
    direction: Annotated[str, typer.Option(help="fwd or fwdbwd; both if omitted.")] = "",
    commit: Annotated[str | None, typer.Option(help="Commit of the code where git is not at hand.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that --output has.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes that compile kernels beforehand; 0 compiles on the way.")] = 0,
    minutes: Annotated[float, typer.Option(help="Begin no row after this time; --resume goes on.")] = 600.0,
    output: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "attention.json",
) -> None:
    """Attention with a pair bias on one GPU, side by side with every peer that is installed."""
    from benchmark_attention import run
    from benchmark_gpu import DeviceLost
    from benchmark_selection import Selection
    from benchmark_warm import compile_ahead

    deadline = time.monotonic() + 60 * minutes
    try:
        chosen = Selection.parse(only, sizes, impl, direction)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _need_gpu("attention")
    if jobs:
        compile_ahead(chosen, jobs)
    try:
        _make_folder(output)
        failed = run(chosen, output, commit, resume, deadline)
    except DeviceLost:
        _start_again(deadline, resume, "--jobs=0")
    _finish(output, failed)


@app.command()
def block(
    only: Annotated[str, typer.Option(help="Sections, comma-separated; all if omitted.")] = "",
    sizes: Annotated[str, typer.Option(help="Values of N, comma-separated; all if omitted.")] = "",
    impl: Annotated[str, typer.Option(help="Implementations, shell patterns, comma-separated.")] = "*",
    commit: Annotated[str | None, typer.Option(help="Commit of the code where git is not at hand.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that --output has.")] = False,
    minutes: Annotated[float, typer.Option(help="Begin no row after this time; --resume goes on.")] = 600.0,
    output: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "block.json",
) -> None:
    """A Pairformer block of production size on one GPU, side by side with OpenFold3's if that is installed."""
    from benchmark_block import run
    from benchmark_block_selection import BlockSelection
    from benchmark_gpu import DeviceLost

    deadline = time.monotonic() + 60 * minutes
    try:
        selection = BlockSelection.parse(only, sizes, impl)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _need_gpu("block")
    try:
        _make_folder(output)
        failed = run(selection, output, commit, resume, deadline)
    except DeviceLost:
        _start_again(deadline, resume)
    _finish(output, failed)


@app.command()
def openfold3(
    only: Annotated[str, typer.Option(help="Sections, comma-separated; all if omitted.")] = "",
    sizes: Annotated[str, typer.Option(help="Values of N, comma-separated; all if omitted.")] = "",
    impl: Annotated[str, typer.Option(help="Implementations, shell patterns, comma-separated.")] = "*",
    commit: Annotated[str | None, typer.Option(help="Commit of the code where git is not at hand.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that --output has.")] = False,
    minutes: Annotated[float, typer.Option(help="Begin no row after this time; --resume goes on.")] = 600.0,
    dry: Annotated[bool, typer.Option("--dry", help="Two blocks and 32 tokens, to see that it runs here.")] = False,
    output: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "openfold3.json",
) -> None:
    """A whole OpenFold3 of full size with random weights on one GPU: its own code and kernels, and ours swapped in."""
    deadline = time.monotonic() + 60 * minutes
    try:
        from benchmark_openfold3 import run
        from benchmark_openfold3_selection import OpenFold3Selection
    except ModuleNotFoundError as error:
        typer.echo(f"error: the openfold3 suite needs the extra [openfold]: {error}", err=True)
        raise typer.Exit(2) from error
    from benchmark_gpu import DeviceLost

    try:
        selection = OpenFold3Selection.parse(only, sizes, impl, dry)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if not dry:
        _need_gpu("openfold3")
    elif output == RESULTS / "openfold3.json":
        raise typer.BadParameter("a dry run is no measurement: give another file", param_hint="--output")
    try:
        _make_folder(output)
        failed = run(selection, output, commit, resume, deadline)
    except DeviceLost:
        _start_again(deadline, resume)
    _finish(output, failed)


@app.command()
def drift(
    tokens: Annotated[int, typer.Option(help="Number of tokens.", min=1)] = 256,
    blocks: Annotated[int, typer.Option(help="Number of blocks.", min=1)] = 48,
    commit: Annotated[str | None, typer.Option(help="Commit of the code where git is not at hand.")] = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "drift.json",
) -> None:
    """Error of bf16 after every block of a stack, with our kernels and with plain PyTorch, against fp32."""
    from benchmark_drift import drift_rows

    _make_folder(output)
    rows = drift_rows(tokens, blocks, torch.device("cuda" if torch.cuda.is_available() else "cpu"), commit)
    write_rows(output, rows)
    for row in rows[-2:]:
        print(f"{row['impl']}: after {row['block']} blocks s {row['error_s']:.1e}, z {row['error_z']:.1e}")
    print(f"wrote {output}")


@app.command()
def approximation(
    data: Annotated[Path, typer.Option(help="Folder with fv_crystal/, see data/weights/README.md.")] = Path("runs/raw"),
    structures: Annotated[str, typer.Option(help="Crystals, comma-separated; all if omitted.")] = "",
    commit: Annotated[str | None, typer.Option(help="Commit of the code where git is not at hand.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that --output has.")] = False,
    minutes: Annotated[float, typer.Option(help="Begin no row after this time; --resume goes on.")] = 600.0,
    output: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "approximation.json",
) -> None:
    """What factors do to bias, attention and structure, by method, rank, tolerance and place, on held-out crystals."""
    from benchmark_approximation import approximation_rows, line, read_targets

    deadline = time.monotonic() + 60 * minutes
    _make_folder(output)
    with tempfile.TemporaryDirectory() as scratch:
        targets = read_targets(data, structures, Path(scratch))
    rows = read_rows(output) if resume else []
    for row in approximation_rows(targets, rows, deadline, commit):
        rows.append(row)
        write_rows(output, rows)
        print(line(row), flush=True)
    print(f"wrote {output}")


@app.command()
def factorisation(
    sizes: Annotated[str, typer.Option(help="Values of N, comma-separated.")] = "384,768,1024,2048,4096",
    dtype: Annotated[str, typer.Option(help="Of the bias: bfloat16 or float32.")] = "bfloat16",
    commit: Annotated[str | None, typer.Option(help="Commit of the code where git is not at hand.")] = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "factorisation.json",
) -> None:
    """Factors of a pair bias on one GPU: time, memory and error of ours and of PyTorch's decompositions."""
    from benchmark_factorisation import factorisation_rows, line
    from benchmark_gpu import Stopwatch

    if dtype not in ("bfloat16", "float32"):
        raise typer.BadParameter(f"--dtype must be bfloat16 or float32, but got {dtype}")
    try:
        chosen = tuple(int(n) for n in sizes.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"--sizes must be numbers separated by commas, but got {sizes}") from error
    _need_gpu("factorisation")
    _make_folder(output)
    rows = []
    for row in factorisation_rows(chosen, getattr(torch, dtype), torch.device("cuda"), Stopwatch(), commit):
        rows.append(row)
        write_rows(output, rows)
        print(line(row), flush=True)
    _finish(output, [line(row) for row in rows if "error" in row and row["impl"].startswith("pairformer_fast")])


@app.command("attention-cpu")
def attention_cpu(
    commit: Annotated[str | None, typer.Option(help="Commit of the code where git is not at hand.")] = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "attention_cpu.json",
) -> None:
    """Attention with one thread of a CPU by the form of its bias, and making factors of one."""
    from benchmark_attention_cpu import SIZES, attention_cpu_rows, line

    _make_folder(output)
    rows = []
    for row in attention_cpu_rows(SIZES, commit):
        rows.append(row)
        print(line(row), flush=True)
    write_rows(output, rows)
    print(f"wrote {output}")


def _make_folder(output: Path) -> None:
    """So that a path that will not do is known before the first measurement, not after the last."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.is_dir():
        raise typer.BadParameter(f"{output} is a folder: name a file", param_hint="--output")


def _need_gpu(suite: str) -> None:
    if not torch.cuda.is_available():
        typer.echo(f"error: the {suite} suite measures kernels: it needs a CUDA GPU, and PyTorch sees none", err=True)
        raise typer.Exit(2)


def _start_again(deadline: float, resume: bool, *options: str) -> NoReturn:
    """Measure the rest in a fresh process: a kernel that reads out of bounds takes the CUDA context with it."""
    sys.stdout.flush()
    left = f"--minutes={(deadline - time.monotonic()) / 60}"
    again = [*options, left, *([] if resume else ["--resume"])]
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *again])


def _finish(output: Path, failed: list[str]) -> None:
    print(f"wrote {output}")
    if failed:
        typer.echo(f"error: no valid result for {len(failed)} of our own rows: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    run_app(app, "benchmark.py", (OSError, InputError, CheckpointError))


if __name__ == "__main__":
    main()
