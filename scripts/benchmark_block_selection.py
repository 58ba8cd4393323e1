"""Cases of the block benchmark, and the part of them that a run measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from benchmark_block_implementations import BLOCKS, Implementation
from benchmark_block_operations import implementations
from benchmark_block_problem import Case
from benchmark_selection import check_known, matches, split


def cases() -> Iterator[Case]:
    """Every case, those with a target first and the quick ones of these before the slow."""
    for n in (384, 768, 1024):
        yield Case("forward", "fwd", n)
    for n in (384, 640):
        yield Case("training", "fwdbwd", n, dtype=torch.float32)
    yield Case("forward", "fwd", 2048)
    for op in (
        "triangle_multiplication",
        "triangle_attention",
        "layer_norm_linear",
        "gated_output",
        "transition",
        "attention_pair_bias",
    ):
        for n in (768, 1024):
            yield Case("operations", "fwd", n, op=op)
    yield Case("long", "fwd", 4096, peers=False)


@dataclass(frozen=True)
class BlockSelection:
    """Part of the cases and implementations; empty means all."""

    sections: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    patterns: tuple[str, ...] = ()

    @classmethod
    def parse(cls, only: str, sizes: str, impl: str) -> BlockSelection:
        """Read comma-separated options; a pattern with a leading ``!`` excludes.

        Raises
        ------
        ValueError
            If a section or size is not one the benchmark has, or if nothing is left to measure.
        """
        check_known(only, sizes, cases())
        selection = cls(split(only), tuple(int(n) for n in split(sizes)), split(impl))
        if not any(selection.implementations(case) for case in selection.cases()):
            raise ValueError(f"nothing is left of --only {only!r}, --sizes {sizes!r} and --impl {impl!r}")
        return selection

    def cases(self) -> list[Case]:
        """The chosen cases."""
        chosen = (case for case in cases() if not self.sections or case.section in self.sections)
        return [case for case in chosen if not self.sizes or case.n in self.sizes]

    def implementations(self, case: Case) -> list[Implementation]:
        """Those chosen for a case."""
        chosen = [
            one for one in (*BLOCKS, *implementations()) if one.op == case.op and case.direction in one.directions
        ]
        chosen = [one for one in chosen if case.n <= one.largest_n and (case.peers or one.ours)]
        return [one for one in chosen if matches(self.patterns, one.name)]
