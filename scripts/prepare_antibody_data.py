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

from pairformer_fast.training.derive import Derivation
from pairformer_fast.training.prepare import predict_with_teacher, prepare, write_table
from pairformer_fast.training.shards import Structure
from pairformer_fast.training.sources import Pair

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def main(
    output: Annotated[Path, typer.Argument(help="folder for train, val and crystal.safetensors and summary.json")],
    data: Annotated[Path, typer.Option(help="folder with the raw data")] = SHARED_DATA,
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
    torch.set_num_threads(threads)
    console = Console(stderr=True)
    cache = cache or output.with_name(output.name + "_teacher.safetensors")

    def predict(wanted: Sequence[Pair]) -> list[Structure]:
        with Progress(console=console) as progress:
            task = progress.add_task("flash-abb", total=len(wanted))
            return predict_with_teacher(wanted, cache, device, partial(progress.advance, task))

    try:
        if not pairs and (derived or table):
            raise ValueError("--no-pairs leaves all pairs out: drop it, or drop --derived and --table")
        derivation = Derivation(count=derived, seed=seed) if derived else None
        summary = prepare(data, output, predict if pairs and not table else None, derivation)
        if table:
            summary["table"] = write_table(data, output, derivation)
    except (OSError, ValueError, ImportError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    typer.echo(json.dumps(summary, indent=2))


if __name__ == "__main__":
    typer.run(main)
