"""What a folding run with OpenFold3 needs, found and checked before torch or OpenFold3 is imported."""

from __future__ import annotations

import io
import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from Bio.SeqIO.FastaIO import SimpleFastaParser

from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.fasta import Chain, Job, read_complexes
from pairformer_fast.inference.settings import FoldSettings

QUERY = "query.json"

_SAVED_BY_TORCH = (b"PK", b"\x80\x02")
"""First bytes of what ``torch.save`` writes: a zip file, in old versions a pickle."""

_WITHOUT_INSERTIONS = str.maketrans("", "", string.ascii_lowercase)


@dataclass(frozen=True)
class OpenFold3Input:
    """Jobs, the alignment of each chain that has one by job and chain name, and the settings of the runner YAML."""

    jobs: list[Job]
    msas: dict[tuple[str, str], Path]
    runner: dict[str, Any]

    @property
    def without_msa(self) -> list[str]:
        """Chains that are folded from their sequence alone."""
        return [f"{job.id}:{chain.name}" for job, chain in _chains(self.jobs) if (job.id, chain.name) not in self.msas]


def read_input(fasta: str | Path, settings: FoldSettings) -> OpenFold3Input:
    """Read a FASTA file and check everything else that OpenFold3 will be given.

    An alignment is the file that the header names, in ``settings.msa_dir`` or else beside the FASTA file or in the
    working folder; otherwise ``ID_CHAIN.a3m`` in ``settings.msa_dir``, or ``ID.a3m`` for a job of one chain. Chains of
    one job with the same sequence share an alignment. Without ``msa_dir`` a chain may do without.

    Raises
    ------
    InputError
        If anything is missing or wrong; see :func:`~pairformer_fast.inference.fasta.read_complexes` and
        :func:`read_a3m`.
    """
    jobs = read_complexes(fasta)
    _check_checkpoint(settings.checkpoint)
    runner = _read_runner(settings.runner_yaml)
    if settings.msa_dir is not None and not settings.msa_dir.is_dir():
        raise InputError(f"--msa-dir {settings.msa_dir}: no such folder")
    msas = {}
    for job, chain in _chains(jobs):
        path = _find_msa(job, chain, Path(fasta), settings.msa_dir)
        if path is not None:
            read_a3m(path, chain)
            msas[job.id, chain.name] = path
    if find_spec("openfold3") is None:
        raise InputError("--model openfold3: OpenFold3 is missing; run pip install 'pairformer_fast[openfold]'")
    return OpenFold3Input(jobs, msas, runner)


def read_a3m(path: Path, chain: Chain) -> str:
    """Alignment of a chain in the form that OpenFold3 parses.

    Comment lines (as ColabFold writes), NUL bytes and the dots of padded insertions are dropped.

    Raises
    ------
    InputError
        If the file cannot be read as A3M, its first sequence is not that of the chain, or a row has another number of
        columns.
    """
    where = f"record '{chain.record}', line {chain.line}: alignment {path}"
    try:
        lines = path.read_text(encoding="utf-8").replace("\0", "").splitlines(keepends=True)
        rows = list(SimpleFastaParser(io.StringIO("".join(line for line in lines if not line.startswith("#")))))
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise InputError(f"{where}: not an A3M file") from None
    if not rows:
        raise InputError(f"{where}: holds no sequence")
    rows = [(title, row.replace(".", "")) for title, row in rows]
    if rows[0][1].translate(_WITHOUT_INSERTIONS) != chain.sequence:
        raise InputError(f"{where}: its first sequence must be that of chain {chain.name}, without gaps")
    for number, (title, row) in enumerate(rows, start=1):
        columns = row.translate(_WITHOUT_INSERTIONS)
        if len(columns) != len(chain.sequence):
            raise InputError(
                f"{where}: row {number} ('{title[:40]}') has {len(columns)} columns, not {len(chain.sequence)}; A3M "
                "writes insertions in lower case"
            )
        if not (columns.replace("-", "A").isalpha() and row.isascii()):
            raise InputError(f"{where}: row {number} ('{title[:40]}') holds other characters than letters and gaps")
    return "".join(f">{title}\n{row}\n" for title, row in rows)


def write_query(given: OpenFold3Input, seed: int, folder: Path) -> None:
    """Write OpenFold3's query JSON, and the alignments it names, into a folder.

    OpenFold3 knows alignments by their file name, this one as unpaired rows, and tells chains apart by its folder.
    """
    folders: dict[Path, Path] = {}
    queries = {}
    for job in given.jobs:
        chains = []
        for chain in job.chains:
            entry: dict[str, Any] = {"molecule_type": "protein", "chain_ids": [chain.name], "sequence": chain.sequence}
            msa = given.msas.get((job.id, chain.name))
            if msa is not None:
                if msa not in folders:
                    folders[msa] = folder / "msas" / str(len(folders))
                    folders[msa].mkdir(parents=True)
                    (folders[msa] / "colabfold_main.a3m").write_text(read_a3m(msa, chain), encoding="utf-8")
                entry["main_msa_file_paths"] = [str(folders[msa] / "colabfold_main.a3m")]
            chains.append(entry)
        queries[job.id] = {"chains": chains}
    (folder / QUERY).write_text(json.dumps({"seeds": [seed], "queries": queries}), encoding="utf-8")


def _chains(jobs: list[Job]) -> Iterator[tuple[Job, Chain]]:
    return ((job, chain) for job in jobs for chain in job.chains)


def _find_msa(job: Job, chain: Chain, fasta: Path, folder: Path | None) -> Path | None:
    if chain.msa:
        candidates = [base / chain.msa for base in ([fasta.parent, Path()] if folder is None else [folder])]
    elif folder is None:
        return None
    else:
        same = [other.name for other in job.chains if other.sequence == chain.sequence]
        names = [f"{job.id}_{name}" for name in (chain.name, *same)] + [job.id] * (len(job.chains) == 1)
        candidates = [folder / f"{name}.a3m" for name in names]
    for path in candidates:
        if path.is_file() and path.suffix == ".a3m":
            return path.absolute()
    looked = " or ".join(str(path) for path in dict.fromkeys(candidates))
    hint = "name an A3M file that exists, or 'empty' for none" if chain.msa else "add it or leave --msa-dir out"
    raise InputError(f"record '{chain.record}', line {chain.line}: no alignment {looked}; {hint}")


def _check_checkpoint(path: Path | None) -> None:
    if path is None or not path.exists():
        raise InputError(f"checkpoint {path}: no such file")
    if path.is_dir():
        raise InputError(
            f"checkpoint {path}: is a folder; give a .pt or .ckpt file, or use pairformer-fast openfold3 predict"
        )
    with path.open("rb") as file:
        if file.read(2) not in _SAVED_BY_TORCH:
            raise InputError(f"checkpoint {path}: not a checkpoint of OpenFold3; give the .pt or .ckpt file it trained")


def _read_runner(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--runner-yaml {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--runner-yaml {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise InputError(f"--runner-yaml {path}: must be a mapping, such as 'model_update: ...'")
    return content
