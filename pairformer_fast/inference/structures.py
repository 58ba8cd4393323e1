"""Structure files to residues, and residues of two structures matched by chain and sequence."""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import biotite.structure as struc
import numpy as np
from Bio.Align import PairwiseAligner, substitution_matrices
from biotite.structure.info import one_letter_code
from biotite.structure.io import pdb, pdbx

from pairformer_fast.inference.errors import InputError
from pairformer_fast.model.residue import RESTYPES

MIN_IDENTITY = 0.3
"""Least share of identical residues, over the shorter chain, at which two chains are the same chain."""

_FORMATS = {".cif": "mmCIF", ".mmcif": "mmCIF", ".pdb": "PDB", ".ent": "PDB"}


@dataclass(frozen=True)
class Residue:
    """One amino acid: ``number`` with insertion code, heavy atoms by name (``[3]``, Å), pLDDT if the file says so."""

    chain: str
    number: str
    name: str
    letter: str
    atoms: dict[str, np.ndarray]
    plddt: float | None


Chains = dict[str, list[Residue]]
"""Residues that have a CA atom, by author chain id."""


@dataclass(frozen=True)
class ChainMatch:
    """A chain of the first structure and its partner in the second.

    Attributes
    ----------
    a, b : str
        Chain ids.
    pairs : list[tuple[Residue or None, Residue or None]]
        Every residue of both chains once, in order; None opposite a residue that the other chain lacks.
    identity : float
        Share of identical residues over the shorter chain.
    """

    a: str
    b: str
    pairs: list[tuple[Residue | None, Residue | None]]
    identity: float


def read_structure(path: str | Path) -> Chains:
    """Amino acids of the first model of a PDB or mmCIF file (``.pdb``, ``.ent``, ``.cif``, ``.mmcif``, also ``.gz``).

    Hydrogens, water and ligands are dropped; of alternative locations the first counts. B-factors are taken for
    pLDDT only if an mmCIF file declares a local pLDDT in ``_ma_qa_metric``.

    Raises
    ------
    InputError
        If there is no such file, its name has another ending, it cannot be parsed or has no amino acid.
    """
    path = Path(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = _FORMATS.get("".join(suffixes[-2:-1] if packed else suffixes[-1:]))
    if kind is None:
        raise InputError(f"{path}: unknown kind of structure file; expected one of {', '.join(_FORMATS)} (or with .gz)")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if packed else data).decode("utf-8")
        atoms, is_plddt = _parse(text, kind)
    except Exception as error:  # a parser meets malformed text in many ways
        raise InputError(f"{path}: cannot be read as {kind} ({' '.join(str(error).split())})") from error
    atoms = atoms[struc.filter_amino_acids(atoms) & (atoms.element != "H") & (atoms.element != "D")]
    chains: Chains = {}
    for residue in struc.residue_iter(atoms):
        first = residue[0]
        at = dict(zip(residue.atom_name.tolist(), residue.coord.astype(float), strict=True))
        if "CA" not in at or not np.isfinite(residue.coord).all():
            continue
        plddt = float(residue.b_factor[residue.atom_name == "CA"][0]) if is_plddt else None
        number = f"{first.res_id}{first.ins_code}"
        letter = _letter(first.res_name)
        chains.setdefault(str(first.chain_id), []).append(
            Residue(str(first.chain_id), number, str(first.res_name), letter, at, plddt)
        )
    if not chains:
        raise InputError(f"{path}: no amino acid with a CA atom in its first model")
    return chains


def _letter(name: str) -> str:
    letter = one_letter_code(name)
    return letter if letter is not None and letter in RESTYPES else "X"


def _parse(text: str, kind: str) -> tuple[struc.AtomArray, bool]:
    if kind == "PDB":
        file = pdb.PDBFile.read(io.StringIO(text))
        return file.get_structure(model=1, altloc="first", extra_fields=["b_factor"]), False
    block = pdbx.CIFFile.read(io.StringIO(text)).block
    atoms = pdbx.get_structure(block, model=1, altloc="first", extra_fields=["b_factor"])
    if "ma_qa_metric" not in block:
        return atoms, False
    metrics = block["ma_qa_metric"]
    declared = zip(*(metrics[name].as_array(str) for name in ("name", "mode")), strict=True)
    return atoms, any(name.lower() == "plddt" and mode.lower() == "local" for name, mode in declared)


def match_chains(a: Chains, b: Chains) -> list[ChainMatch]:
    """Pair the chains of two structures by sequence, the most alike first and equal ids first among equals.

    Residues of a pair are matched by number where the numbers agree (at least half of the shorter chain shares
    them and all shared ones have the same residue), else by global alignment (BLOSUM62) with nearly free end gaps.

    Raises
    ------
    InputError
        If no two chains share at least :data:`MIN_IDENTITY`.
    """
    candidates = [_match(a[i], b[j]) for i in a for j in b]
    candidates = [match for match in candidates if match.identity >= MIN_IDENTITY]
    candidates.sort(key=lambda m: (-round(m.identity, 6), m.a != m.b, -len(m.pairs)))
    chosen: dict[str, ChainMatch] = {}
    for match in candidates:
        if match.a not in chosen and match.b not in {other.b for other in chosen.values()}:
            chosen[match.a] = match
    if not chosen:
        raise InputError(
            f"no chain in common: no two of the chains {', '.join(a)} and {', '.join(b)} "
            f"have {MIN_IDENTITY:.0%} of their residues alike"
        )
    return sorted(chosen.values(), key=lambda match: list(b).index(match.b))


def _match(a: list[Residue], b: list[Residue]) -> ChainMatch:
    pairs = _by_number(a, b) or _by_alignment(a, b)
    same = sum(x is not None and y is not None and x.letter == y.letter for x, y in pairs)
    return ChainMatch(a[0].chain, b[0].chain, pairs, same / min(len(a), len(b)))


def _by_number(a: list[Residue], b: list[Residue]) -> list[tuple[Residue | None, Residue | None]]:
    in_a, in_b = ({residue.number: i for i, residue in enumerate(chain)} for chain in (a, b))
    shared = [(i, in_b[number]) for number, i in in_a.items() if number in in_b]
    agrees = all(a[i].letter == b[j].letter for i, j in shared)
    ordered = all(left < right for (_, left), (_, right) in pairwise(shared))
    unique = len(in_a) == len(a) and len(in_b) == len(b)
    if not (agrees and ordered and unique and 2 * len(shared) >= min(len(a), len(b))):
        return []
    return _with_gaps(a, b, shared)


def _by_alignment(a: list[Residue], b: list[Residue]) -> list[tuple[Residue | None, Residue | None]]:
    aligner = PairwiseAligner(mode="global", open_gap_score=-10, extend_gap_score=-0.5, end_gap_score=-0.1)
    aligner.substitution_matrix = substitution_matrices.load("BLOSUM62")
    alignment = aligner.align(*("".join(residue.letter for residue in chain) for chain in (a, b)))[0]
    shared = [
        (start_a + k, start_b + k)
        for (start_a, end_a), (start_b, _) in zip(*alignment.aligned, strict=True)
        for k in range(end_a - start_a)
    ]
    return _with_gaps(a, b, shared)


def _with_gaps(
    a: list[Residue], b: list[Residue], shared: list[tuple[int, int]]
) -> list[tuple[Residue | None, Residue | None]]:
    pairs: list[tuple[Residue | None, Residue | None]] = []
    next_a = next_b = 0
    for i, j in [*shared, (len(a), len(b))]:
        pairs += [(residue, None) for residue in a[next_a:i]]
        pairs += [(None, residue) for residue in b[next_b:j]]
        if i < len(a):
            pairs.append((a[i], b[j]))
        next_a, next_b = i + 1, j + 1
    return pairs
