"""Draw logs of scripts/train.py: loss and lDDT of training, and evaluations; needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from benchmark_rows import RESULTS, ROOT
from plotting import pyplot, running_mean

from pairformer_fast.training.study import losses, read_log
from pairformer_fast.user_errors import run_script

plt = pyplot("training")

WEIGHTS = ROOT / "data" / "weights"
BUNDLED = tuple(
    WEIGHTS / f"antibody_{bias}{run}training.jsonl" for run in ("second_", "third_", "") for bias in ("", "learned_")
)
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


def draw(runs: dict[str, list[dict[str, Any]]]) -> plt.Figure:
    """Running means of the weighted loss and of lDDT-CA in training, with the evaluations of held-out structures."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for colour, (name, rows) in zip(plt.get_cmap("tab10").colors, runs.items(), strict=False):
        steps = losses(rows)
        for axis, key in zip(axes, ("total", "lddt_ca"), strict=True):
            smooth = running_mean([row[key] for row in steps], SMOOTHED)
            axis.plot([row["step"] for row in steps[-len(smooth) :]], smooth, color=colour, lw=1, label=name)
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
