"""Does the model still predict what it predicted, and does acceleration still change nothing?"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from statistics import fmean

from pydantic import computed_field

from pairformer_fast.config import Frozen
from pairformer_fast.inference.compare import Comparison, compare_structures
from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.fasta import Job, read_fasta
from pairformer_fast.inference.pipeline import check_request
from pairformer_fast.inference.predict import PathResult, Predictor
from pairformer_fast.inference.settings import FoldSettings
from pairformer_fast.inference.writer import write_mmcif

GOLDEN_CA_RMSD = 0.05
GOLDEN_ALL_ATOM_RMSD = 0.1
ACCELERATED_CA_RMSD = 0.3
ACCELERATED_LDDT_CA = 0.98
CRYSTAL_LDDT_CA_LOSS = 0.005


class Gate(Frozen):
    """A measured value and its limit: the largest allowed one if ``upper``, else the smallest."""

    name: str
    subject: str
    measured: float
    limit: float
    upper: bool = True

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether the value is within the limit; NaN is not."""
        return self.measured <= self.limit if self.upper else self.measured >= self.limit


class CrystalAccuracy(Frozen):
    """Accuracy of both paths against one crystal structure; CA, lDDT 0 to 1, RMSD in Å."""

    id: str
    reference_lddt_ca: float
    accelerated_lddt_ca: float
    reference_ca_rmsd: float
    accelerated_ca_rmsd: float


class Regression(Frozen):
    """Result of :func:`regress`.

    Attributes
    ----------
    gates : list[Gate]
        Every check.
    crystals : list[CrystalAccuracy]
        Empty without crystals.
    skipped : list[str]
        Checks that were not made, and why.
    """

    gates: list[Gate]
    crystals: list[CrystalAccuracy]
    skipped: list[str]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return all(gate.passed for gate in self.gates)


def bundled_golden() -> Path:
    """Folder of the golden structures that come with the package."""
    return Path(str(resources.files("pairformer_fast.data") / "golden"))


def regress(golden: Path, settings: FoldSettings, crystals: Path | None = None) -> Regression:
    """Fold the golden sequences on both paths and hold the results to their limits.

    The reference must reproduce each golden structure (CA RMSD 0.05 Å, all-atom 0.1 Å), the accelerated path must
    stay close to the reference (CA RMSD 0.3 Å, lDDT-CA 0.98), and may lose at most 0.005 of mean lDDT-CA against
    crystal structures.

    Parameters
    ----------
    golden : Path
        Folder with ``golden.fasta`` and an ``<id>.cif`` for each of its jobs.
    settings : FoldSettings
        Both paths must run; fp32, as the golden structures were made.
    crystals : Path, optional
        Folder with ``fv.fasta`` and an ``<id>.pdb`` for each of its jobs, or a folder that has it as ``fv_crystal``.

    Raises
    ------
    InputError
        If files are missing, or a golden structure is of another sequence.
    """
    jobs = _jobs_with(golden, "golden.fasta", "cif", "; make it with --update")
    crystals = crystals / "fv_crystal" if crystals is not None and (crystals / "fv_crystal").is_dir() else crystals
    crystal_jobs = [] if crystals is None else _jobs_with(crystals, "fv.fasta", "pdb", "")
    check_request([*jobs, *crystal_jobs], settings)
    predictor = Predictor(settings)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        gates = [gate for job in jobs for gate in _golden_gates(job, golden, predictor, folder)]
        accuracy = [_accuracy(job, crystals, predictor, folder) for job in crystal_jobs if crystals]
    if accuracy:
        loss = fmean(one.reference_lddt_ca - one.accelerated_lddt_ca for one in accuracy)
        subject = f"mean of {len(accuracy)} crystals"
        gates.append(
            Gate(name="lDDT-CA lost by acceleration", subject=subject, measured=loss, limit=CRYSTAL_LDDT_CA_LOSS)
        )
    skipped = [] if accuracy else ["crystals: give a folder with fv_crystal/ (--shared-data) to check accuracy"]
    return Regression(gates=gates, crystals=accuracy, skipped=skipped)


def update_golden(golden: Path, settings: FoldSettings) -> list[Path]:
    """Fold ``golden.fasta`` with the reference and write ``<id>.cif`` beside it; all or, if a fold fails, none.

    Returns
    -------
    list[Path]
        The files written.

    Raises
    ------
    InputError
        As :func:`regress`.
    """
    jobs = read_fasta(golden / "golden.fasta")
    check_request(jobs, settings)
    predictor = Predictor(settings)
    reference = predictor.reference
    if reference is None:
        raise InputError("golden structures are the reference's, but the settings leave it out")
    results = [predictor.predict(job, reference) for job in jobs]
    paths = [golden / f"{job.id}.cif" for job in jobs]
    for path, job, result in zip(paths, jobs, results, strict=True):
        _write(path, job, result)
    return paths


def _jobs_with(folder: Path, fasta: str, suffix: str, hint: str) -> list[Job]:
    jobs = read_fasta(folder / fasta)
    for job in jobs:
        if not (folder / f"{job.id}.{suffix}").is_file():
            raise InputError(f"{folder / fasta}: record '{job.id}' has no structure {job.id}.{suffix} beside it{hint}")
    return jobs


def _write(path: Path, job: Job, result: PathResult) -> Path:
    write_mmcif(path, job, result.prediction, f"{job.id}, reference prediction")
    return path


def _fold_both(job: Job, predictor: Predictor, folder: Path) -> Iterator[Path]:
    for name, attention in (("reference", predictor.reference), ("accelerated", predictor.accelerated)):
        if attention is None:
            raise InputError(f"regress needs both paths, but the settings leave out the {name} one")
        yield _write(folder / f"{job.id}_{name}.cif", job, predictor.predict(job, attention))


def _golden_gates(job: Job, golden: Path, predictor: Predictor, folder: Path) -> list[Gate]:
    reference, accelerated = _fold_both(job, predictor, folder)
    reproduced = compare_structures(reference, golden / f"{job.id}.cif")
    if not _complete(reproduced, job):
        raise InputError(f"{golden / job.id}.cif is not of the sequence in golden.fasta; make it with --update")
    moved = compare_structures(accelerated, reference)
    return [
        Gate(
            name="reference to golden, CA RMSD (Å)", subject=job.id, measured=reproduced.ca_rmsd, limit=GOLDEN_CA_RMSD
        ),
        Gate(
            name="reference to golden, all-atom RMSD (Å)",
            subject=job.id,
            measured=reproduced.all_atom_rmsd,
            limit=GOLDEN_ALL_ATOM_RMSD,
        ),
        Gate(
            name="accelerated to reference, CA RMSD (Å)",
            subject=job.id,
            measured=moved.ca_rmsd,
            limit=ACCELERATED_CA_RMSD,
        ),
        Gate(
            name="accelerated to reference, lDDT-CA",
            subject=job.id,
            measured=_lddt_ca(moved),
            limit=ACCELERATED_LDDT_CA,
            upper=False,
        ),
    ]


def _lddt_ca(comparison: Comparison) -> float:
    return math.nan if comparison.lddt_ca is None else comparison.lddt_ca


def _complete(comparison: Comparison, job: Job) -> bool:
    alike = all(chain.identity == 1 for chain in comparison.chains)
    return alike and comparison.residues == comparison.residues_b == job.length


def _accuracy(job: Job, crystals: Path, predictor: Predictor, folder: Path) -> CrystalAccuracy:
    crystal = crystals / f"{job.id}.pdb"
    reference, accelerated = (compare_structures(path, crystal) for path in _fold_both(job, predictor, folder))
    return CrystalAccuracy(
        id=job.id,
        reference_lddt_ca=_lddt_ca(reference),
        accelerated_lddt_ca=_lddt_ca(accelerated),
        reference_ca_rmsd=reference.ca_rmsd,
        accelerated_ca_rmsd=accelerated.ca_rmsd,
    )
