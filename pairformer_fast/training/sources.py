"""Read the raw antibody data: SAbDab VH domains, CoV-AbDab pairs, Fv crystal structures."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO

import numpy as np
from Bio import SeqIO

from pairformer_fast.model.residue import ATOM14, RESTYPES, THREE_LETTER

SABDAB = "sabdab_vh.jsonl.gz"
COVABDAB = "covabdab_pairs.csv.gz"
CRYSTALS = "fv_crystal"

COVABDAB_SOURCE = "covabdab"


@dataclass(frozen=True)
class SabdabEntry:
    """One VH domain: ``backbone`` is ``[L, 4, 3]`` float32, N, CA, C, O in Å; ``split`` is train or val."""

    id: str
    sequence: str
    cdr: str
    backbone: np.ndarray
    split: str


@dataclass(frozen=True)
class Pair:
    """One VH/VL pair without structure; ``cdrh3`` may be empty, and so may ``cdr``, a digit per residue of both."""

    id: str
    vh: str
    vl: str
    cdrh3: str
    source: str = COVABDAB_SOURCE
    cdr: str = ""


@dataclass(frozen=True)
class Crystal:
    """One Fv crystal structure: sequences and ``atom14`` ``[NH + NL, 14, 3]`` float32 (Å, NaN where absent)."""

    id: str
    vh: str
    vl: str
    atom14: np.ndarray


def read_sabdab(folder: Path) -> list[SabdabEntry]:
    """All VH domains of ``sabdab_vh.jsonl.gz``, in file order.

    Raises
    ------
    FileNotFoundError
        If the file is absent.
    ValueError
        If a record has non-standard letters, or annotation or coordinates of another length than its sequence.
    """
    entries = []
    with _reading(folder / SABDAB) as lines:
        for number, line in enumerate(lines, start=1):
            record = json.loads(line)
            backbone = np.array(record["coords"], dtype=np.float32)
            sequence, cdr = record["seq"], record["cdr"]
            if (
                len(cdr) != len(sequence)
                or backbone.shape != (len(sequence), 4, 3)
                or not set(sequence) <= set(RESTYPES)
            ):
                raise ValueError(f"{folder / SABDAB} line {number}: sequence, cdr and coords do not fit together")
            entries.append(SabdabEntry(record["pdb"], sequence, cdr, backbone, record["split"]))
    return entries


def read_covabdab(folder: Path) -> tuple[list[Pair], dict[str, int]]:
    """Distinct VH/VL pairs of ``covabdab_pairs.csv.gz`` in file order, and how many were dropped for what.

    Raises
    ------
    FileNotFoundError
        If the file is absent.
    ValueError
        If it is no such file.
    """
    pairs: dict[tuple[str, str], Pair] = {}
    dropped = {"non_standard_letters": 0, "duplicate": 0}
    with _reading(folder / COVABDAB) as file:
        for row in csv.DictReader(file):
            key = (row["vh"], row["vl"])
            if not set(row["vh"] + row["vl"]) <= set(RESTYPES):
                dropped["non_standard_letters"] += 1
            elif key in pairs:
                dropped["duplicate"] += 1
            else:
                pairs[key] = Pair(row["name"], row["vh"], row["vl"], row["cdrh3"])
    return list(pairs.values()), dropped


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs to a gzipped CSV file, for :func:`read_pairs`; it appears only when complete."""
    columns = [field.name for field in fields(Pair)]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # no time stamp: the same pairs give the same bytes
    with (
        partial.open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
    ):
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(asdict(pair) for pair in pairs)
    partial.replace(path)


def read_pairs(path: Path) -> list[Pair]:
    """Pairs of a file of :func:`write_pairs`.

    Raises
    ------
    FileNotFoundError
        If the file is absent.
    ValueError
        If it is no such file, or a row is no pair of sequences of the twenty residues.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; make it with scripts/prepare_antibody_data.py --table")
    columns = [field.name for field in fields(Pair)]
    with _reading(path) as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != columns:
            raise ValueError(f"{path} is no table of pairs: columns {reader.fieldnames}, expected {columns}")
        pairs = [Pair(**row) for row in reader]
    for number, pair in enumerate(pairs, start=2):
        letters = pair.vh + (pair.vl or "")
        if not pair.vh or not pair.vl or not set(letters) <= set(RESTYPES):
            raise ValueError(f"{path} line {number}: vh and vl must be sequences of the twenty residues")
        if pair.cdr and (len(pair.cdr) != len(letters) or not set(pair.cdr) <= set("0123")):
            raise ValueError(f"{path} line {number}: cdr must have a digit, 0 to 3, for each residue of vh and vl")
    return pairs


def read_crystals(folder: Path) -> list[Crystal]:
    """All Fv crystal structures named in ``fv_crystal/fv.fasta`` (``>ID|H``, ``>ID|L``).

    Raises
    ------
    ValueError
        If an entry has other records, or a PDB file's residues differ from its FASTA sequences.
    """
    from biotite.structure.io.pdb import PDBFile

    root = folder / CRYSTALS
    sequences: dict[str, dict[str, str]] = {}
    for record in SeqIO.parse(str(_existing(root / "fv.fasta")), "fasta"):
        name, _, chain = record.id.partition("|")
        sequences.setdefault(name, {})[chain] = str(record.seq)
    for name, chains in sequences.items():
        if chains.keys() != {"H", "L"}:
            raise ValueError(f"{root / 'fv.fasta'}: {name} needs the records >{name}|H and >{name}|L, and no other")
    one_letter = {three: one for one, three in THREE_LETTER.items()}
    crystals = []
    for name, chains in sequences.items():
        atoms = PDBFile.read(str(_existing(root / f"{name}.pdb"))).get_structure(model=1)
        coords = []
        for chain in "HL":
            sequence = chains[chain]
            positions = np.full((len(sequence), 14, 3), np.nan, dtype=np.float32)
            for atom in atoms[(atoms.chain_id == chain) & (atoms.element != "H")]:
                residue = atom.res_id - 1
                letter = one_letter.get(atom.res_name)
                if not 0 <= residue < len(sequence) or sequence[residue] != letter:
                    raise ValueError(
                        f"{name}.pdb chain {chain} residue {atom.res_id} {atom.res_name}: not as in fv.fasta"
                    )
                if atom.atom_name in ATOM14[letter]:
                    positions[residue, ATOM14[letter].index(atom.atom_name)] = atom.coord
            coords.append(positions)
        crystals.append(Crystal(name, chains["H"], chains["L"], np.concatenate(coords)))
    return crystals


@contextmanager
def _reading(path: Path) -> Iterator[TextIO]:
    """Text of a gzipped file; what shows that it is damaged or another file becomes a ValueError with its name."""
    try:
        with gzip.open(_existing(path), "rt", encoding="utf-8", newline="") as file:
            yield file
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or another kind of file: {error}") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a record lacks a field, or has one of another kind: {error}") from None


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the data folder with --data")
    return path
