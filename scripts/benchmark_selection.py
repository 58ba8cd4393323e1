"""Cases of the attention benchmark, and the part of them that a run measures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from benchmark_implementations import IMPLEMENTATIONS, Implementation
from benchmark_problem import Case, Kind

DIRECTIONS = ("fwd", "fwdbwd")
RANKS = (8, 16, 32, 64, 96)
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)


def cases() -> Iterator[Case]:
    """Every case, the targets first."""
    for n in (384, 768, 1024):
        for direction in DIRECTIONS:
            yield Case("targets", direction, n, n)
    for n in (256, 512, 2048):
        for direction in DIRECTIONS if n < 2048 else ("fwd",):
            yield Case("sizes", direction, n, n)
    for direction in DIRECTIONS:
        medium = Case("masked", direction, 768, 768, masked=True)
        yield medium
        yield replace(medium, section="fp16", dtype=torch.float16, masked=False)
        yield replace(medium, section="dim64", dim=64, masked=False)
        own = replace(medium, section="structured", masked=False, kinds=(Kind.STRUCTURED,), peers=False)
        yield own
        own = own if own.backward else replace(own, n=1024, rows=1024)
        for rank in RANKS:
            yield replace(own, section="ranks", rank=rank, kinds=(Kind.FACTORS,))
        for share in SHARES:
            yield replace(own, section="shares", dense_share=share, kinds=(Kind.MIXED,))
        for n in (384, 1024) if medium.backward else (384, 768, 1024, 2048):
            yield Case("single", direction, n, None, heads=16, dim=24)
    yield Case("long", "fwd", 4096, 4096)


@dataclass(frozen=True)
class Selection:
    """Part of the cases and implementations; empty means all."""

    sections: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    patterns: tuple[str, ...] = ()
    directions: tuple[str, ...] = ()

    @classmethod
    def parse(cls, only: str, sizes: str, impl: str, direction: str) -> Selection:
        """Read comma-separated options; a pattern with a leading ``!`` excludes.

        Raises
        ------
        ValueError
            If a section, size or direction is not one the benchmark has, or if no implementation is left.
        """
        known = list(dict.fromkeys(case.section for case in cases()))
        sections = tuple(part for name in split(only) for part in (known[1:] if name == "extra" else [name]))
        if unknown := set(sections) - set(known):
            raise ValueError(f"--only knows extra, {', '.join(known)}, but got {', '.join(sorted(unknown))}")
        if direction and direction not in DIRECTIONS:
            raise ValueError(f"--direction must be fwd or fwdbwd, but got {direction}")
        measured = sorted({case.n for case in cases()})
        if unknown := set(split(sizes)) - {str(n) for n in measured}:
            raise ValueError(f"--sizes knows {', '.join(map(str, measured))}, but got {', '.join(sorted(unknown))}")
        directions = (direction,) if direction else ()
        selection = cls(sections, tuple(int(n) for n in split(sizes)), split(impl), directions)
        if not any(selection.takes(implementation) for implementation in IMPLEMENTATIONS):
            names = ", ".join(implementation.name for implementation in IMPLEMENTATIONS)
            raise ValueError(f"--impl {impl} matches none of: {names}")
        return selection

    def cases(self) -> list[Case]:
        """The chosen cases."""
        chosen = (case for case in cases() if not self.sections or case.section in self.sections)
        chosen = (case for case in chosen if not self.sizes or case.n in self.sizes)
        return [case for case in chosen if not self.directions or case.direction in self.directions]

    def implementations(self, case: Case) -> list[Implementation]:
        """Those chosen for a case."""
        chosen = [one for one in IMPLEMENTATIONS if one.kind in case.kinds and (case.peers or one.ours)]
        return [one for one in chosen if self.takes(one)]

    def takes(self, implementation: Implementation) -> bool:
        """Whether a pattern names the implementation and none excludes it."""
        return matches(self.patterns, implementation.name)


def matches(patterns: tuple[str, ...], name: str) -> bool:
    """Whether a pattern, or there being none, names ``name`` and none with a leading ``!`` does."""
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    named = not wanted or any(fnmatch(name, pattern) for pattern in wanted)
    return named and not any(fnmatch(name, pattern) for pattern in unwanted)


def split(option: str) -> tuple[str, ...]:
    """Parts of a comma-separated option."""
    return tuple(part.strip() for part in option.split(",") if part.strip())


def check_known(only: str, sizes: str, cases: Iterable[Any]) -> None:
    """Raise ValueError if a section of ``--only`` or one of ``--sizes`` is not the ``section`` or ``n`` of any case."""
    cases = list(cases)
    known = list(dict.fromkeys(case.section for case in cases))
    if unknown := set(split(only)) - set(known):
        raise ValueError(f"--only knows {', '.join(known)}, but got {', '.join(sorted(unknown))}")
    measured = sorted({case.n for case in cases})
    if unknown := set(split(sizes)) - {str(n) for n in measured}:
        raise ValueError(f"--sizes knows {', '.join(map(str, measured))}, but got {', '.join(sorted(unknown))}")
