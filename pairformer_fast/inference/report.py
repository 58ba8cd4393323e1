"""What a run reports: ``run.json`` and, per job, ``<id>_comparison.json``."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Protocol

import torch
from pydantic import Field

from pairformer_fast.bias import factor_ranks
from pairformer_fast.bias.learned import sha256
from pairformer_fast.config import AttentionConfig, Frozen
from pairformer_fast.inference.compare import Comparison
from pairformer_fast.inference.fasta import Job
from pairformer_fast.inference.measure import Usage
from pairformer_fast.inference.settings import FoldSettings, Precision

ACCELERATED, REFERENCE = "flashbias", "reference"
_PATHS = (ACCELERATED, REFERENCE)
OUTPUTS = (*(f"{path}.cif" for path in _PATHS), *(f"{path}_confidences.json" for path in _PATHS), "comparison.json")
"""Files of a job, each after its id and an underscore; scores of confidence are OpenFold3's."""


class Measured(Protocol):
    """What a report needs of a prediction: its cost, its mean pLDDT, and what became of every pair bias."""

    @property
    def usage(self) -> Usage: ...

    @property
    def mean_plddt(self) -> float: ...

    @property
    def reports(self) -> list[dict]: ...


class Engine(Protocol):
    """What a report needs of a predictor: where and how it runs, and the files of its weights and factor networks."""

    @property
    def device(self) -> torch.device: ...

    @property
    def precision(self) -> Precision: ...

    @property
    def recycles(self) -> int | None: ...

    @property
    def checkpoint(self) -> Path: ...

    @property
    def factors(self) -> Path | None: ...


class PathReport(Frozen):
    """One path of one job.

    Attributes
    ----------
    seconds : float
        Wall time of the model.
    peak_bytes : int or None
        Above what was in use before, see :class:`~pairformer_fast.inference.measure.Usage`.
    mean_plddt : float
        0 to 100.
    backends : list of str
        What computed attention, such as ``torch`` or ``triton``; what ``auto`` chose.
    factors, dense : int
        Calls of attention that took factors and that took the dense bias.
    dense_heads : int
        Heads that kept the dense bias in calls that took factors.
    dense_because : list of str
        Why calls took the dense bias, each reason once.
    mean_rank : float or None
        Over the heads that took factors.
    probed_error, bound : float or None
        Largest measured mean total variation of a head's attention weights, and the largest certified bound on it; None
        for learned factors, whose dense bias is not computed.
    predicted_cost : float or None
        Mean over the calls of attention of the time relative to that with the dense bias, from measurements
        (:mod:`pairformer_fast.bias.costs`), without what factors cost to make; None where none were made.
    """

    seconds: float
    peak_bytes: int | None
    mean_plddt: float
    backends: list[str]
    factors: int
    dense: int
    mean_rank: float | None
    probed_error: float | None
    bound: float | None
    predicted_cost: float | None = None
    dense_heads: int = 0
    dense_because: list[str] = Field(default_factory=list)

    @classmethod
    def of(cls, result: Measured) -> PathReport:
        """Summary of a prediction."""
        factors = [report for report in result.reports if report["choice"] == "factors"]
        ranks = [rank for report in factors for rank in factor_ranks(report["rank"], report["dense_heads"])]
        costs = [report["predicted_cost"] for report in result.reports if report["predicted_cost"] is not None]
        return cls(
            seconds=result.usage.seconds,
            peak_bytes=result.usage.peak_bytes,
            mean_plddt=result.mean_plddt,
            backends=sorted({report["backend"] for report in result.reports}),
            factors=len(factors),
            dense=len(result.reports) - len(factors),
            mean_rank=fmean(ranks) if ranks else None,
            probed_error=_worst(factors, "probed_mean"),
            bound=_worst(factors, "bound"),
            predicted_cost=fmean(costs) if costs else None,
            dense_heads=sum(len(report["dense_heads"]) for report in factors),
            dense_because=sorted({report["reason"] for report in result.reports if report["reason"] is not None}),
        )


class JobReport(Frozen):
    """Outcome of a job; the metrics are those of the accelerated structure against the reference's."""

    id: str
    chains: list[str]
    residues: int
    status: Literal["pending", "ok", "failed"] = "pending"
    error: str | None = None
    paths: dict[str, PathReport] = Field(default_factory=dict)
    speed_up: float | None = None
    ca_rmsd: float | None = None
    all_atom_rmsd: float | None = None
    lddt_ca: float | None = None
    tm_score: float | None = None

    @classmethod
    def pending(cls, job: Job) -> JobReport:
        """Before the job has run."""
        return cls(id=job.id, chains=[chain.name for chain in job.chains], residues=job.length)

    def failed(self, error: Exception) -> JobReport:
        """After it broke."""
        reason = " ".join(str(error).split()) or type(error).__name__
        return self.model_copy(update={"status": "failed", "error": reason})

    def finished(self, results: Mapping[str, Measured], comparison: Comparison | None) -> JobReport:
        """After it has run."""
        update: dict[str, Any] = {"status": "ok", "paths": {name: PathReport.of(r) for name, r in results.items()}}
        if comparison is not None:
            seconds = {name: result.usage.seconds for name, result in results.items()}
            update["speed_up"] = seconds[REFERENCE] / seconds[ACCELERATED]
            for name in ("ca_rmsd", "all_atom_rmsd", "lddt_ca", "tm_score"):
                update[name] = getattr(comparison, name)
        return self.model_copy(update=update)


class RunReport(Frozen):
    """What ``run.json`` holds.

    Attributes
    ----------
    versions, machine : dict[str, str]
        Software and hardware.
    settings : dict[str, Any]
        As asked for.
    chosen : dict[str, Any]
        What ``auto`` and omitted settings became; which bias each call of attention took is in the jobs.
    checkpoint : dict[str, str]
        File name and SHA-256 of the weights.
    factors : dict[str, str], optional
        The same of the factor networks; None if no path takes them.
    jobs : list[JobReport]
        In the order of the FASTA file.
    """

    versions: dict[str, str]
    machine: dict[str, str]
    settings: dict[str, Any]
    chosen: dict[str, Any]
    checkpoint: dict[str, str]
    factors: dict[str, str] | None
    jobs: list[JobReport]

    @classmethod
    def start(
        cls,
        jobs: list[Job],
        settings: FoldSettings,
        predictor: Engine,
        paths: Mapping[str, AttentionConfig | None],
        packages: tuple[str, ...] = (),
        **chosen: Any,
    ) -> RunReport:
        """Before the first job has run.

        Parameters
        ----------
        jobs, settings, predictor
            What is run, how and with what.
        paths : mapping
            Attention of each path; None is that of the model's own package.
        packages : tuple of str
            Further packages whose versions matter.
        **chosen
            Further entries of ``chosen``.
        """
        named = ("pairformer_fast", "torch", "numpy", "biotite", "tmtools", *packages)
        attentions = {name: None if path is None else path.model_dump(mode="json") for name, path in paths.items()}
        return cls(
            versions={"python": platform.python_version(), **{name: version(name) for name in named}},
            machine=_machine(predictor.device),
            settings=settings.model_dump(mode="json"),
            chosen={
                "device": str(predictor.device),
                "precision": predictor.precision.value,
                "recycles": predictor.recycles,
                "paths": attentions,
                **chosen,
            },
            checkpoint=_identity(predictor.checkpoint),
            factors=None if predictor.factors is None else _identity(predictor.factors),
            jobs=[JobReport.pending(job) for job in jobs],
        )

    def with_job(self, report: JobReport) -> RunReport:
        """Copy in which ``report`` replaces that of the same job."""
        return self.model_copy(update={"jobs": [report if job.id == report.id else job for job in self.jobs]})

    @property
    def failed(self) -> list[JobReport]:
        """Jobs that did not finish."""
        return [job for job in self.jobs if job.status == "failed"]


def comparison_json(job: Job, results: Mapping[str, Measured], comparison: Comparison) -> str:
    """Metrics, cost of each path, and rank, eps and probed error of every call of attention, per head."""
    content = {
        "id": job.id,
        **comparison.model_dump(mode="json"),
        "paths": {name: PathReport.of(result).model_dump(mode="json") for name, result in results.items()},
        "speed_up": results[REFERENCE].usage.seconds / results[ACCELERATED].usage.seconds,
        "bias": results[ACCELERATED].reports,
    }
    return json.dumps(content, indent=1) + "\n"


def _worst(reports: list[dict[str, Any]], error: str) -> float | None:
    if any(report[error] is None for report in reports):
        return None
    return max((max(report[error]) for report in reports), default=0.0)


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"system": platform.platform(), "device": name, "cpu_threads": str(torch.get_num_threads())}


def _identity(path: Path) -> dict[str, str]:
    return {"name": path.name, "sha256": sha256(path)}
