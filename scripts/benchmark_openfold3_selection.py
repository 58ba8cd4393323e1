"""Cases of the OpenFold3 benchmark, and the part of them that a run measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmark_openfold3_implementations import IMPLEMENTATIONS, Implementation
from benchmark_openfold3_problem import DRY, FULL, Size
from benchmark_selection import check_known, matches, split

DRY_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """One part of the model at one number of tokens."""

    section: str
    n: int

    @property
    def training(self) -> bool:
        return self.section == "training"


def cases() -> Iterator[Case]:
    """Every case, those of one model and size together, the slowest last."""
    forward = ("trunk", "diffusion", "whole")
    for n, sections in ((384, forward), (768, forward), (384, ("training",)), (640, ("training",)), (1024, forward)):
        for section in sections:
            yield Case(section, n)


@dataclass(frozen=True)
class OpenFold3Selection:
    """Part of the cases and implementations; empty means all. A dry run has one small size of everything."""

    sections: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    patterns: tuple[str, ...] = ()
    dry: bool = False

    @classmethod
    def parse(cls, only: str, sizes: str, impl: str, dry: bool) -> OpenFold3Selection:
        """Read comma-separated options; a pattern with a leading ``!`` excludes.

        Raises
        ------
        ValueError
            If a section or size is not one the benchmark has, or if nothing is left to measure.
        """
        check_known(only, sizes, cases())
        selection = cls(split(only), tuple(int(n) for n in split(sizes)), split(impl), dry)
        if not selection.cases() or not selection.implementations():
            raise ValueError(f"nothing is left of --only {only!r}, --sizes {sizes!r} and --impl {impl!r}")
        return selection

    @property
    def size(self) -> Size:
        """Blocks of the model."""
        return DRY if self.dry else FULL

    def cases(self) -> list[Case]:
        """The chosen cases."""
        chosen = [case for case in cases() if not self.sections or case.section in self.sections]
        if self.dry:
            return [Case(section, DRY_TOKENS) for section in dict.fromkeys(case.section for case in chosen)]
        return [case for case in chosen if not self.sizes or case.n in self.sizes]

    def implementations(self) -> list[Implementation]:
        """The chosen implementations."""
        return [one for one in IMPLEMENTATIONS if matches(self.patterns, one.name)]
