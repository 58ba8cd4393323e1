"""Compare runs of scripts/train.py with dense bias and with factors: data/benchmarks/factors_study.json and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from benchmark_rows import RESULTS
from plotting import pyplot, running_mean

from pairformer_fast.inference.files import write_atomically
from pairformer_fast.training.study import SCORES, StudyRun, read_run, summarize
from pairformer_fast.user_errors import run_script

plt = pyplot("factors_study")

LABELS = {"lddt": "lDDT-CA", "lddt_h3": "lDDT-CA, CDR-H3", "rmsd": "CA RMSD, Å"}
SMOOTHED = 10
"""Logged rows in a point of the curves."""


def main(
    logs: Annotated[list[Path], typer.Argument(help="log.jsonl of each run")],
    split: Annotated[str, typer.Option(help="evaluated split")] = "val",
    output: Annotated[Path, typer.Option(help="file to write; the plot goes beside it")] = RESULTS
    / "factors_study.json",
) -> None:
    """Runs must share all settings but bias and seed, and every arm must have the same seeds."""
    runs = [read_run(path) for path in logs]
    summary = summarize(runs, split)
    figure = draw(summary, runs)
    write_atomically(output, json.dumps(summary, indent=1) + "\n")
    figure.savefig(output.with_suffix(".svg"), metadata={"Date": None})
    for section in ("arms", "equal_time"):
        for arm in summary.get(section, ()):
            print(section, arm["arm"], {name: value for name, value in arm.items() if name.startswith(SCORES)})
    print(f"wrote {output} and {output.with_suffix('.svg')}")


def draw(summary: dict[str, Any], runs: list[StudyRun]) -> plt.Figure:
    """Scores of every run and their means by arm; loss over the steps."""
    figure, axes = plt.subplots(1, len(SCORES) + 1, figsize=(13, 3.6), layout="constrained")
    arms = [arm["arm"] for arm in summary["arms"]]
    colours = {arm: plt.get_cmap("tab10")(index) for index, arm in enumerate(arms)}
    for axis, name in zip(axes, SCORES, strict=False):
        for index, arm in enumerate(summary["arms"]):
            values = [run[name] for run in summary["runs"] if run["arm"] == arm["arm"]]
            axis.plot([index] * len(values), values, "o", color=colours[arm["arm"]], alpha=0.6)
            axis.plot([index - 0.25, index + 0.25], [arm[name]["mean"]] * 2, color=colours[arm["arm"]], lw=2)
        axis.set(ylabel=f"{LABELS[name]} ({summary['split']})", xlim=(-0.6, len(arms) - 0.4))
        axis.set_xticks(range(len(arms)), arms, rotation=20)
    for run in runs:
        smooth = running_mean([row["total"] for row in run.curve], SMOOTHED)
        steps = [row["step"] for row in run.curve][-len(smooth) :]
        axes[-1].plot(steps, smooth, color=colours[run.arm], lw=1, alpha=0.8)
    axes[-1].set(xlabel="step", ylabel="training loss", yscale="log")
    return figure


if __name__ == "__main__":
    run_script(main)
