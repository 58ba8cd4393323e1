"""Accuracy of copying the best training template onto each SAbDab val domain."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from pairformer_fast.training.prepare import SABDAB_SOURCE
from pairformer_fast.training.shards import Shard, shard_path
from pairformer_fast.training.templates import template_baseline
from pairformer_fast.user_errors import run_script


def main(
    folder: Annotated[Path, typer.Argument(help="folder written by prepare_antibody_data.py")],
) -> None:
    """Print the mean lDDT-CA over the domain and over CDR-H3."""
    train, val = (Shard(shard_path(folder, split)) for split in ("train", "val"))
    templates = [structure for structure in train if structure.source == SABDAB_SOURCE]
    if not templates:
        raise ValueError(f"{folder}: no structure of {SABDAB_SOURCE} to copy from in the split train")
    scores = template_baseline(templates, list(val))
    summary = {
        "templates": len(templates),
        "targets": len(scores),
        "lddt": round(float(np.mean([score.lddt for score in scores])), 4),
        "lddt_h3": round(float(np.nanmean([score.lddt_h3 for score in scores])), 4),
        "device": platform.machine(),
        **{package: version(package) for package in ("biopython", "numpy")},
    }
    typer.echo(json.dumps(summary, indent=2))


if __name__ == "__main__":
    run_script(main)
