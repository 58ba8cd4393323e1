"""FASTA to folding jobs. Bio.SeqIO reads; everything it lets through is validated here, by record and line."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, replace
from itertools import count, product
from pathlib import Path
from string import ascii_uppercase

from Bio import SeqIO
from Bio.Seq import Seq

from pairformer_fast.inference.errors import InputError
from pairformer_fast.model.residue import RESTYPES

_SAFE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_RESERVED = {"run.json"}
_PAIR_TAGS = ("H", "L")
_TYPED_HEADER = re.compile(r"([^|]*)\|(protein|dna|rna|ccd|smiles)(?:\|(.*))?", re.IGNORECASE)
_CHAIN_NAME = re.compile(r"[A-Za-z0-9]{1,4}")


@dataclass(frozen=True)
class Chain:
    """One chain to fold.

    Attributes
    ----------
    sequence : str
        One-letter codes, upper case, only the twenty standard residues.
    name : str
        Chain id in the output: ``H`` or ``L`` in a paired record, else ``A``, ``B``, ...
    record : str
        Id of the FASTA record it comes from, as written there.
    line : int
        Line of that record's header, from 1.
    msa : str
        File of its alignment as the header names it; empty where it names none.
    """

    sequence: str
    name: str
    record: str
    line: int
    msa: str = ""


@dataclass(frozen=True)
class Job:
    """One complex to fold; ``id`` is a safe folder name, unique in its file whatever the case of its letters."""

    id: str
    chains: tuple[Chain, ...]

    @property
    def length(self) -> int:
        """Number of residues over all chains."""
        return sum(len(chain.sequence) for chain in self.chains)


@dataclass(frozen=True)
class _Record:
    id: str
    header: str
    line: int
    seq: Seq
    lines: list[str]

    def error(self, message: str, line: int | None = None) -> InputError:
        return InputError(f"record '{self.id}', line {line or self.line}: {message}")


def read_fasta(path: str | Path) -> list[Job]:
    """Read folding jobs from a FASTA file.

    A record is a job; ``:`` joins chains within it; records ``>ID|H`` and ``>ID|L`` make one job with the heavy
    chain first, and either of them alone is a job of one chain. Lower-case letters are accepted.

    Parameters
    ----------
    path : str or Path
        A FASTA file in UTF-8.

    Returns
    -------
    list[Job]
        In the order in which their ids first appear.

    Raises
    ------
    InputError
        If the file cannot be read, is no text, holds no record or text before the first one, or if a record is
        empty, has letters other than the twenty standard residues, or an id that is unsafe as a folder name or
        taken. The message names the record and the line.
    """
    return _jobs(_records(Path(path)))


def read_complexes(path: str | Path) -> list[Job]:
    """Read folding jobs as :func:`read_fasta`, or one job in the style of Boltz.

    Where every record is ``>CHAIN|protein`` or ``>CHAIN|protein|MSA.a3m``, each is a chain of one complex that is
    named after the file; ``empty`` in the place of the alignment asks for none.

    Parameters
    ----------
    path : str or Path
        A FASTA file in UTF-8.

    Returns
    -------
    list[Job]
        In the order of the file.

    Raises
    ------
    InputError
        As :func:`read_fasta`; also if only some records have such headers, for other molecules than proteins, and for
        chain names that are no chain names or repeated.
    """
    path = Path(path)
    records = _records(path)
    headers = [_TYPED_HEADER.fullmatch(record.header.strip()) for record in records]
    if not any(headers):
        return _jobs(records)
    if not _SAFE_ID.fullmatch(path.stem) or path.stem.lower() in _RESERVED:
        raise InputError(f"{path}: the complex is named after its file; name it with A-Z a-z 0-9 _ . - only")
    chains: list[Chain] = []
    for record, header in zip(records, headers, strict=True):
        if header is None:
            raise record.error("other records are 'CHAIN|protein', this one is not; write all of them in one style")
        name, kind, msa = (group or "" for group in header.groups())
        if kind.lower() != "protein":
            raise record.error(
                f"{kind} is not supported, only protein; give OpenFold3 a query JSON: pairformer-fast openfold3 predict"
            )
        if not _CHAIN_NAME.fullmatch(name):
            raise record.error(f"{name!r} is no chain name; use 1 to 4 letters and digits")
        if name in [chain.name for chain in chains]:
            raise record.error(f"chain {name} is there twice; rename one")
        if ":" in record.seq:
            raise record.error(f"a record '|{kind}' holds one chain; give each chain its own record")
        [chain] = _chains(record, name)
        chains.append(replace(chain, msa="" if msa.strip().lower() == "empty" else msa.strip()))
    return [Job(path.stem, tuple(chains))]


def _jobs(records: list[_Record]) -> list[Job]:
    drafts: dict[str, _Draft] = {}
    for record in records:
        job_id, tag = _split_id(record)
        chains = _chains(record, tag)
        draft = drafts.get(job_id.lower())
        if draft is None:
            drafts[job_id.lower()] = _Draft(job_id, record.line, tag, chains)
        elif draft.id != job_id:
            raise record.error(
                f"the id differs from '{draft.id}' (line {draft.line}) only in the case of letters; rename one"
            )
        elif tag is None or draft.tag is None or tag in [chain.name for chain in draft.chains]:
            raise record.error(f"duplicate id; '{job_id}' is already used on line {draft.line}")
        else:
            draft.chains.insert(0 if tag == "H" else 1, *chains)
    return [Job(draft.id, tuple(draft.chains)) for draft in drafts.values()]


@dataclass
class _Draft:
    id: str
    line: int
    tag: str | None
    chains: list[Chain]


def _records(path: Path) -> list[_Record]:
    lines = _read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith(">")]
    for i, line in enumerate(lines[: starts[0]] if starts else lines, start=1):
        if line.strip():
            raise InputError(f"{path}, line {i}: text before the first record; a FASTA record starts with '>ID'")
    if not starts:
        raise InputError(f"{path}: the file is empty; expected FASTA records ('>ID', then the sequence)")
    parsed = SeqIO.parse(io.StringIO("\n".join(lines[starts[0] :])), "fasta")
    ends = [*starts[1:], len(lines)]
    return [
        _Record(record.id or "", record.description, start + 1, record.seq, lines[start + 1 : end])
        for record, start, end in zip(parsed, starts, ends, strict=True)
    ]


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{path}: not a text file; FASTA in UTF-8 is expected (decompress it first?)")
    return text


def _split_id(record: _Record) -> tuple[str, str | None]:
    if not record.id:
        raise record.error("the record has no id; write one right after '>'")
    stem, bar, end = record.id.rpartition("|")
    paired = bool(bar) and end in _PAIR_TAGS
    job_id = stem if paired else record.id
    if not _SAFE_ID.fullmatch(job_id):
        shown = job_id if len(job_id) <= 40 else f"{job_id[:40]}..."
        raise InputError(
            f"record {shown!r}, line {record.line}: the id is not safe as a folder name; use up to 100 of "
            "A-Z a-z 0-9 _ . - and start with a letter, digit or _ (a paired chain ends in |H or |L)"
        )
    if job_id.lower() in _RESERVED:
        raise record.error(f"the id '{job_id}' is the name of an output file; choose another")
    return job_id, end if paired else None


def _chains(record: _Record, tag: str | None) -> list[Chain]:
    if not len(record.seq):
        raise record.error("the record has no sequence")
    _check_letters(record)
    sequences = str(record.seq).upper().split(":")
    if tag is not None and len(sequences) > 1:
        raise record.error(f"a record '|{tag}' holds one chain; remove the ':' or the '|{tag}'")
    if not all(sequences):
        raise record.error("empty chain: ':' must stand between two sequences")
    names = [tag] if tag is not None else _chain_names(len(sequences))
    return [Chain(s, name, record.id, record.line) for name, s in zip(names, sequences, strict=True)]


def _check_letters(record: _Record) -> None:
    allowed = set(RESTYPES + RESTYPES.lower() + ": ")
    position = 0
    for number, line in enumerate(record.lines, start=record.line + 1):
        for letter in line.rstrip():
            position += letter not in " :"
            if letter not in allowed:
                raise record.error(
                    f"{letter!r} at residue {position} is not one of the twenty standard residues {RESTYPES}", number
                )


def _chain_names(n: int) -> list[str]:
    names = ("".join(letters) for size in count(1) for letters in product(ascii_uppercase, repeat=size))
    return [name for name, _ in zip(names, range(n), strict=False)]
