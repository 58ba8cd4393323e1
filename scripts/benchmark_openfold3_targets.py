"""What is asked of a whole OpenFold3 on one H100, and how a run compares."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

SPEED = {"trunk": 2.5, "diffusion": 1.5, "training": 1.7}
"""Times the speed of the fastest of the others, at every size."""
OURS = ("pairformer_fast dense", "pairformer_fast auto")


class Outcome(NamedTuple):
    """Ours beside the best of the others, in seconds and in bytes; None where there is no valid result."""

    section: str
    n: int
    impl: str
    asked: float | None
    ours: dict[str, Any] | None
    fastest: dict[str, Any] | None
    smallest: dict[str, Any] | None

    @property
    def speed(self) -> float | None:
        """How many times the speed of the fastest of the others."""
        return self.fastest["seconds"] / self.ours["seconds"] if self.ours and self.fastest else None

    @property
    def memory(self) -> float | None:
        """Part of the memory of the least demanding of the others."""
        return self.ours["peak_bytes"] / self.smallest["peak_bytes"] if self.ours and self.smallest else None


def outcomes(rows: list[dict[str, Any]]) -> list[Outcome]:
    """One for every section, size and configuration of ours among the rows."""
    measured = [row for row in rows if "seconds" in row]
    found = []
    for section, n in dict.fromkeys((row["section"], row["n"]) for row in rows):
        same = {row["impl"]: row for row in measured if (row["section"], row["n"]) == (section, n)}
        others = [row for name, row in same.items() if name not in OURS]
        fastest = min(others, key=lambda row: row["seconds"], default=None)
        smallest = min((row for row in others if row["peak_bytes"]), key=lambda row: row["peak_bytes"], default=None)
        for name in OURS:
            found.append(Outcome(section, n, name, SPEED.get(section), same.get(name), fastest, smallest))
    return found


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Print a table of :func:`outcomes`."""
    table = Table("section", "N", "ours", "s", "fastest other", "s", "speed", "asked", "", "memory / least", "")
    for line in outcomes(rows):
        table.add_row(
            line.section,
            str(line.n),
            line.impl.removeprefix("pairformer_fast "),
            _cell(line.ours and line.ours["seconds"]),
            line.fastest["impl"].removeprefix("OpenFold3 ") if line.fastest else "-",
            _cell(line.fastest and line.fastest["seconds"]),
            _cell(line.speed),
            _cell(line.asked),
            _verdict(line.speed is not None, line.asked, line.asked is None or (line.speed or 0) >= line.asked),
            _cell(line.memory),
            _verdict(line.memory is not None, 1.0, (line.memory or 2) <= 1),
        )
    Console(width=130).print(table)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _verdict(measured: bool, asked: float | None, met: bool) -> str:
    if asked is None:
        return ""
    if not measured:
        return "not measured"
    return "met" if met else "missed"
