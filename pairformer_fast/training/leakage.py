"""Keep training and evaluation apart: antibodies that share a CDR-H3 cluster or nearly a whole domain.

Two VH domains leak into each other if their CDR-H3s have the same length and at least 60 % identical residues, or if
their domains are at least 95 % identical in a global alignment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from Bio.Align import PairwiseAligner

CDR3_IDENTITY = 0.6
DOMAIN_IDENTITY = 0.95


@dataclass(frozen=True)
class HeavyChain:
    """What a leak is judged by.

    Attributes
    ----------
    id : str
    sequence : str
        The VH domain.
    cdr3 : frozenset of str
        CDR-H3, possibly by several annotations; a leak by any of them counts.
    """

    id: str
    sequence: str
    cdr3: frozenset[str] = field(default_factory=frozenset)


def annotated_chain(id: str, sequence: str, annotations: Iterable[str], cdr3: Iterable[str] = ()) -> HeavyChain:
    """Chain with the CDR-H3s of some annotations (a digit per residue, longer ones are cut) and others."""
    found = ("".join(aa for aa, digit in zip(sequence, cdr, strict=False) if digit == "3") for cdr in annotations)
    return HeavyChain(id, sequence, frozenset({*found, *cdr3} - {""}))


@dataclass(frozen=True)
class Leak:
    """One training domain that shares a cluster with an evaluation domain, and by what ("cdr3" or "domain")."""

    train: str
    held_out: str
    by: str


class LeakageError(ValueError):
    """Training data shares clusters with evaluation data."""


class HeldOut:
    """Evaluation domains, prepared for many comparisons.

    Parameters
    ----------
    chains : sequence of HeavyChain
    """

    def __init__(self, chains: Sequence[HeavyChain]) -> None:
        self.chains = list(chains)
        self._cdr3: dict[int, tuple[np.ndarray, list[str]]] = {}
        for length in {len(cdr3) for chain in chains for cdr3 in chain.cdr3 if cdr3}:
            members = [(cdr3, chain.id) for chain in chains for cdr3 in sorted(chain.cdr3) if len(cdr3) == length]
            self._cdr3[length] = (_letters([cdr3 for cdr3, _ in members]), [name for _, name in members])
        self._compositions = np.array([_composition(chain.sequence) for chain in chains]).reshape(-1, 128)
        self._lengths = np.array([len(chain.sequence) for chain in chains], dtype=np.int64)
        self._aligner = PairwiseAligner(match_score=1, mismatch_score=0, open_gap_score=0, extend_gap_score=0)

    def leak(self, chain: HeavyChain) -> Leak | None:
        """First leak of a training domain, if it has one.

        Identity over the domain is identical pairs of a global alignment (match 1, mismatch and gap 0, so the most
        there can be) over the length of the longer sequence.
        """
        return self._cdr3_leak(chain) or self._domain_leak(chain)

    def _cdr3_leak(self, chain: HeavyChain) -> Leak | None:
        for cdr3 in sorted(chain.cdr3):
            if len(cdr3) not in self._cdr3:
                continue
            letters, names = self._cdr3[len(cdr3)]
            # integer comparison: identity >= 60 % without rounding
            identical = (letters == _letters([cdr3])).sum(axis=1)
            close = np.flatnonzero(identical >= CDR3_IDENTITY * len(cdr3) - 1e-9)
            if len(close):
                return Leak(chain.id, names[close[0]], "cdr3")
        return None

    def _domain_leak(self, chain: HeavyChain) -> Leak | None:
        needed = DOMAIN_IDENTITY * np.maximum(self._lengths, len(chain.sequence)) - 1e-9
        # identical pairs cannot exceed the letters both have: skips nearly all alignments
        common = np.minimum(self._compositions, _composition(chain.sequence)).sum(axis=1)
        for index in np.flatnonzero(common >= needed):
            other = self.chains[index]
            if self._aligner.score(chain.sequence, other.sequence) >= needed[index]:
                return Leak(chain.id, other.id, "domain")
        return None


def find_leaks(train: Iterable[HeavyChain], held_out: Sequence[HeavyChain]) -> list[Leak]:
    """First leak of each training domain that has one (:meth:`HeldOut.leak`), in the order of ``train``."""
    domains = HeldOut(held_out)
    return [leak for chain in train if (leak := domains.leak(chain)) is not None]


def check_leakage(train: Iterable[HeavyChain], held_out: Sequence[HeavyChain]) -> None:
    """Confirm that no training domain shares a cluster with evaluation data.

    Raises
    ------
    LeakageError
        Naming the first of them.
    """
    leaks = find_leaks(train, held_out)
    if leaks:
        shown = ", ".join(f"{leak.train} with {leak.held_out} ({leak.by})" for leak in leaks[:5])
        raise LeakageError(f"{len(leaks)} training domains share a cluster with evaluation data: {shown}")


def _letters(sequences: Sequence[str]) -> np.ndarray:
    return np.array([list(sequence.encode()) for sequence in sequences], dtype=np.uint8)


def _composition(sequence: str) -> np.ndarray:
    return np.bincount(np.frombuffer(sequence.encode(), dtype=np.uint8), minlength=128)
