"""Calibrate pLDDT of trained weights by held-out crystals; structures stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pairformer_fast.training.calibrate import calibrate
from pairformer_fast.user_errors import run_script


def main(
    weights: Annotated[Path, typer.Argument(help="As scripts/train.py wrote them; they stay as they are.")],
    output: Annotated[Path, typer.Argument(help="Weights to write; factor networks go beside them.")],
    data: Annotated[Path, typer.Option(help="Shards of scripts/prepare_antibody_data.py.")] = Path("runs/data"),
    split: Annotated[str, typer.Option(help="Structures that the weights were not trained on.")] = "val",
) -> None:
    """Fit scale and tilt of the logits and print them, with the mean of pLDDT minus lDDT before and in two halves."""
    print(json.dumps(calibrate(weights, data, split, output), indent=2))
    print(f"wrote {output}")


if __name__ == "__main__":
    run_script(main)
