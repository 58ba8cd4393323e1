"""Measure, and write every number that the documentation quotes to data/benchmarks/SUITE.json."""

from __future__ import annotations

import json
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pairformer_fast.bias import set_attention
from pairformer_fast.config import AttentionConfig, Backend, BiasMethod
from pairformer_fast.inference.compare import compare_structures
from pairformer_fast.inference.fasta import Job, read_fasta
from pairformer_fast.inference.predict import Predictor
from pairformer_fast.inference.report import PathReport
from pairformer_fast.inference.settings import FoldSettings
from pairformer_fast.inference.writer import write_mmcif
from pairformer_fast.model.checkpoint import checkpoint_metadata, default_checkpoint, load_checkpoint
from pairformer_fast.training.dataset import AntibodyDataset
from pairformer_fast.training.evaluate import evaluate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "benchmarks"
AUTO = AttentionConfig()
DENSE = AttentionConfig(backend=Backend.TORCH, bias=BiasMethod.DENSE)
RANKS = (1, 8, 16, 32, 64)
TOLERANCES = (0.3, 0.2, 0.1, 0.05, 0.02)

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.command()
def fold(
    fasta: Annotated[Path, typer.Argument(help="Jobs to fold.")] = ROOT / "data" / "golden" / "golden.fasta",
    repeats: Annotated[int, typer.Option(help="Timed runs of each setting; the fastest counts.")] = 1,
    output: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "fold.json",
) -> None:
    """Time, memory and change of structure of every way to treat the pair bias, against the reference."""
    predictor = Predictor(FoldSettings())
    variants = {"dense": DENSE, "auto": AUTO}
    variants |= {f"svd, rank {r}": AttentionConfig(bias=BiasMethod.SVD, rank=r) for r in RANKS}
    variants |= {f"svd, tolerance {t}": AttentionConfig(bias=BiasMethod.SVD, tolerance=t) for t in TOLERANCES}
    rows = [row for job in read_fasta(fasta) for row in _fold_rows(predictor, job, variants, repeats)]
    _write(output, rows)


@app.command()
def accuracy(
    data: Annotated[Path, typer.Option(help="Shards of scripts/prepare_antibody_data.py.")] = Path("runs/data"),
    checkpoint: Annotated[Path | None, typer.Option(help="Weights; the bundled ones if omitted.")] = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "accuracy.json",
) -> None:
    """Accuracy on the hold-outs, with the reference and accelerated."""
    path = default_checkpoint() if checkpoint is None else checkpoint
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_checkpoint(path).to(device)
    rows = []
    for split in ("val", "crystal"):
        for name, attention in (("reference", AttentionConfig.reference()), ("pairformer_fast auto", AUTO)):
            set_attention(model, attention)
            result = evaluate(model, AntibodyDataset(data, split), device)
            row = {"suite": "accuracy", "split": split, "impl": name, "recycles": model.config.recycles}
            rows.append(row | result.summary() | {"scores": [asdict(score) for score in result.scores]} | _machine())
            print({key: value for key, value in rows[-1].items() if key != "scores"}, flush=True)
    _write(output, [{**row, "training": checkpoint_metadata(path)} for row in rows])


def _fold_rows(
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
                **_machine(),
            }
            print(*(f"{key}={row[key]}" for key in ("id", "impl", "n", "seconds", "ca_rmsd", "lddt_ca")), flush=True)
            yield row


def _machine() -> dict[str, Any]:
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{_processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit.stdout.strip() or None,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    app()
