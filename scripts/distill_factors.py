"""Fit factor networks to the biases of a trained model, or go on with a fit that stopped; on a GPU if there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pairformer_fast.model.checkpoint import default_checkpoint
from pairformer_fast.training.distill import LOG_FILE, DistillSettings, distill
from pairformer_fast.user_errors import run_script

DEFAULT = DistillSettings()


def main(
    data: Annotated[Path, typer.Option(help="Shards of scripts/prepare_antibody_data.py.")] = Path("runs/data"),
    output: Annotated[Path, typer.Option(help="Folder of state, log and side file.")] = Path("runs/factors"),
    checkpoint: Annotated[Path | None, typer.Option(help="Weights; the bundled ones if omitted.")] = None,
    rank: Annotated[int, typer.Option(help="Of all factors.")] = DEFAULT.rank,
    table: Annotated[int, typer.Option(help="Largest relative position in the table beside them; 0 for no table.")] = (
        DEFAULT.table or 0
    ),
    hidden: Annotated[int, typer.Option(help="Width of the networks.")] = DEFAULT.hidden,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = DEFAULT.steps,
    batch_size: Annotated[int, typer.Option(help="Chains a step.")] = DEFAULT.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Of the first step.")] = DEFAULT.learning_rate,
    seed: Annotated[int, typer.Option(help="Of networks and batches.")] = DEFAULT.seed,
    within: Annotated[
        float | None, typer.Option(help="Minutes of the whole fit: networks are written then, though steps are left.")
    ] = DEFAULT.within,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop after so long; the same command goes on.")] = None,
) -> None:
    """Distil the dense pair biases; pairformer-fast fold --bias learned --factors FILE takes the result."""
    settings = DistillSettings(
        rank=rank, table=table or None, hidden=hidden, steps=steps, batch_size=batch_size,
        learning_rate=learning_rate, seed=seed, within=within,
    )  # fmt: skip
    side = distill(default_checkpoint() if checkpoint is None else checkpoint, data, output, settings, minutes)
    if side is None:
        print(f"stopped early, run the same command to go on: {output}")
        return
    facts = json.loads((output / LOG_FILE).read_text(encoding="utf-8").splitlines()[-1])
    print("probed change of attention weights on held-out structures (mean total variation), before and after:")
    for path, after in facts["after"].items():
        print(f"  {facts['before'][path]:.4f}  {after:.4f}  {path}")
    print(f"finished: {side}")


if __name__ == "__main__":
    run_script(main)
