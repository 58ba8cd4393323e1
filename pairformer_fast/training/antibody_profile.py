"""Derive the framework profiles of :mod:`pairformer_fast.inference.antibody` from annotated sequences."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from pairformer_fast.model.residue import RESTYPES

PSEUDOCOUNT = 10.0
"""Background counts added to each column."""


@dataclass(frozen=True)
class ProfileShape:
    """Lengths of the framework blocks FR1, FR2, FR3 start, FR3 end, FR4 and of the loops between them.

    FR3 has its insertions and deletions (rabbit, lambda V-gene families) in one turn, which counts as a loop.
    """

    name: str
    chain_type: str
    blocks: tuple[int, int, int, int, int]
    loops: tuple[tuple[int, int, int], ...]


HEAVY = ProfileShape("heavy", "H", (25, 17, 16, 19, 11), ((3, 17, 1), (2, 15, 2), (0, 7, 0), (2, 70, 3)))
KAPPA = ProfileShape("kappa", "L", (26, 17, 13, 19, 10), ((3, 15, 1), (2, 10, 2), (2, 8, 0), (3, 40, 3)))
LAMBDA = ProfileShape("lambda", "L", (25, 17, 13, 19, 10), ((3, 15, 1), (2, 10, 2), (2, 8, 0), (3, 40, 3)))

_LIGHT = re.compile(
    r"(?P<fr1>[A-Z]{15,22}C[A-Z]{3})(?P<cdr1>[A-Z]{3,14})(?P<fr2>[A-Z]{2}W[YFHLV][A-Z]{13})(?P<cdr2>[A-Z]{3})"
    r"(?P<fr3>[A-Z]{29}D[A-Z]{3}Y[YFH]C)(?P<cdr3>[A-Z]{5,15})(?P<fr4>FG[A-Z]GT[A-Z]{2}(?P<type>[A-Z])[A-Z]{2})"
)


def split_heavy(sequence: str, cdr: str) -> list[str]:
    """Framework regions FR1 to FR4 of an annotated heavy chain (a CDR digit per residue)."""
    runs = [
        "".join(aa for aa, _ in run) for _, run in groupby(zip(sequence, cdr, strict=True), key=lambda pair: pair[1])
    ]
    return runs[::2]


def split_light(sequence: str) -> tuple[str, list[str]] | None:
    """``kappa`` or ``lambda`` and FR1 to FR4 of a light chain of regular length, by its conserved residues.

    Anchors are Cys 23, Trp 41, Cys 104 and the FG.G motif (IMGT numbers); None if they are not where they mostly are.
    """
    match = _LIGHT.match(sequence)
    if match is None or match["type"] not in "EDT":
        return None
    return "lambda" if match["type"] == "T" else "kappa", [match["fr1"], match["fr2"], match["fr3"], match["fr4"]]


def build_profile(shape: ProfileShape, frameworks: Iterable[list[str]]) -> dict:
    """Profile in its JSON form: log-odds against the composition of the frameworks, in units of 0.1 bit.

    Parameters
    ----------
    shape : ProfileShape
    frameworks : iterable of list of str
        FR1 to FR4 of each domain. FR1 may be shorter (aligned at its end), FR2 and FR4 are cut or skipped to shape, FR3
        gives its first and last residues.
    """
    counts = [np.zeros((length, len(RESTYPES))) for length in shape.blocks]
    for fr1, fr2, fr3, fr4 in frameworks:
        parts = (fr1[-shape.blocks[0] :], fr2, fr3[: shape.blocks[2]], fr3[-shape.blocks[3] :], fr4[: shape.blocks[4]])
        for count, part in zip(counts, parts, strict=True):
            if count is not counts[0] and len(part) != len(count):
                continue
            for column, aa in enumerate(part, start=len(count) - len(part)):
                count[column, RESTYPES.index(aa)] += 1
    background = sum(count.sum(axis=0) for count in counts) + 1
    background /= background.sum()
    scores = []
    for count in counts:
        frequency = (count + PSEUDOCOUNT * background) / (count.sum(axis=1, keepdims=True) + PSEUDOCOUNT)
        scores.append(np.rint(10 * np.log2(frequency / background)).astype(int).tolist())
    return {
        "name": shape.name,
        "chain_type": shape.chain_type,
        "loops": [list(loop) for loop in shape.loops],
        "blocks": scores,
    }
