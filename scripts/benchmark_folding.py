"""The suite ``fold``: time and change of structure of every way to treat the pair bias."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmark_rows import machine

from pairformer_fast.config import AttentionConfig, Backend, BiasMethod
from pairformer_fast.inference.compare import compare_structures
from pairformer_fast.inference.fasta import Job, read_fasta
from pairformer_fast.inference.predict import Predictor
from pairformer_fast.inference.report import PathReport
from pairformer_fast.inference.settings import FoldSettings
from pairformer_fast.inference.writer import write_mmcif

AUTO = AttentionConfig()
DENSE = AttentionConfig(backend=Backend.TORCH, bias=BiasMethod.DENSE)
RANKS = (1, 8, 16, 32, 64)
TOLERANCES = (0.3, 0.2, 0.1, 0.05, 0.02)


def fold_rows(fasta: Path, repeats: int) -> list[dict[str, Any]]:
    """Time, memory and change of structure of every way to treat the pair bias, against the weights' reference."""
    trained_dense, trained_with_factors = Predictor(FoldSettings()), Predictor(FoldSettings(bias=BiasMethod.LEARNED))
    variants = {"dense": DENSE, "auto": AUTO}
    variants |= {f"svd, rank {r}": AttentionConfig(bias=BiasMethod.SVD, rank=r) for r in RANKS}
    variants |= {f"svd, tolerance {t}": AttentionConfig(bias=BiasMethod.SVD, tolerance=t) for t in TOLERANCES}
    learned = {"learned": trained_with_factors.accelerated}
    rows = []
    for job in read_fasta(fasta):
        rows += _job_rows(trained_dense, job, "reference", variants, repeats)
        rows += _job_rows(trained_with_factors, job, "reference of learned", learned, repeats)
    return rows


def _job_rows(
    predictor: Predictor, job: Job, reference_name: str, variants: dict[str, AttentionConfig], repeats: int
) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.cif"
        for name, attention in {reference_name: predictor.reference, **variants}.items():
            runs = [predictor.predict(job, attention) for _ in range(repeats)]
            best = min(runs, key=lambda run: run.usage.seconds)
            path = reference if name == reference_name else Path(folder) / "structure.cif"
            write_mmcif(path, job, best.prediction, name)
            comparison = compare_structures(path, reference)
            row = {
                "suite": "fold",
                "op": "fold",
                "impl": name if name == reference_name else f"pairformer_fast {name}",
                "id": job.id,
                "n": job.length,
                "recycles": predictor.recycles,
                "dtype": predictor.precision,
                **PathReport.of(best).model_dump(),
                "ca_rmsd": round(comparison.ca_rmsd, 4),
                "lddt_ca": comparison.lddt_ca,
                **machine(),
            }
            print(*(f"{key}={row[key]}" for key in ("id", "impl", "n", "seconds", "ca_rmsd", "lddt_ca")), flush=True)
            yield row
