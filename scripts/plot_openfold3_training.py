"""Draw the loss curves of scripts/train_openfold3_tiny.py; needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from benchmark_rows import RESULTS
from plotting import pyplot, read_json, running_mean

from pairformer_fast.user_errors import run_script

plt = pyplot("openfold3_training")

SMOOTHED = 20
"""Steps of the running mean."""
STYLES = (
    {"color": "tab:grey", "lw": 4},
    {"color": "tab:blue", "lw": 1.5},
    {"color": "tab:orange", "lw": 1.5, "ls": "--"},
)


def main(
    losses: Annotated[Path, typer.Option(help="File to draw.")] = RESULTS / "openfold3_training.json",
    output: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "openfold3_training.svg",
) -> None:
    """Loss curves of all runs, and how far they are from the first."""
    document = read_json(losses, "python scripts/train_openfold3_tiny.py")
    draw(document["losses"]).savefig(output, metadata={"Date": None})
    print(f"wrote {output}")


def draw(losses: dict[str, list[float]]) -> plt.Figure:
    """Running means of the losses, and how far each run is from the first."""
    figure, (curves, apart) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    first, *_ = losses.values()
    window = min(SMOOTHED, len(first))
    for (name, values), style in zip(losses.items(), STYLES, strict=True):
        smooth = running_mean(values, window)
        curves.plot(np.arange(len(smooth)) + window, smooth, label=name, **style)
        if values is not first:
            apart.semilogy(np.arange(len(first)) + 1, relative(values, first), label=name, **(style | {"lw": 1}))
    curves.set(title=f"loss, mean of {window} steps", xlabel="step")
    apart.set(title="relative difference of the loss from OpenFold3's (gaps: none)", xlabel="step")
    for axis in (curves, apart):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return figure


def relative(found: list[float], expected: list[float]) -> Any:
    """Relative difference of each step; NaN, which is not drawn, where there is none."""
    difference = np.abs(np.array(found) - expected) / np.abs(expected)
    return np.where(difference > 0, difference, np.nan)


if __name__ == "__main__":
    run_script(main)
