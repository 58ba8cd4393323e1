"""What issue 5 asks of a block on one H100 (bf16, batch 1, C_z 128, C_s 384), and how a run compares."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

AUTO, DENSE, PEER = "pairformer_fast auto", "pairformer_fast dense", "OpenFold3 cuEquivariance"
IN_PLACE = "pairformer_fast dense, in place"
"""As the blocks of a stack run, all but the first."""


class Target(NamedTuple):
    """A value of our row, at most ``most``; or how many times the peer's, at least ``least``."""

    wording: str
    section: str
    n: int
    impl: str
    value: str
    most: float | None = None
    least: float | None = None


FORWARD_MS = {384: 1.5, 768: 6.5, 1024: 12.0, 2048: 75.0}
TRAINING_MS = {384: 10.0, 640: 24.0}
MEMORY = {1024: 5.0, 2048: 4.0}
TARGETS = (
    *(Target("forward, ms", "forward", n, AUTO, "ms_median", most=ms) for n, ms in FORWARD_MS.items()),
    *(Target("forward, peak memory / z", "forward", n, IN_PLACE, "peak_multiple", most=z) for n, z in MEMORY.items()),
    *(Target("forward, speed / cuEquivariance's", "forward", n, AUTO, "ms_median", least=3.0) for n in FORWARD_MS),
    *(Target("forward, speed / cuEquivariance's", "forward", n, DENSE, "ms_median", least=2.5) for n in FORWARD_MS),
    *(Target("training, ms", "training", n, DENSE, "ms_median", most=ms) for n, ms in TRAINING_MS.items()),
    *(Target("training, speed / cuEquivariance's", "training", n, DENSE, "ms_median", least=2.0) for n in TRAINING_MS),
    Target("forward, ms (it fits)", "long", 4096, AUTO, "ms_median", most=float("inf")),
)


class Outcome(NamedTuple):
    """One line of the summary; None where there is no valid result."""

    target: Target
    ours: float | None
    peer: float | None
    timing: str | None

    @property
    def measured(self) -> float | None:
        """What is held against the target."""
        if self.target.least is None:
            return self.ours
        return self.peer / self.ours if self.ours and self.peer else None

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.target.least is None:
            return "met" if self.measured <= (self.target.most or 0.0) else "missed"
        return "met" if self.measured >= self.target.least else "missed"


def outcomes(rows: list[dict[str, Any]]) -> list[Outcome]:
    """Every target beside our value and the better one of cuEquivariance's, in place or not."""
    blocks = [row for row in rows if row["op"] == "pairformer_block" and "ms_median" in row]
    found = []
    for target in TARGETS:
        same = [row for row in blocks if (row["section"], row["n"]) == (target.section, target.n)]
        own: dict[str, Any] = next((row for row in same if row["impl"] == target.impl), {})
        peers = [row[target.value] for row in same if row["impl"].startswith(PEER)]
        found.append(Outcome(target, own.get(target.value), min(peers, default=None), own.get("timing")))
    return found


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Print a table of :func:`outcomes`."""
    table = Table("target", "N", "mode", "asked", "measured", "", "ours", "cuEquivariance", "timing")
    for line in outcomes(rows):
        target = line.target
        asked = f"<= {target.most:g}" if target.least is None else f">= {target.least:g}"
        mode = target.impl.removeprefix("pairformer_fast ")
        cells = (line.measured, line.verdict, line.ours, line.peer, line.timing)
        table.add_row(target.wording, str(target.n), mode, asked, *map(_cell, cells))
    Console(width=130).print(table)


def _cell(value: float | str | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.3g}"
