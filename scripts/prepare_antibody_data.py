"""Turn raw antibody data into training and evaluation shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from pairformer_fast.inference.predict import resolve_device
from pairformer_fast.training.derive import Derivation
from pairformer_fast.training.prepare import predict_with_teacher, prepare, write_table
from pairformer_fast.training.shards import Structure
from pairformer_fast.training.sources import Pair
from pairformer_fast.user_errors import run_script


def main(
    output: Annotated[Path, typer.Argument(help="folder for train, val and crystal.safetensors and summary.json")],
    data: Annotated[Path, typer.Option(help="folder with the raw data, see data/weights/README.md")],
    pairs: Annotated[bool, typer.Option(help="add CoV-AbDab pairs with structures by flash-abb to train")] = True,
    cache: Annotated[
        Path | None, typer.Option(help="file that keeps the predictions [default: OUTPUT_teacher.safetensors]")
    ] = None,
    device: Annotated[str, typer.Option(help="where flash-abb runs")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of flash-abb")] = 1,
    derived: Annotated[int, typer.Option(min=0, help="pairs to derive from known ones and add to train")] = 0,
    seed: Annotated[int, typer.Option(help="of the derived pairs")] = 0,
    table: Annotated[
        bool,
        typer.Option(
            "--table",
            help="write the pairs to OUTPUT/pairs.csv.gz for scripts/predict_antibody_pairs.py on another machine, "
            "instead of predicting them here",
        ),
    ] = False,
) -> None:
    """Training data that shares a cluster with the SAbDab val split or the Fv crystals is dropped and counted."""
    if not pairs and (derived or table):
        raise typer.BadParameter("--no-pairs leaves all pairs out: drop it, or drop --derived and --table")
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"{output} exists and is no folder: choose another", param_hint="OUTPUT")
    device = str(resolve_device(device))
    torch.set_num_threads(threads)
    cache = cache or output.with_name(output.name + "_teacher.safetensors")

    def predict(wanted: Sequence[Pair]) -> list[Structure]:
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("flash-abb", total=len(wanted))
            return predict_with_teacher(wanted, cache, device, partial(progress.advance, task))

    derivation = Derivation(count=derived, seed=seed) if derived else None
    counts = {"table": write_table(data, output, derivation)} if table else {}
    summary = prepare(data, output, predict if pairs and not table else None, derivation) | counts
    typer.echo(json.dumps(summary, indent=2))


if __name__ == "__main__":
    run_script(main)
