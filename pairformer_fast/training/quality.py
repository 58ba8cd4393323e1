"""Geometric checks of a backbone, to keep broken parts of predictions out of the training data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from pairformer_fast.model.rigid import distances
from pairformer_fast.training.shards import Structure

PEPTIDE_BOND = 1.33
"""Length of the C-N bond between residues, Å (Engh and Huber 1991)."""

PEPTIDE_DEVIATION = 0.15
"""Largest accepted deviation of a predicted peptide bond, Å."""

MAX_BROKEN = 0.1
"""Largest accepted share of residues at a broken peptide bond."""

CHAIN_BREAK = 2.0
"""C-N distance from which a chain counts as torn, Å."""

MAX_REPAIR = 3.0
"""Largest accepted motion of a CA when a backbone is repaired, Å."""

CLASH = 3.0
"""Smallest accepted CA-CA distance of residues that are no neighbours, Å."""

SURE = 0.85
"""Least accepted confidence of a prediction (mean pLDDT over 100)."""


def checked(before: Structure, after: Structure) -> tuple[Structure | None, str]:
    """A repaired prediction as a target; None and the problem if it is none.

    Parameters
    ----------
    before, after : Structure
        Prediction, with its confidence as weight, and the same with closed peptide bonds.

    Returns
    -------
    structure : Structure or None
    problem : str
        ``unsure``, ``repaired_too_far``, one of :func:`keep_sound`, or empty.
    """
    if before.weight < SURE:
        return None, "unsure"
    if repaired_too_far(before, after):
        return None, "repaired_too_far"
    return keep_sound(after)


def keep_sound(structure: Structure) -> tuple[Structure | None, str]:
    """Mask the residues at broken peptide bonds, or reject the structure.

    Parameters
    ----------
    structure : Structure
        With complete backbone.

    Returns
    -------
    structure : Structure or None
        With a smaller ``atom14_mask``; None if too much is wrong.
    problem : str
        ``torn_chain``, ``broken_bonds``, ``ca_clash`` or empty.
    """
    n, ca, c = (structure.atom14[:, atom].astype(np.float64) for atom in range(3))
    bonded = structure.chain_index[1:] == structure.chain_index[:-1]
    peptide = np.linalg.norm(c[:-1] - n[1:], axis=-1)
    if (peptide[bonded] > CHAIN_BREAK).any():
        return None, "torn_chain"
    off = bonded & (np.abs(peptide - PEPTIDE_BOND) > PEPTIDE_DEVIATION)
    broken = np.zeros(len(structure), dtype=bool)
    broken[:-1] |= off
    broken[1:] |= off
    if broken.mean() > MAX_BROKEN:
        return None, "broken_bonds"
    whole = torch.from_numpy(np.where(broken[:, None], np.nan, ca))
    # the comparison with NaN is False
    if bool((distances(whole) < CLASH).triu(2).any()):
        return None, "ca_clash"
    return replace(structure, atom14_mask=structure.atom14_mask & ~broken[:, None]), ""


def repaired_too_far(before: Structure, after: Structure) -> bool:
    """Whether a repair moved any CA by more than :data:`MAX_REPAIR`: then the prediction was no structure there."""
    return bool((np.linalg.norm(after.atom14[:, 1] - before.atom14[:, 1], axis=-1) > MAX_REPAIR).any())
