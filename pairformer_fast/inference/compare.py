"""Two structures of the same protein: how far apart are they?"""

from __future__ import annotations

import math
from pathlib import Path

import biotite.structure as struc
import numpy as np

from pairformer_fast.config import Frozen
from pairformer_fast.inference import metrics
from pairformer_fast.inference.structures import ChainMatch, Chains, Residue, match_chains, read_structure
from pairformer_fast.model.residue import BACKBONE, SYMMETRIC_ATOMS, THREE_LETTER

_SYMMETRIC = {THREE_LETTER[aa]: pairs for aa, pairs in SYMMETRIC_ATOMS.items()}


class MatchedChain(Frozen):
    """A chain of each structure, the share of identical residues and the number of residues compared."""

    a: str
    b: str
    identity: float
    residues: int


class ResidueComparison(Frozen):
    """One residue in both structures; ``ca_deviation`` in Å after superposition, pLDDT 0 to 100."""

    chain_a: str
    residue_a: str
    chain_b: str
    residue_b: str
    name: str
    ca_deviation: float
    plddt_a: float | None
    plddt_b: float | None
    plddt_difference: float | None


class Comparison(Frozen):
    """Structure ``a`` (the model) against structure ``b`` (the reference).

    Attributes
    ----------
    a, b : str
        File names.
    chains : list[MatchedChain]
        In the order of ``b``.
    unmatched_a, unmatched_b : list[str]
        Chains without a partner.
    residues_a, residues_b : int
        Residues with a CA atom in each file.
    residues, atoms : int
        Residues and heavy atoms in both, which is what is compared.
    ca_rmsd, all_atom_rmsd : float
        Å, both after superposition on the common CA atoms.
    lddt_ca, lddt : float or None
        0 to 1, over common atoms, distances within 15 Å in ``b``; None where no two residues are that close.
    tm_score, gdt_ts, gdt_ha : float
        0 to 1, normalised by ``residues_b``.
    mean_plddt_a, mean_plddt_b, plddt_difference : float or None
        Means over common residues, and of ``a - b``; None where the B-factors are not pLDDT.
    per_residue : list[ResidueComparison]
        In the order of ``b``.
    """

    a: str
    b: str
    chains: list[MatchedChain]
    unmatched_a: list[str]
    unmatched_b: list[str]
    residues_a: int
    residues_b: int
    residues: int
    atoms: int
    ca_rmsd: float
    all_atom_rmsd: float
    lddt_ca: float | None
    lddt: float | None
    tm_score: float
    gdt_ts: float
    gdt_ha: float
    mean_plddt_a: float | None
    mean_plddt_b: float | None
    plddt_difference: float | None
    per_residue: list[ResidueComparison]


def compare_structures(a: str | Path, b: str | Path) -> Comparison:
    """Compare two structure files (PDB or mmCIF) of the same protein.

    Chains are matched by sequence and residues by number or alignment
    (:func:`~pairformer_fast.inference.structures.match_chains`). Only residues with a CA atom in both files and
    atoms present in both count; where the residue types differ, only the backbone. Atom names that a half turn of a
    side chain swaps (Asp, Glu, Phe, Tyr) are taken the way that lies closer to ``b``.

    Parameters
    ----------
    a, b : str or Path
        The model and the reference.

    Raises
    ------
    InputError
        If a file cannot be read or no chain is in both.
    """
    chains_a, chains_b = read_structure(a), read_structure(b)
    matches = match_chains(chains_a, chains_b)
    pairs = [(x, y) for match in matches for x, y in match.pairs if x is not None and y is not None]
    ca_a, ca_b = (np.array([residue.atoms["CA"] for residue in side]) for side in zip(*pairs, strict=True))
    rotation, translation = metrics.superposition(ca_a, ca_b)
    moved = metrics.transform(ca_a, rotation, translation)
    owner, atoms_a, atoms_b = _common_atoms(pairs, rotation, translation)
    residues_a, residues_b = (sum(map(len, chains.values())) for chains in (chains_a, chains_b))
    plddt_a, plddt_b = ([residue.plddt for residue in side] for side in zip(*pairs, strict=True))
    return Comparison(
        a=Path(a).name,
        b=Path(b).name,
        chains=[_describe(match) for match in matches],
        unmatched_a=[name for name in chains_a if name not in {match.a for match in matches}],
        unmatched_b=[name for name in chains_b if name not in {match.b for match in matches}],
        residues_a=residues_a,
        residues_b=residues_b,
        residues=len(pairs),
        atoms=len(owner),
        ca_rmsd=metrics.rmsd(moved, ca_b),
        all_atom_rmsd=metrics.rmsd(atoms_a, atoms_b),
        lddt_ca=_lddt(moved, ca_b, np.arange(len(pairs))),
        lddt=_lddt(atoms_a, atoms_b, owner),
        tm_score=_tm_score(chains_a, chains_b, matches),
        gdt_ts=metrics.gdt(ca_a, ca_b, metrics.GDT_TS_CUTOFFS, residues_b),
        gdt_ha=metrics.gdt(ca_a, ca_b, metrics.GDT_HA_CUTOFFS, residues_b),
        mean_plddt_a=_mean(plddt_a),
        mean_plddt_b=_mean(plddt_b),
        plddt_difference=_mean([_difference(x, y) for x, y in pairs]),
        per_residue=[
            _describe_residue(x, y, float(distance))
            for (x, y), distance in zip(pairs, np.linalg.norm(moved - ca_b, axis=-1), strict=True)
        ],
    )


def _common_atoms(
    pairs: list[tuple[Residue, Residue]], rotation: np.ndarray, translation: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    owner, atoms_a, atoms_b = [], [], []
    for i, (x, y) in enumerate(pairs):
        candidates = BACKBONE if x.name != y.name else y.atoms
        names = [name for name in candidates if name in x.atoms and name in y.atoms]
        target = np.array([y.atoms[name] for name in names])
        ways = [names, *([_swapped(names, x)] if x.name == y.name and x.name in _SYMMETRIC else [])]
        moved = [metrics.transform(np.array([x.atoms[n] for n in way]), rotation, translation) for way in ways]
        owner += [i] * len(names)
        atoms_a.append(min(moved, key=lambda coord: metrics.rmsd(coord, target)))
        atoms_b.append(target)
    return np.array(owner), np.concatenate(atoms_a), np.concatenate(atoms_b)


def _swapped(names: list[str], residue: Residue) -> list[str]:
    partner = {m: n for pair in _SYMMETRIC[residue.name] for m, n in (pair, pair[::-1])}
    swapped = [partner.get(name, name) for name in names]
    return swapped if all(name in residue.atoms for name in swapped) else names


def _lddt(model: np.ndarray, reference: np.ndarray, owner: np.ndarray) -> float | None:
    atoms = struc.AtomArray(len(owner))
    atoms.coord = reference.astype(np.float32)
    atoms.res_id = owner
    value = float(struc.lddt(atoms, model.astype(np.float32)))
    return None if math.isnan(value) else value


def _tm_score(chains_a: Chains, chains_b: Chains, matches: list[ChainMatch]) -> float:
    columns: list[tuple[Residue | None, Residue | None]] = [pair for match in matches for pair in match.pairs]
    columns += [(x, None) for name, chain in chains_a.items() if name not in {m.a for m in matches} for x in chain]
    columns += [(None, y) for name, chain in chains_b.items() if name not in {m.b for m in matches} for y in chain]
    coords = [np.array([r.atoms["CA"] for r in side if r is not None]) for side in zip(*columns, strict=True)]
    rows = ["".join("-" if r is None else r.letter for r in side) for side in zip(*columns, strict=True)]
    return metrics.tm_score(coords[0], coords[1], rows[0], rows[1])


def _describe(match: ChainMatch) -> MatchedChain:
    compared = sum(x is not None and y is not None for x, y in match.pairs)
    return MatchedChain(a=match.a, b=match.b, identity=match.identity, residues=compared)


def _describe_residue(x: Residue, y: Residue, deviation: float) -> ResidueComparison:
    return ResidueComparison(
        chain_a=x.chain,
        residue_a=x.number,
        chain_b=y.chain,
        residue_b=y.number,
        name=y.name,
        ca_deviation=round(deviation, 4),
        plddt_a=x.plddt,
        plddt_b=y.plddt,
        plddt_difference=_difference(x, y),
    )


def _difference(x: Residue, y: Residue) -> float | None:
    return None if x.plddt is None or y.plddt is None else round(x.plddt - y.plddt, 4)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
