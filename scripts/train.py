"""Train a folding model, or go on with a run that stopped; several GPUs through torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pairformer_fast.config import BiasMethod
from pairformer_fast.training.loop import train
from pairformer_fast.training.settings import TrainAttention, TrainConfig
from pairformer_fast.user_errors import run_script


def main(
    config: Annotated[str, typer.Option(help="Preset of configs/ by name, or a YAML file.")] = "antibody",
    data: Annotated[Path, typer.Option(help="Shards of scripts/prepare_antibody_data.py.")] = Path("runs/data"),
    output: Annotated[Path, typer.Option(help="Folder of state, log and weights.")] = Path("runs/antibody"),
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop after so long; the same command goes on.")] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Weights to start from; learned factors start from NAME.factors.safetensors if it is beside them.",
        ),
    ] = None,
    bias: Annotated[
        str | None,
        typer.Option(help="dense, or learned: factor networks train with the model; the preset's if omitted."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of learned factors.")] = None,
    table: Annotated[
        int | None,
        typer.Option(help="Largest relative position in a table beside learned factors; no table if omitted."),
    ] = None,
) -> None:
    """Train until the last step of the preset."""
    preset = TrainConfig.from_yaml(config)
    given = {name: value for name, value in (("bias", bias), ("rank", rank), ("table", table)) if value is not None}
    kept = {"backend"} if bias == BiasMethod.DENSE else None
    attention = TrainAttention.model_validate(preset.attention.model_dump(include=kept, exclude_unset=True) | given)
    done = train(preset.model_copy(update={"attention": attention}), data, output, minutes, start)
    print(f"{'finished' if done else 'stopped early, run the same command to go on'}: {output}")


if __name__ == "__main__":
    run_script(main)
