"""Draw data/benchmarks/approximation.svg from data/benchmarks/approximation.json; needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from benchmark_rows import RESULTS
from plotting import pyplot, read_json

from pairformer_fast.user_errors import run_script

plt = pyplot("approximation")

OURS = "pairformer_fast "
KINDS = {"tri_att_start": "starting node", "tri_att_end": "ending node", "attn_pair_bias": "single"}
SHOWN_BY_BLOCK = ("svd, rank 16", "structured, rank 16")
COLUMNS = {
    "factors": ("with factors", "{:g}"),
    "mean_rank": ("mean rank", "{:.0f}"),
    "bias_error": ("bias", "{:.2f}"),
    "bound": ("bound", "{:.2f}"),
    "probed_mean": ("attention", "{:.3f}"),
    "largest_probed_worst": ("worst head", "{:.2f}"),
    "ca_rmsd": ("CA RMSD, Å", "{:.2f}"),
    "lddt": ("lDDT", "{:.3f}"),
    "lddt_h3": ("CDR-H3", "{:.3f}"),
    "crystal_lddt": ("lDDT to crystal", "{:.3f}"),
    "crystal_lddt_h3": ("CDR-H3", "{:.3f}"),
    "seconds": ("CPU s", "{:.1f}"),
}
"""Head and format of the columns of the table."""

Row = dict[str, Any]


def main(
    rows: Annotated[Path, typer.Option(help="File of scripts/benchmark.py.")] = RESULTS / "approximation.json",
    output: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "approximation.svg",
) -> None:
    """Structure against rank, time and attention error, with the Pareto front; where factors do what."""
    measured = read_json(rows, "python scripts/benchmark.py approximation")
    if not measured:
        raise ValueError(f"{rows} has no rows")
    rows_of_all = complete(measured)
    draw(rows_of_all).savefig(output, metadata={"Date": None})
    print(f"wrote {output}; data/benchmarks/README.md has this table:\n\n{table(rows_of_all)}")


def complete(rows: list[Row]) -> list[Row]:
    """Rows of the structures of which most was measured: all but one on which a run was stopped."""
    count = Counter(row["id"] for row in rows)
    return [row for row in rows if count[row["id"]] == max(count.values())]


def means(rows: list[Row]) -> dict[str, Row]:
    """Means over the structures by implementation."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["impl"].removeprefix(OURS), []).append(row)
    found = {}
    for name, members in by_name.items():
        found[name] = {key: members[0][key] for key in ("method", "place", "rank", "tolerance")}
        for key in COLUMNS:
            values = [row[key] for row in members if row[key] is not None]
            found[name][key] = fmean(values) if values else None
    return found


def table(rows: list[Row]) -> str:
    """Means over the structures, in Markdown."""
    lines = ["| | " + " | ".join(head for head, _ in COLUMNS.values()) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, row in means(rows).items():
        cells = ["" if row[key] is None else form.format(row[key]) for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def pareto(points: dict[str, Row], cost: str, error: str) -> list[str]:
    """Names of those that none beats in both, cheapest first."""
    front, best = [], float("inf")
    for name, row in sorted(points.items(), key=lambda item: (item[1][cost], item[1][error])):
        if row[error] < best:
            front.append(name)
            best = row[error]
    return front


def draw(rows: list[Row]) -> plt.Figure:
    """Six panels."""
    mean = means(rows)
    everywhere = {name: row for name, row in mean.items() if row["place"] == "everywhere" and row["factors"]}
    figure, axes = plt.subplots(2, 3, figsize=(14, 8.5), layout="constrained")
    colours = {
        method: plt.get_cmap("tab10")(i) for i, method in enumerate({r["method"]: 0 for r in everywhere.values()})
    }
    for axis, cost, label in (
        (axes[0][0], "mean_rank", "mean rank"),
        (axes[0][1], "seconds", "CPU seconds of the model"),
    ):
        _points(axis, everywhere, cost, colours)
        front = pareto(everywhere, cost, "ca_rmsd")
        axis.plot(
            [everywhere[n][cost] for n in front], [everywhere[n]["ca_rmsd"] for n in front], "k-", lw=0.8, zorder=0
        )
        axis.set(xlabel=label, title=f"Pareto front: {label}")
    axes[0][0].legend(fontsize=7)
    axes[0][1].axvline(mean["dense"]["seconds"], color="grey", ls=":")
    axes[0][1].annotate("dense bias", (mean["dense"]["seconds"], 1), rotation=90, fontsize=7)
    _points(axes[0][2], everywhere, "probed_mean", colours)
    axes[0][2].set(xlabel="total variation of attention weights, mean", title="attention error against structure")
    axes[0][2].set_xscale("log")
    axes[0][2].xaxis.set_minor_formatter(plt.NullFormatter())
    for axis in axes[0]:
        axis.set(yscale="log", ylabel="CA RMSD to the structure of the dense bias, Å")
    _bound(axes[1][0], rows, colours)
    _blocks(axes[1][1], rows)
    _places(axes[1][2], {row["place"]: row["ca_rmsd"] for row in mean.values() if row["place"] != "everywhere"})
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    targets = ", ".join(dict.fromkeys(f"{row['id']} ({row['n']} residues)" for row in rows))
    figure.suptitle(f"Factors in place of the pair bias, bundled weights, fp32, {targets}")
    return figure


def _points(axis: plt.Axes, points: dict[str, Row], x: str, colours: dict[str, Any]) -> None:
    for method, colour in colours.items():
        mine = [row for row in points.values() if row["method"] == method]
        for asked, marker in (("rank", "o"), ("tolerance", "^")):
            chosen = [row for row in mine if row[asked] is not None]
            if chosen:
                places = [row[x] for row in chosen], [row["ca_rmsd"] for row in chosen]
                axis.plot(*places, marker, color=colour, label=f"{method}, by {asked}", ms=5)
    for name, row in points.items():
        axis.annotate(name.split(", ")[-1].removeprefix("certified "), (row[x], row["ca_rmsd"]), fontsize=5)


def _bound(axis: plt.Axes, rows: list[Row], colours: dict[str, Any]) -> None:
    for method, colour in colours.items():
        found = [a for row in rows if row["method"] == method for a in row["attentions"] if a["choice"] == "factors"]
        axis.plot([a["probed_max"] for a in found], [a["bound"] for a in found], ".", color=colour, ms=3, label=method)
    axis.plot([1e-3, 1], [1e-3, 1], color="grey", lw=0.8)
    axis.set(xscale="log", yscale="log", xlim=(1e-3, 1.1), ylim=(1e-2, 1.1))
    axis.set(
        xlabel="largest total variation observed", ylabel="bound tanh(eps / 2)", title="bound against observed error"
    )
    axis.legend(fontsize=7)


def _blocks(axis: plt.Axes, rows: list[Row]) -> None:
    for name, style in zip(SHOWN_BY_BLOCK, ("-", "--"), strict=True):
        chosen = [row for row in rows if row["impl"] == OURS + name]
        for number, (part, kind) in enumerate(KINDS.items()):
            by_block: dict[int, list[float]] = {}
            for attention in (one for row in chosen for one in row["attentions"] if part in one["name"]):
                block = int(attention["name"].split("blocks.")[1].split(".")[0])
                by_block.setdefault(block, []).append(attention["probed_mean"])
            colour = plt.get_cmap("Dark2")(number)
            values = [fmean(by_block[block]) for block in sorted(by_block)]
            axis.plot(sorted(by_block), values, style, marker="o", color=colour, ms=4, label=f"{kind}, {name}")
    axis.set(
        xlabel="block", ylabel="total variation of attention weights, mean", title="attention error by block", ylim=0
    )
    axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    axis.legend(fontsize=6)


def _places(axis: plt.Axes, change: dict[str, float]) -> None:
    names = list(change)
    axis.barh(range(len(names)), [change[name] for name in names], color="tab:grey")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel="CA RMSD to the structure of the dense bias, Å", title="svd, rank 16, in a part of the attentions")


if __name__ == "__main__":
    run_script(main)
