"""What issue 3 asks for on one H100 (bf16, H = 4, D = 32), and how a run compares."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmark_problem import Kind
from rich.console import Console
from rich.table import Table

BIASED = (Kind.FACTORS, Kind.DENSE)
"""Forms in which a peer computes an attention with the same pair bias."""


class Target(NamedTuple):
    """Largest milliseconds for a form of the bias, a direction and N, and the time hoped for."""

    wording: str
    kind: Kind
    direction: str
    n: int
    ms: float
    aim: float | None = None


TARGETS = (
    Target("forward, factors R = 32", Kind.FACTORS, "fwd", 384, 0.13, 0.11),
    Target("forward, factors R = 32", Kind.FACTORS, "fwd", 768, 0.84, 0.75),
    Target("forward, factors R = 32", Kind.FACTORS, "fwd", 1024, 1.95, 1.75),
    Target("forward, mixed, 25 % of tiles dense", Kind.MIXED, "fwd", 768, 0.98),
    Target("forward, mixed, 25 % of tiles dense", Kind.MIXED, "fwd", 1024, 2.3),
    Target("forward, dense bias", Kind.DENSE, "fwd", 768, 1.05),
    Target("forward, dense bias", Kind.DENSE, "fwd", 1024, 2.5),
    Target("forward + backward, factors R = 32", Kind.FACTORS, "fwdbwd", 384, 0.75),
    Target("forward + backward, factors R = 32", Kind.FACTORS, "fwdbwd", 768, 4.2, 3.5),
    Target("forward + backward, factors R = 32", Kind.FACTORS, "fwdbwd", 1024, 9.5),
    Target("forward + backward, dense bias", Kind.DENSE, "fwdbwd", 768, 5.6),
)


class Outcome(NamedTuple):
    """One line of the summary; times in ms, None where there is no valid result."""

    target: Target
    ms: float | None
    timing: str | None
    peer: str | None
    peer_ms: float | None

    @property
    def verdict(self) -> str:
        if self.ms is None:
            return "not measured"
        if self.ms > self.target.ms:
            return "missed"
        return "met, aim too" if self.target.aim is not None and self.ms <= self.target.aim else "met"


def outcomes(rows: list[dict[str, Any]]) -> list[Outcome]:
    """Every target beside our time and the fastest peer that computes the same with the bias in whatever form."""
    valid = [row for row in rows if row.get("section") == "targets" and row["op"] == "triangle_attention"]
    valid = [row for row in valid if "ms_median" in row]
    found = []
    for target in TARGETS:
        same = [row for row in valid if (row["direction"], row["n"]) == (target.direction, target.n)]
        ours = [row for row in same if row["impl"] == f"pairformer_fast {target.kind}"]
        peers = [row for row in same if not row["impl"].startswith("pairformer_fast") and row["bias"] in BIASED]
        peer = min(peers, key=lambda row: row["ms_median"], default={})
        own: dict[str, Any] = ours[-1] if ours else {}
        times = own.get("ms_median"), own.get("timing"), peer.get("impl"), peer.get("ms_median")
        found.append(Outcome(target, *times))
    return found


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Print a table of :func:`outcomes`."""
    table = Table("target", "N", "ms at most", "aim", "ours", "timing", "", "best peer with a bias", "its ms", "ratio")
    for line in outcomes(rows):
        ratio = line.peer_ms / line.ms if line.ms and line.peer_ms else None
        cells = (line.target.ms, line.target.aim, line.ms, line.timing, line.verdict, line.peer, line.peer_ms, ratio)
        table.add_row(line.target.wording, str(line.target.n), *map(_cell, cells))
    Console(width=160).print(table)


def _cell(value: float | str | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.3g}"
