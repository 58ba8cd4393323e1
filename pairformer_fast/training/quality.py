"""Geometric checks of a backbone, to keep broken predictions out of the training data."""

from __future__ import annotations

import numpy as np

from pairformer_fast.model.residue import RESTYPES
from pairformer_fast.training.shards import Structure

TRANS = (3.6, 4.0)
"""CA-CA distance of neighbours with a trans peptide bond, Å."""

CIS = (2.7, 3.2)
"""CA-CA distance of neighbours with a cis peptide bond, Å; accepted before proline only."""

BONDS = {"N-CA": (1.46, 0.08), "CA-C": (1.525, 0.08), "C-N": (1.33, 0.15)}
"""Length of backbone bonds and the accepted deviation, Å."""

CLASH = 3.2
"""Smallest accepted CA-CA distance of residues that are not neighbours, Å."""


def backbone_problem(structure: Structure) -> str | None:
    """Name of the first thing wrong with a complete backbone, or None.

    Returns
    -------
    str or None
        ``missing_atoms``, ``bond_length``, ``ca_ca_distance`` or ``ca_clash``.
    """
    if not structure.atom14_mask[:, :3].all():
        return "missing_atoms"
    n, ca, c = (structure.atom14[:, atom].astype(np.float64) for atom in range(3))
    bonded = structure.chain_index[1:] == structure.chain_index[:-1]
    lengths = {"N-CA": _distance(n, ca), "CA-C": _distance(ca, c), "C-N": _distance(c[:-1], n[1:])[bonded]}
    if any((np.abs(lengths[bond] - ideal) > deviation).any() for bond, (ideal, deviation) in BONDS.items()):
        return "bond_length"
    step = _distance(ca[:-1], ca[1:])
    before_proline = structure.aatype[1:] == RESTYPES.index("P")
    trans, cis = _within(step, TRANS), _within(step, CIS)
    if not (trans | cis & before_proline)[bonded].all():
        return "ca_ca_distance"
    apart = np.linalg.norm(ca[:, None] - ca[None], axis=-1)
    apart[np.tri(len(ca), k=1, dtype=bool)] = np.inf
    return "ca_clash" if apart.min(initial=np.inf) < CLASH else None


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a - b, axis=-1)


def _within(values: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    return (values >= bounds[0]) & (values <= bounds[1])
