"""Draw data/benchmarks/attention.svg from data/benchmarks/attention.json; needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from benchmark_rows import RESULTS
from plotting import pyplot, read_json

from pairformer_fast.user_errors import run_script

plt = pyplot("attention")

OURS = "pairformer_fast"
DIRECTIONS = {"fwd": "forward", "fwdbwd": "forward + backward"}
BY_SIZE = ("targets", "sizes", "long")
Row = dict[str, Any]


def main(
    rows: Annotated[Path, typer.Option(help="File of scripts/benchmark.py.")] = RESULTS / "attention.json",
    output: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "attention.svg",
) -> None:
    """Time of triangle attention against N, rank and share of dense tiles."""
    measured = read_json(rows, "python scripts/benchmark.py attention")
    chosen = [row for row in measured if "ms_median" in row and row["op"] == "triangle_attention"]
    if not chosen:
        raise ValueError(f"{rows} has no time of triangle attention")
    draw(chosen).savefig(output, metadata={"Date": None})
    print(f"wrote {output}")


def draw(rows: list[Row]) -> plt.Figure:
    """Time against N for each direction; time against R and against the share of dense tiles."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    names = list(dict.fromkeys(row["impl"] for row in rows))
    names.sort(key=lambda name: not name.startswith(OURS))
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
    for (direction, title), axis in zip(DIRECTIONS.items(), axes[0], strict=True):
        chosen = [row for row in rows if row["section"] in BY_SIZE and row["direction"] == direction]
        for name in names:
            style = {"marker": "o", "lw": 2} if name.startswith(OURS) else {"marker": "s", "ls": "--", "lw": 1}
            _line(axis, [row for row in chosen if row["impl"] == name], "n", label=name, color=colours[name], **style)
        _logarithmic(axis, sorted({row["n"] for row in chosen}))
        axis.set(title=title, xlabel="N (rows and tokens)", ylabel="ms")
    if handles := axes[0][0].get_legend_handles_labels()[0]:
        figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=4)
    for section, key, label, axis in (
        ("ranks", "rank", "rank R", axes[1][0]),
        ("shares", "dense_share", "share of dense tiles", axes[1][1]),
    ):
        for direction, title in DIRECTIONS.items():
            chosen = [row for row in rows if row["section"] == section and row["direction"] == direction]
            sizes = ", ".join(str(n) for n in sorted({row["n"] for row in chosen}))
            _line(axis, chosen, key, label=f"{title}, N = {sizes}", marker="o")
        axis.set(title=f"{OURS}: time against {label}", xlabel=label, ylabel="ms")
        if axis.lines:
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
            axis.legend(fontsize=8)
    for axis in axes.flat:
        axis.grid(which="major", alpha=0.3)
    row = rows[0]
    figure.suptitle(f"Triangle attention, H = 4, D = 32, bf16, {row['device']}, torch {row['torch']}")
    return figure


def _line(axis: plt.Axes, rows: list[Row], key: str, **style: Any) -> None:
    if rows:
        rows = sorted(rows, key=lambda row: row[key])
        axis.plot([row[key] for row in rows], [row["ms_median"] for row in rows], ms=4, **style)


def _logarithmic(axis: plt.Axes, sizes: list[int]) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(sizes)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(plt.NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


if __name__ == "__main__":
    run_script(main)
