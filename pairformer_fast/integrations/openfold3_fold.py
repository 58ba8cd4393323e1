"""FASTA to structures with OpenFold3: its own run as the reference, and one with attention of this package.

Each path is one run of ``run_openfold predict`` over all jobs, with the same seed, hence the same conformers and the
same noise, so that the two structures of a job differ by attention alone. OpenFold3 draws several samples of a job; the
one that it ranks first in the first path is kept, and in the reference the sample of the same number.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from biotite.structure.io import pdbx

from pairformer_fast.bias import FactorsError
from pairformer_fast.bias.learned import read_shapes, side_file
from pairformer_fast.config import AttentionConfig, BiasMethod
from pairformer_fast.inference.compare import Comparison, compare_structures
from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.fasta import Job
from pairformer_fast.inference.files import publish, write_atomically
from pairformer_fast.inference.measure import Usage, measure
from pairformer_fast.inference.openfold3_input import QUERY, OpenFold3Input, read_input, write_query
from pairformer_fast.inference.pipeline import check_output
from pairformer_fast.inference.predict import resolve_device, resolve_precision
from pairformer_fast.inference.report import ACCELERATED, OUTPUTS, REFERENCE, JobReport, RunReport, comparison_json
from pairformer_fast.inference.settings import FoldSettings, Precision
from pairformer_fast.inference.writer import describe_quality, describe_software

_LOG = logging.getLogger(__name__)
_TRAINER_PRECISION = {Precision.FP32: "32-true", Precision.BF16: "bf16-mixed"}
_LONGEST_REASON = 400


def fold(fasta: str | Path, out: str | Path, settings: FoldSettings) -> RunReport:
    """Fold every job of a FASTA file with OpenFold3.

    Writes the files that :func:`pairformer_fast.inference.pipeline.fold` writes, and beside each structure
    OpenFold3's scores of it (``<id>_flashbias_confidences.json``), after the last job. The seconds are those of
    OpenFold3's model; on a GPU the first job's include the compilation of kernels.

    Parameters
    ----------
    fasta : str or Path
        Input, see :func:`~pairformer_fast.inference.fasta.read_complexes`.
    out : str or Path
        Folder to write into, made if needed. Results of other jobs in it stay.
    settings : FoldSettings
        What to do; its ``model`` is ``openfold3``.

    Returns
    -------
    RunReport
        What ``run.json`` holds.

    Raises
    ------
    InputError
        If input, settings or output folder will not do, or OpenFold3 refuses the checkpoint or the runner YAML.
    """
    given, out = read_input(fasta, settings), Path(out)
    check_output(out, given.jobs)
    factors = networks_file(settings)
    device = resolve_device(settings.device)
    _say_what_has_no_msa(given)
    paths: dict[str, AttentionConfig | None] = {}
    if settings.accelerated is not None:
        paths[ACCELERATED] = settings.accelerated
    if settings.reference is not None:
        paths[REFERENCE] = None
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=existing) as name:
        scratch = Path(name)
        write_query(given, settings.seed, scratch)
        runs = {
            path: _predict(
                scratch / path, runner_settings(settings, given.runner, attention, factors, device), settings, device
            )
            for path, attention in paths.items()
        }
        first = next(iter(runs.values()))
        engine = _Engine.of(first, settings, factors, device)
        chosen = {f"{job}:{chain}": path.name for (job, chain), path in given.msas.items()}
        report = RunReport.start(given.jobs, settings, engine, paths, ("openfold3",), msas=chosen)
        out.mkdir(parents=True, exist_ok=True)
        for job, pending in zip(given.jobs, report.jobs, strict=True):
            report = report.with_job(_finish(job, pending, runs, settings.seed, scratch / "finished", out))
        write_atomically(out / "run.json", report.model_dump_json(indent=2) + "\n")
    return report


def networks_file(settings: FoldSettings) -> Path | None:
    """Side file of the factor networks that the settings ask for, found and readable; None if they need none.

    Raises
    ------
    InputError
        If it is missing or unreadable.
    """
    if settings.bias is not BiasMethod.LEARNED:
        return None
    assert settings.checkpoint is not None
    file = side_file(settings.checkpoint) if settings.factors is None else settings.factors
    if not file.is_file():
        raise InputError(
            f"--bias learned: there are no factor networks at {file}; give them by --factors, or choose another bias"
        )
    try:
        read_shapes(file, settings.checkpoint)
    except FactorsError as error:
        raise InputError(str(error)) from error
    return file.absolute()


def runner_settings(
    settings: FoldSettings,
    given: dict[str, Any],
    attention: AttentionConfig | None,
    factors: Path | None,
    device: torch.device,
) -> dict[str, Any]:
    """Content of the runner YAML for one path.

    The command line comes first, then the user's YAML, then these defaults: neither MSA server nor templates, which
    both need a network.

    Parameters
    ----------
    settings : FoldSettings
        Device, precision, seed and recycles are taken from here.
    given : dict
        The user's runner YAML.
    attention : AttentionConfig, optional
        For attention of this package; None for OpenFold3's own.
    factors : Path, optional
        What :func:`networks_file` gave.
    device : torch.device
        Where to run.
    """
    from openfold3.core.config.config_utils import deep_update

    from pairformer_fast.integrations.openfold3_run import FACTORS, FLAG, OPTIONS

    memory: dict[str, Any] = {FLAG: attention is not None}
    if attention is not None:
        memory[OPTIONS] = attention.model_dump(mode="json") | {FACTORS: None if factors is None else str(factors)}
    if device.type == "cpu":
        memory["use_triton_triangle_kernels"] = False
    custom: dict[str, Any] = {"settings": {"memory": {"eval": memory}}}
    if settings.recycles is not None:
        custom["architecture"] = {"shared": {"num_recycles": settings.recycles}}
    trainer: dict[str, Any] = {"accelerator": "gpu" if device.type == "cuda" else "cpu", "devices": 1}
    if settings.precision is not Precision.AUTO:
        trainer["precision"] = _TRAINER_PRECISION[settings.precision]
    defaults = {
        "experiment_settings": {"use_msa_server": False, "use_templates": False},
        "data_module_args": {"num_workers": 0},
        "output_writer_settings": {"write_full_confidence_scores": False},
        "model_update": {"presets": ["predict"]},
    }
    asked = {
        "pl_trainer_args": trainer,
        "experiment_settings": {"seeds": [settings.seed]},
        "output_writer_settings": {"structure_format": "cif"},
        "model_update": {"custom": custom},
    }
    return deep_update(deep_update(defaults, copy.deepcopy(given)), asked)


@dataclass
class _Cost:
    usage: Usage
    reports: list[dict]
    precision: Precision
    recycles: int


@dataclass
class _Run:
    """One path over all jobs: folder of OpenFold3's output, and cost or failure of each job."""

    folder: Path
    started: bool = False
    costs: dict[str, _Cost] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)


@dataclass(frozen=True)
class _Engine:
    device: torch.device
    precision: Precision
    recycles: int | None
    checkpoint: Path
    factors: Path | None

    @classmethod
    def of(cls, run: _Run, settings: FoldSettings, factors: Path | None, device: torch.device) -> _Engine:
        assert settings.checkpoint is not None
        cost = next(iter(run.costs.values()), None)
        precision = resolve_precision(settings.precision, device) if cost is None else cost.precision
        recycles = settings.recycles if cost is None else cost.recycles
        return cls(device, precision, recycles, settings.checkpoint, factors)


@dataclass(frozen=True)
class _Result:
    usage: Usage
    mean_plddt: float
    reports: list[dict]


def _say_what_has_no_msa(given: OpenFold3Input) -> None:
    if (given.runner.get("experiment_settings") or {}).get("use_msa_server"):
        _LOG.warning("the runner YAML asks for the MSA server: sequences are sent to it")
    elif given.without_msa:
        _LOG.warning(
            "no alignment for %s: folded from the sequence alone, and no MSA server is asked; alignments are taken "
            "from --msa-dir or from headers like >A|protein|msa.a3m",
            ", ".join(given.without_msa),
        )


def _predict(folder: Path, runner: dict[str, Any], settings: FoldSettings, device: torch.device) -> _Run:
    """Run OpenFold3 over all jobs; it goes on after a job that fails."""
    from pairformer_fast.integrations.openfold3_run import logged_failures
    from pairformer_fast.integrations.openfold3_run import run as run_openfold

    folder.mkdir()
    runner_yaml = folder.with_suffix(".yml")
    runner_yaml.write_text(yaml.safe_dump(runner), encoding="utf-8")
    options = {
        "--query-json": folder.parent / QUERY,
        "--inference-ckpt-path": settings.checkpoint,
        "--runner-yaml": runner_yaml,
        "--output-dir": folder,
        "--use_tf32": settings.precision is not Precision.FP32,
    }
    run = _Run(folder)
    with _watched(run, settings.seed, device), logged_failures() as failures, redirect_stdout(sys.stderr):
        try:
            failed = run_openfold(["predict", *(str(part) for option in options.items() for part in option)])
        except InputError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST_REASON]
            if not run.started:
                raise InputError(f"OpenFold3 refuses the checkpoint or the runner YAML: {reason}") from error
            _LOG.info("OpenFold3 broke off", exc_info=True)
            failed = {"": RuntimeError(f"OpenFold3 broke off: {reason}")}
    run.failures |= failures | failed
    gc.collect()
    return run


@contextmanager
def _watched(run: _Run, seed: int, device: torch.device) -> Iterator[None]:
    """Note what each job costs, and seed before its features are made: OpenFold3 draws conformers unseeded."""
    from openfold3.core.data.framework.single_datasets.inference import InferenceDataset
    from openfold3.core.utils.callbacks import set_seed_for_rank
    from openfold3.projects.of3_all_atom.model import OpenFold3

    featurise, forward = InferenceDataset.create_all_features, OpenFold3.forward

    def seeded(self: Any, query: Any) -> dict:
        run.started = True
        set_seed_for_rank(seed, rank=0)
        return featurise(self, query)

    def measured(self: Any, batch: dict[str, Any]) -> Any:
        run.started = True
        half = torch.is_autocast_enabled(device.type) or next(self.parameters()).dtype is torch.bfloat16
        with measure(device) as usage:
            result = forward(self, batch)
        precision = Precision.BF16 if half else Precision.FP32
        [job] = batch["query_id"]
        run.costs[job] = _Cost(usage, self._flashbias.reports(), precision, self.shared.num_recycles)
        return result

    InferenceDataset.create_all_features, OpenFold3.forward = seeded, measured
    try:
        yield
    finally:
        InferenceDataset.create_all_features, OpenFold3.forward = featurise, forward


def _finish(job: Job, pending: JobReport, runs: dict[str, _Run], seed: int, scratch: Path, out: Path) -> JobReport:
    """Publish the files of one job, all or none."""
    for run in runs.values():
        broken = run.failures.get("") if job.id not in run.costs else None
        error = run.failures.get(job.id, broken)
        if error is not None:
            return pending.failed(error)
    try:
        results, comparison = _collect(job, runs, seed, scratch)
        publish(scratch, out / job.id, [f"{job.id}_{name}" for name in OUTPUTS])
    except Exception as error:  # whatever breaks one job must not stop the others
        _LOG.info("job %s failed", job.id, exc_info=True)
        return pending.failed(error)
    return pending.finished(results, comparison)


def _collect(job: Job, runs: dict[str, _Run], seed: int, scratch: Path) -> tuple[dict[str, _Result], Comparison | None]:
    scratch.mkdir(exist_ok=True)
    prefixes = {name: run.folder / job.id / f"seed_{seed}" / f"{job.id}_seed_{seed}" for name, run in runs.items()}
    sample = _best_sample(next(iter(prefixes.values())))
    results, files = {}, {}
    for name, run in runs.items():
        prefix = f"{prefixes[name]}_sample_{sample}"
        files[name] = scratch / f"{job.id}_{name}.cif"
        plddt = _write_structure(Path(f"{prefix}_model.cif"), files[name])
        scores = json.loads(Path(f"{prefix}_confidences_aggregated.json").read_text(encoding="utf-8"))
        write_atomically(
            scratch / f"{job.id}_{name}_confidences.json", json.dumps({"sample": sample, **scores}, indent=1) + "\n"
        )
        cost = run.costs[job.id]
        results[name] = _Result(cost.usage, plddt, cost.reports)
    if len(files) < 2:
        return results, None
    comparison = compare_structures(files[ACCELERATED], files[REFERENCE])
    write_atomically(scratch / f"{job.id}_comparison.json", comparison_json(job, results, comparison))
    return results, comparison


def _best_sample(prefix: Path) -> int:
    """Number of the sample that OpenFold3 ranks first."""
    scores = {}
    for path in prefix.parent.glob(f"{prefix.name}_sample_*_confidences_aggregated.json"):
        number = int(path.name.removeprefix(f"{prefix.name}_sample_").split("_")[0])
        scores[number] = json.loads(path.read_text(encoding="utf-8"))["sample_ranking_score"]
    if not scores:
        raise RuntimeError("OpenFold3 wrote no structure and no reason")
    return max(scores, key=lambda number: (-math.inf if math.isnan(scores[number]) else scores[number], -number))


def _write_structure(source: Path, target: Path) -> float:
    """OpenFold3's mmCIF with pLDDT declared as ModelCIF does; returns the mean over CA."""
    file = pdbx.CIFFile.read(source)
    atoms = pdbx.get_structure(file.block, model=1, extra_fields=["b_factor"], use_author_fields=False)
    if not all(map(math.isfinite, [*atoms.coord.flat, *atoms.b_factor])):
        raise RuntimeError("OpenFold3 predicted coordinates or confidences that are not finite")
    central = atoms[atoms.atom_name == "CA"]
    describe_software(file.block, "openfold3")
    describe_quality(file.block, central)
    file.write(target)
    return float(central.b_factor.mean())
