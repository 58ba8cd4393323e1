"""FASTA to what the pair biases of a model are like for each job, in JSON and, with matplotlib, in plots."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from pairformer_fast import bias as pair_bias
from pairformer_fast.bias.methods import DECOMPOSED
from pairformer_fast.config import AttentionConfig, BiasMethod, Frozen
from pairformer_fast.features import TokenFeatures
from pairformer_fast.inference.bias_inspection import TILE, AttentionInspection, factor_method, inspect_decision
from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.fasta import Job, read_fasta
from pairformer_fast.inference.files import write_atomically
from pairformer_fast.inference.learned import networks_file
from pairformer_fast.inference.pipeline import check_output, check_request
from pairformer_fast.inference.predict import Predictor, resolve_checkpoint
from pairformer_fast.inference.report import ACCELERATED, RunReport
from pairformer_fast.inference.settings import FoldSettings, Precision

_LOG = logging.getLogger(__name__)

JSON_FILE = "inspect.json"
PLOTS = ("spectra.svg", "ranks.svg", "dense_tiles.svg", "bound.svg")


class JobInspection(Frozen):
    """What ``inspect.json`` holds.

    Attributes
    ----------
    id : str
    chains : list of str
    residues : int
        Over all chains.
    run : dict
        Versions, machine, settings, what ``auto`` chose, and the checkpoint, as in ``run.json`` of a folding run.
    tolerance : float
        That ranks (by the probed mean) and tiles (by the bound) were chosen with.
    tile : int
        Edge of a tile.
    attentions : list of AttentionInspection
        In the order of their calls in the last recycle.
    """

    id: str
    chains: list[str]
    residues: int
    run: dict[str, Any]
    tolerance: float
    tile: int
    attentions: list[AttentionInspection]

    @property
    def labels(self) -> list[str]:
        """Names of the attentions without the parts that all of them share."""
        names = [attention.name for attention in self.attentions]
        parts = [name.split(".") for name in names]
        shared = set(parts[0]).intersection(*parts)
        short = [".".join(part for part in path if part not in shared) for path in parts]
        return short if all(short) and len(set(short)) == len(names) else names


@dataclass
class InspectionReport:
    """Outcome of :func:`inspect_biases`.

    Attributes
    ----------
    jobs : list of JobInspection
        Those that finished.
    failed : dict of str to str
        Reasons by the ids of the others.
    plotted : bool
        Whether plots were drawn.
    """

    plotted: bool
    jobs: list[JobInspection] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def inspect_biases(
    fasta: str | Path,
    out: str | Path,
    settings: FoldSettings,
    methods: Sequence[BiasMethod] = (),
    progress: Progress | None = None,
) -> InspectionReport:
    """Run the model once for every job of a FASTA file and measure the pair bias of every attention.

    Writes ``OUT/<id>/inspect.json`` (:class:`JobInspection`) and, where matplotlib is installed, :data:`PLOTS` beside
    it; older files of these names are replaced or removed. A job that fails writes nothing. All input is
    validated before the model is loaded.

    Parameters
    ----------
    fasta : str or Path
        Input, see :func:`~pairformer_fast.inference.fasta.read_fasta`.
    out : str or Path
        Folder to write into, made if needed.
    settings : FoldSettings
        How the model runs; ``compare`` is ignored.
    methods : sequence of BiasMethod
        Those whose error is measured at a ladder of ranks; by default the one that the settings' factors come from.
    progress : rich.progress.Progress, optional
        Shows one task over all jobs.

    Raises
    ------
    InputError
        If input, settings, methods, checkpoint or output folder will not do.
    """
    attention = settings.accelerated
    if attention is None:
        raise InputError("attention reference has nothing to choose: inspect with attention flashbias and bias dense")
    methods = list(dict.fromkeys(methods)) or [factor_method(settings.bias)]
    for method in methods:
        if method not in DECOMPOSED:
            raise InputError(f"--method {method}: makes no factors of a bias; choose {', '.join(DECOMPOSED)}")
    jobs = read_fasta(fasta)
    out = Path(out)
    check_output(out, jobs)
    check_request(jobs, settings)
    if networks_file(settings, resolve_checkpoint(settings)) is not None:
        raise InputError("learned factors come without a dense bias, which is what inspect looks at; drop bias learned")
    predictor = Predictor(settings)
    run = RunReport.start(jobs, settings, predictor, {ACCELERATED: attention})
    draw = _plotter()
    report = InspectionReport(plotted=draw is not None)
    progress = Progress(disable=True) if progress is None else progress
    task = progress.add_task("inspecting", total=len(jobs))
    for job in jobs:
        progress.update(task, description=job.id)
        try:
            result = JobInspection(
                id=job.id,
                chains=[chain.name for chain in job.chains],
                residues=job.length,
                run=run.model_dump(mode="json", exclude={"jobs"}),
                tolerance=attention.tolerance,
                tile=TILE,
                attentions=inspect_job(predictor, job, attention, methods),
            )
            files = {JSON_FILE: result.model_dump_json(indent=1) + "\n", **(draw(result) if draw else {})}
        except Exception as error:  # whatever breaks one job must not stop the others
            _LOG.info("job %s failed", job.id, exc_info=True)
            report.failed[job.id] = " ".join(str(error).split()) or type(error).__name__
        else:
            _publish(out / job.id, files)
            report.jobs.append(result)
        progress.advance(task)
    return report


def inspect_job(
    predictor: Predictor, job: Job, attention: AttentionConfig, methods: Sequence[BiasMethod]
) -> list[AttentionInspection]:
    """Run the model and measure every pair bias of its last recycle, the one that the structure comes from."""
    found, calls = [], Counter[str]()

    def watch(name: str, decision: pair_bias.Decision) -> None:
        calls[name] += 1
        if calls[name] == predictor.recycles + 1:
            found.append(inspect_decision(name, decision, methods))

    features = TokenFeatures.from_chains([chain.sequence for chain in job.chains]).to(predictor.device)
    autocast = torch.autocast(predictor.device.type, torch.bfloat16, enabled=predictor.precision is Precision.BF16)
    pair_bias.set_attention(predictor.model, attention)
    torch.manual_seed(predictor.seed)
    with torch.inference_mode(), autocast, pair_bias.observed_decisions(predictor.model, watch):
        predictor.model(features, predictor.recycles)
    return found


def _plotter() -> Callable[[JobInspection], dict[str, str]] | None:
    """What draws a job's plots; None without matplotlib."""
    try:
        from pairformer_fast.inference.inspection_plots import draw
    except ModuleNotFoundError:
        return None
    return draw


def _publish(folder: Path, files: dict[str, str]) -> None:
    """Write finished files and remove those of an earlier run that this one did not make."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PLOTS:
        if name not in files:
            (folder / name).unlink(missing_ok=True)
    for name, text in files.items():
        write_atomically(folder / name, text)
