"""Hold training with the kernels against training with plain PyTorch: data/benchmarks/kernel_training.json and a plot.

The runs of scripts/train.py share all settings but ``attention.backend`` and the seed: one with the backend
``reference``, and some with another, of which one has the reference's seed. Losses are averaged over windows of steps.
The kernels follow the reference if their difference from it, at the same seed, is within that between their own seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from benchmark_rows import RESULTS
from plotting import pyplot

from pairformer_fast.inference.files import write_atomically
from pairformer_fast.training.study import StudyRun, read_run
from pairformer_fast.user_errors import run_script

plt = pyplot("kernel_training")

WINDOWS = 10
REFERENCE = "reference"


def main(
    logs: Annotated[list[Path], typer.Argument(help="log.jsonl of each run")],
    output: Annotated[Path, typer.Option(help="file to write; the plot goes beside it")] = RESULTS
    / "kernel_training.json",
) -> None:
    """Write the comparison; the exit status is 1 if the kernels do not follow the reference."""
    runs = [read_run(path) for path in logs]
    summary = compare(runs)
    figure = draw(runs)
    write_atomically(output, json.dumps(summary, indent=1) + "\n")
    figure.savefig(output.with_suffix(".svg"), metadata={"Date": None})
    verdict = "follows" if summary["follows"] else "does NOT follow"
    print(f"training with the kernels {verdict} the reference: wrote {output} and {output.with_suffix('.svg')}")
    raise typer.Exit(0 if summary["follows"] else 1)


def compare(runs: list[StudyRun]) -> dict[str, Any]:
    """Mean losses of every run by window, and the differences between backends and between seeds.

    Raises
    ------
    ValueError
        If the runs are not one of the reference and at least two others, one of which has its seed, or their settings
        differ elsewhere.
    """
    settings = [{k: v for k, v in run.facts["train"].items() if k != "seed"} for run in runs]
    if any(other != settings[0] for other in settings):
        raise ValueError("the runs differ in more than attention.backend and train.seed: compare runs of one preset")
    references = [run for run in runs if _backend(run) == REFERENCE]
    others = [run for run in runs if _backend(run) != REFERENCE]
    if len(references) != 1 or len({run.seed for run in others}) < 2:
        raise ValueError(
            f"needs one run with backend 'reference' and two seeds of another, but got {len(references)} and seeds "
            f"{sorted(run.seed for run in others)}"
        )
    (reference,) = references
    same = [run for run in others if run.seed == reference.seed]
    if not same:
        raise ValueError(f"no run of the kernels has the reference's seed {reference.seed}")
    by_run = {id(run): windows(run) for run in runs}
    difference = np.abs(by_run[id(same[0])] - by_run[id(reference)])
    noise = np.max([np.abs(by_run[id(run)] - by_run[id(same[0])]) for run in others if run is not same[0]], axis=0)
    return {
        "windows": WINDOWS,
        "settings": settings[0],
        "runs": [
            {
                "backend": _backend(run),
                "seed": run.seed,
                "loss": by_run[id(run)].round(4).tolist(),
                **{name: run.facts[name] for name in ("step", "seconds", "device", "torch", "evaluation")},
            }
            for run in runs
        ],
        "difference": difference.round(4).tolist(),
        "between_seeds": noise.round(4).tolist(),
        "follows": bool((difference <= np.max(noise)).all()),
    }


def windows(run: StudyRun) -> np.ndarray:
    """Mean total loss of each of :data:`WINDOWS` equal parts of a run."""
    losses = np.array([row["total"] for row in run.curve])
    return np.array([part.mean() for part in np.array_split(losses, WINDOWS)])


def draw(runs: list[StudyRun]) -> plt.Figure:
    """Total losses over the steps."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for run in runs:
        steps, loss = (np.array([row[key] for row in run.curve]) for key in ("step", "total"))
        style = {"color": "tab:grey", "lw": 3} if _backend(run) == REFERENCE else {"lw": 1}
        axis.plot(steps, loss, label=f"{_backend(run)}, seed {run.seed}", **style)
    axis.set(xlabel="step", ylabel="training loss", yscale="log")
    axis.legend()
    axis.grid(alpha=0.3)
    return figure


def _backend(run: StudyRun) -> str:
    return run.facts["attention"]["backend"]


if __name__ == "__main__":
    run_script(main)
