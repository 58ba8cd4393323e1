"""The suite ``accuracy``: the hold-outs folded, against their crystal structures and beside the teacher's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_rows import machine, read_rows

from pairformer_fast.bias import attach_factors, set_attention
from pairformer_fast.bias.learned import side_file
from pairformer_fast.config import AttentionConfig, Backend, BiasMethod
from pairformer_fast.inference.errors import InputError
from pairformer_fast.model.checkpoint import (
    checkpoint_metadata,
    default_checkpoint,
    load_checkpoint,
    trained_with_factors,
)
from pairformer_fast.model.factors import load_factors
from pairformer_fast.model.folding import FoldingModel
from pairformer_fast.training.dataset import AntibodyDataset
from pairformer_fast.training.evaluate import Evaluation, Folded, fold_all, plddt_agreement, region_rmsd, score
from pairformer_fast.training.geometry import measure_geometry
from pairformer_fast.training.idealize import as_written
from pairformer_fast.training.prepare import predict_with_teacher
from pairformer_fast.training.shards import Structure
from pairformer_fast.training.sources import Pair

Row = dict[str, Any]

TARGETS, TEACHER = "crystal structure", "flash-abb"
FV_SPLIT = "crystal"
SPLITS = ("val", FV_SPLIT)
DIGITS = 4


def accuracy_rows(
    data: Path, checkpoint: Path | None, teacher: Path | None, splits: Sequence[str] = SPLITS
) -> Iterator[Row]:
    """Accuracy on the hold-outs: of the weights with the reference and accelerated, and of the teacher.

    Parameters
    ----------
    data : Path
        Shards ``val`` and ``crystal``.
    checkpoint : Path, optional
        Weights; the bundled ones if omitted.
    teacher : Path, optional
        Shard of the teacher's structures of the Fv crystals; predicted and written there if it has others.
    splits : sequence of str
        The hold-outs, of :data:`SPLITS`.

    Raises
    ------
    InputError
        If the teacher is needed and not installed, ``teacher`` is another kind of file, or the Fv are left out.
    """
    if teacher is not None and FV_SPLIT not in splits:
        raise InputError(f"--teacher {teacher}: flash-abb is scored on the Fv only: drop it or --split")
    path = default_checkpoint() if checkpoint is None else checkpoint
    held_out = {split: AntibodyDataset(data, split) for split in splits}
    targets = {split: [dataset.structure(i) for i in range(len(dataset))] for split, dataset in held_out.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_checkpoint(path).to(device)
    attentions = _attentions(model, path, device)
    taught = {} if teacher is None else {FV_SPLIT: _by_teacher(targets[FV_SPLIT], teacher, str(device))}
    for split, dataset in held_out.items():
        head = {"suite": "accuracy", "split": split}
        yield head | {"impl": TARGETS} | described([{"id": s.id} | geometry_of(s) for s in targets[split]]) | machine()
        if split in taught:
            yield head | {"impl": TEACHER} | teacher_part(targets[split], taught[split]) | machine()
        for name, attention in attentions.items():
            set_attention(model, attention)
            part = model_part(list(fold_all(model, dataset, device)))
            head_of_model = head | {"impl": name, "recycles": model.config.recycles}
            yield head_of_model | part | machine() | {"training": checkpoint_metadata(path)}


def beside(rows: Sequence[Row], output: Path) -> list[Row]:
    """The rows with those that ``output`` has of other splits, in the order of a run of all.

    Raises
    ------
    InputError
        If ``output`` is something else.
    """
    measured, stored = {row["split"] for row in rows}, read_rows(output)
    if any(row.get("split") not in SPLITS for row in stored):
        raise InputError(f"{output} has rows of another suite: give another --output")
    kept = [row for row in stored if row["split"] not in measured]
    return sorted([*kept, *rows], key=lambda row: SPLITS.index(row["split"]))


def model_part(structures: Sequence[Folded]) -> Row:
    """Accuracy, geometry and agreement of pLDDT of a split; ``written``: as ``fold`` writes them."""
    repaired = as_written([folded.prediction for folded in structures])
    written = [replace(one, prediction=prediction) for one, prediction in zip(structures, repaired, strict=True)]
    scores = [
        accuracy_of(one) | geometry_of(one.prediction) | geometry_of(after.prediction, "geometry_written")
        for one, after in zip(structures, written, strict=True)
    ]
    head = _summary(structures) | {"written": _summary(written), "plddt_agreement": plddt_agreement(structures)}
    return head | described(scores)


def teacher_part(targets: Sequence[Structure], predictions: Sequence[Structure]) -> Row:
    """Accuracy and geometry of the teacher's own structures."""
    unknown = [np.full(len(target), np.nan) for target in targets]
    structures = [Folded(*three) for three in zip(predictions, targets, unknown, strict=True)]
    return _summary(structures) | described([accuracy_of(one) | geometry_of(one.prediction) for one in structures])


def accuracy_of(folded: Folded) -> Row:
    """Scores of a structure, with the RMSD of each region."""
    return asdict(score(folded)) | {"regions": region_rmsd(folded.prediction, folded.target)}


def geometry_of(structure: Structure, key: str = "geometry") -> Row:
    """Stereochemistry of a structure."""
    return {key: asdict(measure_geometry(structure))}


def described(scores: Sequence[Row]) -> Row:
    """Mean, median and worst of every group of numbers (regions, geometry), and the rounded scores themselves."""
    groups = [key for key, value in scores[0].items() if isinstance(value, Mapping)]
    return {
        **{group: spreads([one[group] for one in scores]) for group in groups},
        "scores": [_rounded(one) for one in scores],
    }


def spreads(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, median and worst (largest) of every number, over the structures that have it."""
    found = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = np.array([row[key] for row in rows if key in row and not math.isnan(row[key])])
        if len(values):
            spread = {"mean": values.mean(), "median": np.median(values), "worst": values.max()}
            found[key] = {name: round(float(value), DIGITS) for name, value in spread.items()}
    return found


def _summary(structures: Sequence[Folded]) -> Row:
    scores = [score(folded) for folded in structures]
    h3, rmsd = ([getattr(one, name) for one in scores] for name in ("lddt_h3", "rmsd"))
    more = {
        "lddt_h3_median": np.nanmedian(h3), "lddt_h3_worst": np.nanmin(h3),
        "rmsd_median": np.median(rmsd), "rmsd_worst": np.max(rmsd),
    }  # fmt: skip
    return _rounded(Evaluation(scores).summary() | more)


def _rounded(value: Any) -> Any:
    """Numbers with few digits, None where there is none."""
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, float):
        return None if math.isnan(value) else round(float(value), DIGITS)
    return value


def _attentions(model: FoldingModel, path: Path, device: torch.device) -> dict[str, AttentionConfig]:
    """How pair biases are treated; factor networks are attached to weights that were trained with them."""
    if not trained_with_factors(path):
        return {"reference": AttentionConfig.reference(), "pairformer_fast svd": AttentionConfig(bias=BiasMethod.SVD)}
    attach_factors(model, load_factors(side_file(path), model, path).to(device))
    reference = AttentionConfig(backend=Backend.REFERENCE, bias=BiasMethod.LEARNED)
    return {"reference": reference, "pairformer_fast learned": AttentionConfig(bias=BiasMethod.LEARNED)}


def _by_teacher(targets: Sequence[Structure], cache: Path, device: str) -> list[Structure]:
    pairs = []
    for target in targets:
        vh, vl = (target.select(np.flatnonzero(target.chain_index == chain)).sequence for chain in (0, 1))
        pairs.append(Pair(target.id, vh, vl, cdrh3=""))
    try:
        return predict_with_teacher(pairs, cache, device)
    except ImportError as error:
        raise InputError("--teacher: flash-abb is missing: pip install 'pairformer_fast[train]'") from error
    except ValueError as error:
        raise InputError(f"--teacher: {error}") from error
