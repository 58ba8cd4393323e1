"""The suites that fold whole structures: time and change of structure, accuracy on the hold-outs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from benchmark_rows import machine

from pairformer_fast.bias import attach_factors, set_attention
from pairformer_fast.bias.learned import side_file
from pairformer_fast.config import AttentionConfig, Backend, BiasMethod
from pairformer_fast.inference.compare import compare_structures
from pairformer_fast.inference.fasta import Job, read_fasta
from pairformer_fast.inference.predict import Predictor
from pairformer_fast.inference.report import PathReport
from pairformer_fast.inference.settings import FoldSettings
from pairformer_fast.inference.writer import write_mmcif
from pairformer_fast.model.checkpoint import (
    checkpoint_metadata,
    default_checkpoint,
    load_checkpoint,
    trained_with_factors,
)
from pairformer_fast.model.factors import load_factors
from pairformer_fast.training.dataset import AntibodyDataset
from pairformer_fast.training.evaluate import evaluate

AUTO = AttentionConfig()
DENSE = AttentionConfig(backend=Backend.TORCH, bias=BiasMethod.DENSE)
RANKS = (1, 8, 16, 32, 64)
TOLERANCES = (0.3, 0.2, 0.1, 0.05, 0.02)


def fold_rows(fasta: Path, repeats: int) -> list[dict[str, Any]]:
    """Time, memory and change of structure of every way to treat the pair bias, against the reference."""
    predictor = Predictor(FoldSettings())
    variants = {"dense": DENSE, "auto": AUTO}
    variants |= {f"svd, rank {r}": AttentionConfig(bias=BiasMethod.SVD, rank=r) for r in RANKS}
    variants |= {f"svd, tolerance {t}": AttentionConfig(bias=BiasMethod.SVD, tolerance=t) for t in TOLERANCES}
    return [row for job in read_fasta(fasta) for row in _job_rows(predictor, job, variants, repeats)]


def accuracy_rows(data: Path, checkpoint: Path | None) -> list[dict[str, Any]]:
    """Accuracy on the hold-outs, with the reference and accelerated."""
    path = default_checkpoint() if checkpoint is None else checkpoint
    held_out = {split: AntibodyDataset(data, split) for split in ("val", "crystal")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_checkpoint(path).to(device)
    attentions = {"reference": AttentionConfig.reference(), "pairformer_fast auto": AUTO}
    if trained_with_factors(path):
        attach_factors(model, load_factors(side_file(path), model, path).to(device))
        reference = AttentionConfig(backend=Backend.REFERENCE, bias=BiasMethod.LEARNED)
        attentions = {"reference": reference, "pairformer_fast learned": AttentionConfig(bias=BiasMethod.LEARNED)}
    rows = []
    for split, dataset in held_out.items():
        for name, attention in attentions.items():
            set_attention(model, attention)
            result = evaluate(model, dataset, device)
            row = {"suite": "accuracy", "split": split, "impl": name, "recycles": model.config.recycles}
            rows.append(row | result.summary() | {"scores": [asdict(score) for score in result.scores]} | machine())
            print({key: value for key, value in rows[-1].items() if key != "scores"}, flush=True)
    return [{**row, "training": checkpoint_metadata(path)} for row in rows]


def _job_rows(
    predictor: Predictor, job: Job, variants: dict[str, AttentionConfig], repeats: int
) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.cif"
        for name, attention in {"reference": AttentionConfig.reference(), **variants}.items():
            runs = [predictor.predict(job, attention) for _ in range(repeats)]
            best = min(runs, key=lambda run: run.usage.seconds)
            path = reference if name == "reference" else Path(folder) / "structure.cif"
            write_mmcif(path, job, best.prediction, name)
            comparison = compare_structures(path, reference)
            row = {
                "suite": "fold",
                "op": "fold",
                "impl": name if name == "reference" else f"pairformer_fast {name}",
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
