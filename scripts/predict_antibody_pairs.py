"""Structures by the teacher for a table of pairs, added to the training shards of a folder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from pairformer_fast.inference.predict import resolve_device
from pairformer_fast.training.prepare import add_pairs
from pairformer_fast.training.sources import read_pairs
from pairformer_fast.user_errors import run_script


def main(
    table: Annotated[Path, typer.Argument(help="pairs.csv.gz of prepare_antibody_data.py --table")],
    output: Annotated[Path, typer.Argument(help="folder with the shards train, val and crystal")],
    device: Annotated[str, typer.Option(help="where flash-abb runs and backbones are repaired")] = "cuda",
    batch_size: Annotated[int, typer.Option(min=1, help="pairs predicted together")] = 128,
) -> None:
    """Nothing is predicted if a pair shares a cluster with an evaluation domain."""
    device = str(resolve_device(device))
    pairs = read_pairs(table)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("flash-abb", total=len(pairs))
        summary = add_pairs(pairs, output, device, batch_size, partial(progress.advance, task))
    typer.echo(json.dumps(summary, indent=2))


if __name__ == "__main__":
    run_script(main)
