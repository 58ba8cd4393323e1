"""Is a sequence one antibody variable domain, and where are its CDRs?

A variable domain is five conserved framework blocks (FR1, FR2, FR3 in two parts, FR4) joined by loops of any
sequence. Each block is a position-specific log-odds matrix; the best placement of all blocks, with every loop length in
its allowed range, is found exactly by dynamic programming. Three profiles (heavy, kappa, lambda) are shipped in
``data/antibody_profile.json``, derived from SAbDab and CoV-AbDab by ``scripts/make_antibody_profile.py``. CDRs follow
the IMGT definition, as in SAbDab's annotation of the training data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from pairformer_fast.model.residue import RESTYPES, UNKNOWN

MISSING_START = 12
"""Framework residues that may be absent at the start of a domain."""

MISSING_END = 8
"""Framework residues that may be absent at the end of a domain."""

EXTRA_START = 10
"""Residues before the first framework residue that still count as the domain."""

EXTRA_END = 12
"""Residues after the last framework residue that still count as the domain."""

MIN_LENGTH = 85
"""Shortest sequence in which all framework blocks and loops fit."""

_CHAIN_NAMES = {"H": "heavy", "L": "light"}


@dataclass(frozen=True)
class DomainCheck:
    """Answer of :func:`check_variable_domain`.

    Attributes
    ----------
    is_variable : bool
        The sequence is one antibody variable domain and little else.
    chain_type : "H", "L" or None
        Heavy (VH, VHH) or light (kappa, lambda); of the best domain found, even if the sequence is rejected.
    cdr : str
        A digit per residue: 0 framework, 1, 2, 3 the CDR (IMGT). Empty if ``is_variable`` is false.
    reason : str
        What was found, and for a rejected sequence what to change.
    """

    is_variable: bool
    chain_type: Literal["H", "L"] | None
    cdr: str
    reason: str


@dataclass(frozen=True)
class Profile:
    """Framework blocks of one kind of variable domain.

    Attributes
    ----------
    name : str
        heavy, kappa or lambda.
    chain_type : "H" or "L"
    blocks : tuple of numpy.ndarray
        Log-odds in bits, each ``[columns, 21]`` float32, amino acids in the order of ``RESTYPES``, the last unknown.
    loops : tuple of (int, int, int)
        Shortest length, longest length and CDR number (0 for a loop within framework) between consecutive blocks.
    """

    name: str
    chain_type: Literal["H", "L"]
    blocks: tuple[np.ndarray, ...]
    loops: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Hit:
    """Best placement of a profile: score in bits and the start of each block in the sequence (may be negative)."""

    score: float
    starts: tuple[int, ...]
    profile: Profile

    @property
    def span(self) -> tuple[int, int]:
        """First residue and one past the last, not clipped to the sequence."""
        return self.starts[0], self.starts[-1] + len(self.profile.blocks[-1])

    def annotate(self, length: int) -> str:
        """CDR digit of each of ``length`` residues."""
        digits = np.zeros(length, dtype=int)
        for start, block, following, (_, _, cdr) in zip(
            self.starts, self.profile.blocks, self.starts[1:], self.profile.loops, strict=False
        ):
            digits[max(start + len(block), 0) : max(following, 0)] = cdr
        return "".join(map(str, digits))


@cache
def load_profiles() -> tuple[tuple[Profile, ...], float]:
    """Shipped profiles and the score in bits from which a placement counts as a variable domain."""
    data = json.loads((resources.files("pairformer_fast.data") / "antibody_profile.json").read_text(encoding="utf-8"))
    return tuple(parse_profile(entry) for entry in data["profiles"]), float(data["threshold_bits"])


def parse_profile(entry: dict) -> Profile:
    """Profile from its JSON form, in which scores are integers in units of 0.1 bit."""
    blocks = [np.array(block, dtype=np.float32) / 10 for block in entry["blocks"]]
    return Profile(
        name=entry["name"],
        chain_type=entry["chain_type"],
        blocks=tuple(np.pad(block, ((0, 0), (0, 1))) for block in blocks),
        loops=tuple(tuple(loop) for loop in entry["loops"]),
    )


def find_domain(codes: np.ndarray, profile: Profile) -> Hit:
    """Best placement of a profile's blocks in a sequence.

    Parameters
    ----------
    codes : numpy.ndarray
        ``[N]`` int, index into ``RESTYPES``, 20 for unknown (scores 0).
    profile : Profile

    Returns
    -------
    Hit
        With score ``-inf`` if the sequence is too short for the profile.
    """
    padded = np.pad(codes, (MISSING_START, MISSING_END), constant_values=UNKNOWN)
    total, choices = np.zeros(0, dtype=np.float32), []
    for b, block in enumerate(profile.blocks):
        places = len(padded) - len(block) + 1
        if places < 1:
            return Hit(-np.inf, (), profile)
        score = sum(column[padded[c : c + places]] for c, column in enumerate(block))
        if b == 0:
            total = score
            continue
        shortest, longest, _ = profile.loops[b - 1]
        width = longest - shortest + 1
        shift = len(profile.blocks[b - 1]) + longest
        # window[i] holds the previous block's totals at starts i - shift ... i - shift + width - 1
        before = np.full(places + width, -np.inf, dtype=np.float32)
        count = max(min(len(total), len(before) - shift), 0)
        before[shift : shift + count] = total[:count]
        window = sliding_window_view(before, width)[:places]
        choice = window.argmax(axis=1)
        choices.append(np.arange(places) - shift + choice)
        total = score + window[np.arange(places), choice]
    starts = [int(total.argmax())]
    best = float(total[starts[0]])
    if best == -np.inf:
        return Hit(best, (), profile)
    for previous in reversed(choices):
        starts.append(int(previous[starts[-1]]))
    return Hit(best, tuple(start - MISSING_START for start in reversed(starts)), profile)


def best_hit(sequence: str) -> Hit:
    """Best placement over all profiles; unknown letters score 0."""
    codes = np.array([RESTYPES.find(aa) % (UNKNOWN + 1) for aa in sequence], dtype=np.int64)
    return max((find_domain(codes, profile) for profile in load_profiles()[0]), key=lambda hit: hit.score)


def check_variable_domain(sequence: str) -> DomainCheck:
    """Check that a sequence is exactly one antibody variable domain (VH, VHH or VL) and annotate its CDRs.

    Parameters
    ----------
    sequence : str
        One-letter codes, upper case.

    Returns
    -------
    DomainCheck
        Never raises: whatever the sequence is, ``reason`` says it.
    """
    if len(sequence) < MIN_LENGTH:
        return DomainCheck(
            False, None, "", f"{len(sequence)} residues are too few for a variable domain (at least {MIN_LENGTH})"
        )
    hits = _domains(sequence, 0)
    if not hits:
        return DomainCheck(False, None, "", "no antibody variable domain found; these weights fold VH, VHH and VL only")
    (start, end, hit), *others = hits
    kind = hit.profile.chain_type
    if others:
        spans = " and ".join(f"residues {a + 1}-{b} ({_CHAIN_NAMES[h.profile.chain_type]})" for a, b, h in hits)
        return DomainCheck(
            False, kind, "", f"{spans} look like variable domains; give them as separate chains, joined by ':'"
        )
    found = f"residues {start + 1}-{end} look like a {_CHAIN_NAMES[kind]}-chain variable domain"
    if start > EXTRA_START or len(sequence) - end > EXTRA_END:
        return DomainCheck(False, kind, "", f"{found}; trim the rest")
    return DomainCheck(True, kind, hit.annotate(len(sequence)), found)


def _domains(sequence: str, offset: int) -> list[tuple[int, int, Hit]]:
    """All variable domains in order: first residue, one past the last (both from ``offset``), placement."""
    if len(sequence) < MIN_LENGTH:
        return []
    hit = best_hit(sequence)
    if hit.score < load_profiles()[1]:
        return []
    start, end = max(hit.span[0], 0), min(hit.span[1], len(sequence))
    before, after = _domains(sequence[:start], offset), _domains(sequence[end:], offset + end)
    return [*before, (offset + start, offset + end, hit), *after]
