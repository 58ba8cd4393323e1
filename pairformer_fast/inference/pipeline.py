"""FASTA to predicted structures, reference structures and their comparison."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.progress import Progress, TaskID

from pairformer_fast.config import AttentionConfig
from pairformer_fast.inference.compare import Comparison, compare_structures
from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.fasta import Job, read_fasta
from pairformer_fast.inference.files import publish, write_atomically
from pairformer_fast.inference.learned import networks_file
from pairformer_fast.inference.predict import (
    PathResult,
    Predictor,
    read_model_config,
    resolve_checkpoint,
    resolve_device,
)
from pairformer_fast.inference.report import ACCELERATED, OUTPUTS, REFERENCE, JobReport, RunReport, comparison_json
from pairformer_fast.inference.settings import FoldSettings
from pairformer_fast.inference.validate import check_domain, check_memory
from pairformer_fast.inference.writer import write_mmcif

_LOG = logging.getLogger(__name__)


def fold(fasta: str | Path, out: str | Path, settings: FoldSettings, progress: Progress | None = None) -> RunReport:
    """Fold every job of a FASTA file and compare the accelerated structures with the reference's.

    Writes ``OUT/run.json`` and, for a job that succeeds, into ``OUT/<id>/``: ``<id>_flashbias.cif``,
    ``<id>_reference.cif`` and ``<id>_comparison.json``, as far as the settings ask for them; older files of these
    names are replaced or removed. A job that fails writes none of them, and its reason is in ``run.json``. All input
    is validated before the model is loaded and before anything is written.

    Parameters
    ----------
    fasta : str or Path
        Input, see :func:`~pairformer_fast.inference.fasta.read_fasta`.
    out : str or Path
        Folder to write into, made if needed. Results of other jobs in it stay.
    settings : FoldSettings
        What to do.
    progress : rich.progress.Progress, optional
        Shows one task over all predictions.

    Returns
    -------
    RunReport
        What ``run.json`` holds.

    Raises
    ------
    InputError
        If input, settings, checkpoint or output folder will not do.
    """
    jobs = read_fasta(fasta)
    out = Path(out)
    check_output(out, jobs)
    check_request(jobs, settings)
    predictor = Predictor(settings)
    wanted = {ACCELERATED: predictor.accelerated, REFERENCE: predictor.reference}
    paths = {name: attention for name, attention in wanted.items() if attention is not None}
    report = RunReport.start(jobs, settings, predictor, paths)
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress(disable=True) if progress is None else progress
    task = progress.add_task("folding", total=len(jobs) * len(paths))
    for i, (job, pending) in enumerate(zip(jobs, report.jobs, strict=True)):
        show = partial(_show, progress, task, i * len(paths))
        report = report.with_job(_run(job, pending, out, predictor, paths, show))
        write_atomically(out / "run.json", report.model_dump_json(indent=2) + "\n")
    progress.update(task, description="done", completed=len(jobs) * len(paths))
    return report


def check_request(jobs: list[Job], settings: FoldSettings) -> None:
    """Refuse jobs that the weights or the memory do not allow, without loading the weights.

    Raises
    ------
    InputError
        Also if the device or the checkpoint does not exist.
    """
    device = resolve_device(settings.device)
    checkpoint = resolve_checkpoint(settings)
    config = read_model_config(checkpoint)
    networks_file(settings, checkpoint)
    check_domain(jobs, config)
    check_memory(jobs, config, device)


def check_output(out: Path, jobs: list[Job]) -> None:
    """Refuse an output folder in which the jobs' folders cannot be made.

    Raises
    ------
    InputError
        Naming what is in the way.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"output {out}: exists and is no folder; choose another")
    for job in jobs:
        folder = out / job.id
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise InputError(f"output {folder}: is a link or a file, but a folder of that name is to be written")
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"output {out}: no permission to write into {existing}")


def _show(progress: Progress, task: TaskID, done_before: int, done: int, text: str) -> None:
    progress.update(task, description=text, completed=done_before + done)


def _run(
    job: Job,
    pending: JobReport,
    out: Path,
    predictor: Predictor,
    paths: dict[str, AttentionConfig],
    show: Callable[[int, str], None],
) -> JobReport:
    results: dict[str, PathResult] = {}
    try:
        for name, attention in paths.items():
            show(len(results), f"{job.id}: {name}")
            results[name] = predictor.predict(job, attention)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out) as scratch:
            comparison = _write(job, results, Path(scratch))
            publish(Path(scratch), out / job.id, [f"{job.id}_{name}" for name in OUTPUTS])
    except Exception as error:  # whatever breaks one job must not stop the others
        _LOG.info("job %s failed", job.id, exc_info=True)
        return pending.failed(error)
    return pending.finished(results, comparison)


def _write(job: Job, results: dict[str, PathResult], folder: Path) -> Comparison | None:
    files = {name: folder / f"{job.id}_{name}.cif" for name in results}
    for name, result in results.items():
        write_mmcif(files[name], job, result.prediction, f"{job.id}, {name} prediction")
    if len(files) < 2:
        return None
    comparison = compare_structures(files[ACCELERATED], files[REFERENCE])
    write_atomically(folder / f"{job.id}_comparison.json", comparison_json(job, results, comparison))
    return comparison
