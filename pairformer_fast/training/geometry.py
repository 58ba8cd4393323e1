"""Stereochemistry of all heavy atoms: bond lengths, bond angles, peptide bonds, clashes and chirality.

Ideal lengths and angles are Biopython's averages over crystal structures (``Bio.PDB.ic_data.hedra_defaults``), by
residue type; the few that it lacks (ring closures, last angles of branches) are those of the ideal coordinates of the
Chemical Component Dictionary, as biotite has them. None of them comes from this package's own ideal geometry.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import cast

import biotite.structure as struc
import biotite.structure.info as info
import numpy as np
from Bio.PDB.ic_data import hedra_defaults

from pairformer_fast.model.residue import ATOM14, CLASH_OVERLAP, RESTYPES, THREE_LETTER, VDW_RADIUS
from pairformer_fast.training.shards import Structure

DISULFIDE = 2.5
"""SG-SG distance, Å, below which two cysteines count as bonded."""

_N, _CA, _C, _O, _CB = range(5)
_AVERAGES = {name: cast(tuple[float, float, float], entry[0]) for name, entry in hedra_defaults.items()}


@dataclass(frozen=True)
class Geometry:
    """How far a structure is from ideal.

    Attributes
    ----------
    bond_rms : float
        RMS deviation of all bond lengths, peptide bonds with them, Å.
    angle_rms : float
        RMS deviation of all bond angles, those at peptide bonds with them, degrees.
    peptide_rms : float
        RMS deviation of the length of peptide bonds, Å.
    clashes : float
        Clashing pairs of heavy atoms per 100 residues; see :func:`count_clashes`.
    inverted : int
        Residues whose CA has the wrong hand (D amino acids).
    """

    bond_rms: float
    angle_rms: float
    peptide_rms: float
    clashes: float
    inverted: int


@dataclass(frozen=True)
class IdealResidue:
    """Bonds ``[M, 2]`` and angles ``[K, 3]`` as atom14 indices; lengths ``[M]`` in Å and values ``[K]`` in degrees."""

    bonds: np.ndarray
    lengths: np.ndarray
    angles: np.ndarray
    values: np.ndarray


def measure_geometry(structure: Structure) -> Geometry:
    """Bonds, angles, clashes and chirality of the atoms that ``atom14_mask`` keeps.

    Parameters
    ----------
    structure : Structure
        Residues that follow one another in a chain (``residue_index``) count as bonded, however far apart they are.
    """
    atoms = np.where(structure.atom14_mask[..., None], structure.atom14, np.nan).astype(np.float64)
    lengths, angles = [], []
    for aa in np.unique(structure.aatype):
        ideal, of_type = ideal_residue(RESTYPES[aa]), atoms[structure.aatype == aa]
        first, second = (of_type[:, side] for side in ideal.bonds.T)
        lengths.append(struc.distance(first, second) - ideal.lengths)
        angles.append(_angle(*(of_type[:, corner] for corner in ideal.angles.T)) - ideal.values)
    peptide_lengths, peptide_angles = _peptides(structure, atoms)
    return Geometry(
        bond_rms=_rms(*lengths, peptide_lengths),
        angle_rms=_rms(*angles, peptide_angles),
        peptide_rms=_rms(peptide_lengths),
        clashes=100 * count_clashes(structure) / len(structure),
        inverted=int((_handedness(atoms) < 0).sum()),
    )


def count_clashes(structure: Structure) -> int:
    """Pairs of heavy atoms nearer than the sum of their van der Waals radii (Bondi 1964) less 0.4 Å.

    Atoms of the same residue, of residues that follow one another and of two cysteines with a disulfide bond do not
    count. Short hydrogen bonds do, so that crystals have some, too.

    Parameters
    ----------
    structure : Structure
    """
    residue, slot = np.nonzero(structure.atom14_mask)
    if not len(residue):
        return 0
    names = np.array([ATOM14[RESTYPES[structure.aatype[i]]][j] for i, j in zip(residue, slot, strict=True)])
    radii = np.array([VDW_RADIUS[name[0]] for name in names])
    coord = structure.atom14[residue, slot].astype(np.float32)
    reach = 2 * max(VDW_RADIUS.values()) - CLASH_OVERLAP
    near = struc.CellList(coord, reach).create_adjacency_matrix(reach)
    first, second = np.nonzero(np.triu(near, 1))
    apart = np.linalg.norm(coord[first] - coord[second], axis=-1)
    joined = np.eye(len(structure), dtype=bool)
    following = np.flatnonzero(_bonded(structure))
    joined[following, following + 1] = True
    disulfide = (names[first] == "SG") & (names[second] == "SG") & (apart < DISULFIDE)
    joined[residue[first[disulfide]], residue[second[disulfide]]] = True
    clash = (apart < radii[first] + radii[second] - CLASH_OVERLAP) & ~joined[residue[first], residue[second]]
    return int(clash.sum())


@cache
def ideal_residue(letter: str) -> IdealResidue:
    """Bonds and angles between the heavy atoms of a residue.

    Parameters
    ----------
    letter : str
        One-letter code.
    """
    names, component = ATOM14[letter], info.residue(THREE_LETTER[letter])
    place = {name: component.coord[component.atom_name == name][0] for name in names}
    bonds = [bond for bond in info.bonds_in_residue(THREE_LETTER[letter]) if set(bond) <= set(names)]
    lengths = {frozenset((a, b)): float(struc.distance(place[a], place[b])) for a, b in bonds}
    partners = {atom: [name for name in names if frozenset((atom, name)) in lengths] for atom in names}
    corners = [(a, atom, b) for atom in names for a, b in combinations(partners[atom], 2)]
    values = [float(_angle(*(place[name] for name in corner))) for corner in corners]
    for number, corner in enumerate(corners):
        if known := _average(*(letter + name for name in corner)):
            lengths[frozenset(corner[:2])], values[number], lengths[frozenset(corner[1:])] = known
    return IdealResidue(
        bonds=np.array([[names.index(a), names.index(b)] for a, b in bonds]),
        lengths=np.array([lengths[frozenset(bond)] for bond in bonds]),
        angles=np.array([[names.index(name) for name in corner] for corner in corners]),
        values=np.array(values),
    )


def _average(*corner: str) -> tuple[float, float, float] | None:
    """Length, angle and length over crystal structures of three atoms, each with its residue's letter before it."""
    if known := _AVERAGES.get("".join(corner)):
        return known
    if known := _AVERAGES.get("".join(reversed(corner))):
        return known[2], known[1], known[0]
    return None


@cache
def _ideal_peptides() -> np.ndarray:
    """``[20, 4]``: angles CA-C-N and O-C-N of a residue, and length C-N and angle C-N-CA to the one before it."""
    rows = []
    for letter in RESTYPES:
        out, into = _AVERAGES[f"{letter}CA{letter}CXN"], _AVERAGES[f"XC{letter}N{letter}CA"]
        carbonyl = _AVERAGES[f"{letter}CA{letter}C{letter}O"]
        rows.append((out[1], 360 - out[1] - carbonyl[1], into[0], into[1]))
    return np.array(rows)


def _peptides(structure: Structure, atoms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Deviations of the peptide bonds, ``[M]`` Å, and of the angles at them, ``[M, 3]`` degrees."""
    bonded = _bonded(structure)
    before, after = atoms[:-1][bonded], atoms[1:][bonded]
    ideal = _ideal_peptides()
    out, into = ideal[structure.aatype[:-1][bonded]], ideal[structure.aatype[1:][bonded]]
    n = after[:, _N]
    angles = [
        _angle(before[:, _CA], before[:, _C], n) - out[:, 0],
        _angle(before[:, _O], before[:, _C], n) - out[:, 1],
        _angle(before[:, _C], n, after[:, _CA]) - into[:, 3],
    ]
    return struc.distance(before[:, _C], n) - into[:, 2], np.stack(angles, axis=-1)


def _bonded(structure: Structure) -> np.ndarray:
    """``[N - 1]`` bool: a residue and the next are neighbours in a chain."""
    same_chain = structure.chain_index[1:] == structure.chain_index[:-1]
    return same_chain & (np.diff(structure.residue_index.astype(int)) == 1)


def _handedness(atoms: np.ndarray) -> np.ndarray:
    """``[N]``: positive where CA is that of an L amino acid, NaN where there is no CB."""
    n, c, cb = (atoms[:, atom] - atoms[:, _CA] for atom in (_N, _C, _CB))
    return (np.cross(n, c) * cb).sum(-1)


def _angle(first: np.ndarray, corner: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.degrees(struc.angle(first, corner, second))


def _rms(*deviations: np.ndarray) -> float:
    """Root mean square of all that is known; NaN where nothing is."""
    values = np.concatenate([part.ravel() for part in deviations])
    known = values[~np.isnan(values)]
    return float(np.sqrt(np.square(known).mean())) if len(known) else float("nan")
