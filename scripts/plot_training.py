"""Draw logs of scripts/train.py: loss and lDDT of training, and evaluations; needs matplotlib (extra ``plot``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from benchmark_rows import RESULTS, ROOT
from plotting import pyplot

from pairformer_fast.user_errors import run_script

plt = pyplot("training")

WEIGHTS = ROOT / "data" / "weights"
BUNDLED = (WEIGHTS / "antibody_training.jsonl", WEIGHTS / "antibody_learned_training.jsonl")
SMOOTHED = 15
"""Logged rows in a point of the curves."""
EVALUATED = {"val": "o", "crystal": "s"}


def main(
    logs: Annotated[
        list[Path] | None, typer.Argument(help="log.jsonl of runs; if omitted, of the bundled weights")
    ] = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "antibody_training.svg",
) -> None:
    """Curves of all runs in one plot."""
    runs = {path.stem if path.stem != "log" else path.parent.name: read_log(path) for path in logs or BUNDLED}
    draw(runs).savefig(output, metadata={"Date": None})
    print(f"wrote {output}")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a training log.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is missing or has no row of a step.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no log of scripts/train.py ({error})") from None
    if not any("total" in row for row in rows if isinstance(row, dict)):
        raise ValueError(f"{path} has no training step: give a log.jsonl of scripts/train.py")
    return rows


def draw(runs: dict[str, list[dict[str, Any]]]) -> plt.Figure:
    """Running means of the weighted loss and of lDDT-CA in training, with the evaluations of held-out structures."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for colour, (name, rows) in zip(plt.get_cmap("tab10").colors, runs.items(), strict=False):
        steps = [row for row in rows if "total" in row]
        for axis, key in zip(axes, ("total", "lddt_ca"), strict=True):
            width = min(SMOOTHED, len(steps))
            smooth = np.convolve([row[key] for row in steps], np.full(width, 1 / width), "valid")
            axis.plot([row["step"] for row in steps[width - 1 :]], smooth, color=colour, lw=1, label=name)
        for row in rows:
            for split, scores in row.get("evaluation", {}).items():
                axes[1].plot(row["step"], scores["lddt"], EVALUATED[split], color=colour)
    axes[0].set(title=f"training loss, mean of {SMOOTHED} logged steps", xlabel="step")
    axes[1].set(title="lDDT-CA: training (lines), 100 VH (circles), 15 Fv (squares)", xlabel="step")
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    run_script(main)
