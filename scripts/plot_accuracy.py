"""Draw data/benchmarks/accuracy.svg from data/benchmarks/accuracy.json; needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from benchmark_rows import RESULTS
from plotting import pyplot, read_json

from pairformer_fast.user_errors import run_script

plt = pyplot("accuracy")

REFERENCE, TEACHER, CRYSTAL = "reference", "flash-abb", "crystal structure"
SPLITS = {"val": "VH", "crystal": "Fv"}
MEASURES = {
    "bond_rms": "RMS deviation of bond lengths, Å",
    "angle_rms": "RMS deviation of bond angles, °",
    "peptide_rms": "RMS deviation of peptide bonds, Å",
    "clashes": "clashes per 100 residues",
}
TARGETS = (
    ("val", "lddt", ">=", 0.92),
    ("val", "lddt_h3", ">=", 0.68),
    ("val", "rmsd", "<=", 1.2),
    ("crystal", "lddt", ">=", 0.945),
    ("crystal", "rmsd", "<=", 0.9),
    ("val", "plddt_agreement", ">=", 0.6),
    ("crystal", "plddt_agreement", ">=", 0.6),
)
NAMES_OF_SCORES = {"lddt": "lDDT-CA", "lddt_h3": "CDR-H3 lDDT-CA", "rmsd": "CA RMSD, Å"}
NAMES = NAMES_OF_SCORES | {"plddt_agreement": "Pearson of pLDDT and lDDT-CA, residues"}
Row = dict[str, Any]
Measured = dict[tuple[str, str], Row]
"""Rows by split and implementation."""


def main(
    rows: Annotated[Path, typer.Option(help="File of scripts/benchmark.py.")] = RESULTS / "accuracy.json",
    learned: Annotated[Path, typer.Option(help="The same of the weights that were trained with factors.")] = RESULTS
    / "accuracy_learned.json",
    output: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "accuracy.svg",
) -> None:
    """Calibration of pLDDT, RMSD by region and stereochemistry; prints the tables of the model card."""
    measured, with_factors = read_rows(rows), read_rows(learned)
    draw(measured).savefig(output, metadata={"Date": None})
    print(f"wrote {output}; data/weights/README.md has these tables:\n\n" + "\n\n".join(tables(measured, with_factors)))


def read_rows(path: Path) -> Measured:
    """Rows of a file that has both hold-outs.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is missing, no JSON or incomplete; the message names the command that makes it.
    """
    measured = by_name(read_json(path, "python scripts/benchmark.py accuracy"))
    if missing := [split for split in SPLITS if not {REFERENCE, CRYSTAL} <= {i for s, i in measured if s == split}]:
        raise ValueError(f"{path} has no rows of {', '.join(missing)}: write it with scripts/benchmark.py accuracy")
    return measured


def by_name(rows: Sequence[Row]) -> Measured:
    """Rows by split and implementation."""
    return {(row["split"], row["impl"]): row for row in rows}


def tables(measured: Measured, with_factors: Measured) -> list[str]:
    """The tables of the model card, in Markdown."""
    made = [
        accuracy(measured),
        targets(measured),
        factors(measured, with_factors),
        regions(measured),
        geometry(measured),
    ]
    return ["\n".join(table) for table in made]


def accuracy(measured: Measured) -> list[str]:
    """Accuracy of every path, mean / median / worst, in Markdown."""
    heads = ("hold-out", "structures", *NAMES_OF_SCORES.values(), "mean absolute error of pLDDT")
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for (_, impl), row in measured.items():
        name = f"`--bias {impl.split()[-1]}`" if impl.startswith("pairformer_fast") else impl
        made = {} if impl == CRYSTAL else {name: row}
        if impl == REFERENCE:
            made["reference, as `fold` writes it"] = row["written"]
        for name, part in made.items():
            scores = [
                " / ".join(f"{part[key]:.{digits}f}" for key in (score, f"{score}_median", f"{score}_worst"))
                for score, digits in (("lddt", 3), ("lddt_h3", 3), ("rmsd", 2))
            ]
            error = f"{part['plddt_error']:.3f}" if "plddt_error" in part else ""
            lines.append(f"| {' | '.join([_held_out(row), name, *scores, error])} |")
    return lines


def targets(measured: Measured) -> list[str]:
    """Target and measured value of the reference, in Markdown."""
    lines = ["| hold-out | measure | target | mean / median / worst | |", "| --- | --- | --- | --- | --- |"]
    for split, key, sense, target in TARGETS:
        row = measured[split, REFERENCE]
        if key == "plddt_agreement":
            value, shown = row[key]["pearson"], f"{row[key]['pearson']:.2f}"
        else:
            value = row[key]
            shown = " / ".join(f"{one:.4f}" for one in (value, row[f"{key}_median"], row[f"{key}_worst"]))
        met = value >= target if sense == ">=" else value <= target
        sign = "≥" if sense == ">=" else "≤"
        lines.append(f"| {_held_out(row)} | {NAMES[key]} | {sign} {target} | {shown} | {_verdict(met)} |")
    ours, theirs = measured["crystal", REFERENCE], measured.get(("crystal", TEACHER))
    for key, name in MEASURES.items() if theirs else ():
        value, target = ours["geometry_written"][key]["mean"], theirs["geometry"][key]["mean"]
        shown = " / ".join(f"{ours['geometry_written'][key][part]:.3g}" for part in ("mean", "median", "worst"))
        lines.append(f"| {_held_out(ours)} | {name} | ≤ {target:.3g} | {shown} | {_verdict(value <= target)} |")
    return lines


def factors(trained_dense: Measured, trained_with_factors: Measured) -> list[str]:
    """Scores of weights trained with dense biases and with factors, each by its reference, in Markdown."""
    lines = ["| hold-out | measure | trained dense | trained with factors | difference |", "| --- " * 5 + "|"]
    for split in SPLITS:
        dense, learned = (rows[split, REFERENCE] for rows in (trained_dense, trained_with_factors))
        for key, name in NAMES_OF_SCORES.items():
            scores = f"{dense[key]:.4f} | {learned[key]:.4f} | {learned[key] - dense[key]:+.4f}"
            lines.append(f"| {_held_out(dense)} | {name} | {scores} |")
    return lines


def regions(measured: Measured) -> list[str]:
    """RMSD by region, mean / median / worst, in Markdown."""
    columns = _columns(measured)
    lines = ["| region | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for region in dict.fromkeys(region for row in columns.values() for region in row["regions"]):
        cells = [_spread(row["regions"].get(region)) for row in columns.values()]
        lines.append(f"| {region} | {' | '.join(cells)} |")
    return lines


def geometry(measured: Measured) -> list[str]:
    """Stereochemistry, mean / worst, in Markdown."""
    groups = _groups(measured)
    names = MEASURES | {"inverted": "CA with the wrong hand"}
    lines = ["| | " + " | ".join(names.values()) + " |", "| --- " * (len(names) + 1) + "|"]
    for name, (row, key) in groups.items():
        cells = [f"{row[key][one]['mean']:.3g} / {row[key][one]['worst']:.3g}" for one in names]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def draw(measured: Measured) -> plt.Figure:
    """Calibration and regions above, stereochemistry of the Fv below."""
    figure = plt.figure(figsize=(14, 8.5), layout="constrained")
    grid = figure.add_gridspec(2, 12)
    calibration = figure.add_subplot(grid[0, :4])
    for split, marker in zip(SPLITS, "os", strict=True):
        row = measured[split, REFERENCE]
        agreement = row["plddt_agreement"]
        x, y, size = (np.array([one[key] for one in agreement["bins"]]) for key in ("plddt", "lddt", "residues"))
        label = f"{_held_out(row)}: Pearson {agreement['pearson']:.2f}, mean error {agreement['error']:+.3f}"
        (line,) = calibration.plot(x, y, "-", lw=0.8)
        calibration.scatter(x, y, 6 + 150 * size / size.sum(), color=line.get_color(), marker=marker, label=label)
    calibration.plot([0, 1], [0, 1], color="grey", ls=":", lw=0.8)
    calibration.set(xlabel="pLDDT / 100, mean of a bin", ylabel="true lDDT-CA, mean of a bin")
    calibration.set(title="calibration; area: share of residues", xlim=(0, 1), ylim=(0, 1))
    calibration.legend(fontsize=7, loc="lower right")
    _strips(
        figure.add_subplot(grid[0, 4:]),
        {name: [score["regions"] for score in row["scores"]] for name, row in _columns(measured).items()},
        "CA RMSD, Å, superposed on the framework of the chain",
    )
    for number, (measure, label) in enumerate(MEASURES.items()):
        axis = figure.add_subplot(grid[1, 3 * number : 3 * number + 3])
        for place, (row, key) in enumerate(_groups(measured).values()):
            _strip(axis, place, [score[key][measure] for score in row["scores"]], "tab:blue")
        axis.set_xticks(range(len(_groups(measured))), _groups(measured), rotation=25, ha="right", fontsize=7)
        axis.set(ylabel=label, ylim=0)
        axis.grid(alpha=0.3)
    figure.suptitle("Hold-outs folded with the reference in fp32; dots are structures, bars medians")
    return figure


def _strips(axis: plt.Axes, columns: dict[str, Sequence[dict[str, float]]], label: str) -> None:
    names = list(dict.fromkeys(name for scores in columns.values() for score in scores for name in score))
    for number, (title, scores) in enumerate(columns.items()):
        colour = plt.get_cmap("tab10")(number)
        for place, name in enumerate(names):
            values = [score[name] for score in scores if name in score]
            _strip(axis, place + (number - 1) * 0.25, values, colour)
        axis.plot([], [], "o", color=colour, ms=4, label=title)
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel=label, title="by region", ylim=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def _strip(axis: plt.Axes, place: float, values: Sequence[float], colour: Any) -> None:
    if values:
        axis.plot(np.full(len(values), place), values, "o", color=colour, ms=3, alpha=0.4, mew=0)
        axis.plot([place - 0.1, place + 0.1], [np.median(values)] * 2, "-", color="black", lw=1.5)


def _columns(measured: Measured) -> dict[str, Row]:
    rows = {_held_out(measured[split, REFERENCE]): measured[split, REFERENCE] for split in SPLITS}
    if teacher := measured.get(("crystal", TEACHER)):
        rows[f"{_held_out(teacher)}, {TEACHER}"] = teacher
    return rows


def _groups(measured: Measured) -> dict[str, tuple[Row, str]]:
    """Rows of the Fv, and which of their measurements of the geometry."""
    groups = {
        "crystals": (measured["crystal", CRYSTAL], "geometry"),
        TEACHER: (measured.get(("crystal", TEACHER)), "geometry"),
        "as the model gives them": (measured["crystal", REFERENCE], "geometry"),
        "as fold writes them": (measured["crystal", REFERENCE], "geometry_written"),
    }
    return {name: (row, key) for name, (row, key) in groups.items() if row}


def _held_out(row: Row) -> str:
    return f"{len(row['scores'])} {SPLITS[row['split']]}"


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def _spread(values: dict[str, float] | None) -> str:
    return "" if values is None else " / ".join(f"{values[key]:.2f}" for key in ("mean", "median", "worst"))


if __name__ == "__main__":
    run_script(main)
