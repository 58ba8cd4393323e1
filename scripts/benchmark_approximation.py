"""What factors in place of the pair bias do to bias, attention and structure: by method, rank, tolerance and place."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from benchmark_rows import machine
from torch import Tensor

from pairformer_fast.bias import Decision, PairBiasAttention, factor_ranks, observed_decisions, set_attention
from pairformer_fast.bias.certificate import kept_pairs, kept_tokens
from pairformer_fast.bias.toeplitz import toeplitz
from pairformer_fast.config import AttentionConfig, Backend
from pairformer_fast.inference.errors import InputError
from pairformer_fast.model.checkpoint import checkpoint_metadata, default_checkpoint, load_checkpoint
from pairformer_fast.model.folding import FoldingModel
from pairformer_fast.training.dataset import AntibodyDataset, Batch, collate
from pairformer_fast.training.evaluate import CDR_H3, superposed_rmsd
from pairformer_fast.training.losses import lddt_ca
from pairformer_fast.training.prepare import crystal_structure
from pairformer_fast.training.shards import write_shard
from pairformer_fast.training.sources import read_crystals

Row = dict[str, Any]

DENSE = AttentionConfig(backend=Backend.TORCH, bias="dense")
EVERYWHERE = "*"
PLACES = {
    **{f"block {block} only": f"*.blocks.{block}.*" for block in range(4)},
    "starting node only": "*tri_att_start*",
    "ending node only": "*tri_att_end*",
    "single attention only": "*attn_pair_bias*",
}
"""Attentions of the bundled model that take factors while all others stay dense, as shell patterns of their paths."""

RANK_OF_PLACES = 16


@dataclass(frozen=True)
class Variant:
    """What is asked of the attentions whose path fits ``pattern``; the others keep the dense bias."""

    name: str
    attention: AttentionConfig
    place: str = "everywhere"
    pattern: str = EVERYWHERE

    def set_on(self, model: FoldingModel) -> None:
        """Configure every attention of the model."""
        set_attention(model, DENSE)
        for path, module in model.named_modules():
            if isinstance(module, PairBiasAttention) and fnmatchcase(path, self.pattern):
                module.config = self.attention

    def asked(self) -> Row:
        """Its part of a row."""
        searched = self.attention.rank is None and self.attention.bias != "dense"
        return {
            "impl": f"pairformer_fast {self.name}",
            "method": self.attention.bias.value,
            "rank": self.attention.rank,
            "tolerance": self.attention.tolerance if searched else None,
            "certified": self.attention.certified,
            "place": self.place,
        }


def variants() -> list[Variant]:
    """All of them; the dense bias, which the others are compared with, comes first."""

    def made(name: str, place: str = "everywhere", pattern: str = EVERYWHERE, **asked: Any) -> Variant:
        return Variant(name, AttentionConfig(backend=Backend.TORCH, **asked), place, pattern)

    ranks = {"svd": (8, 16, 32, 64), "structured": (8, 16, 32), "randomised": (16, 32), "landmark": (16, 32)}
    by_rank = [made(f"{method}, rank {r}", bias=method, rank=r) for method, tried in ranks.items() for r in tried]
    by_tolerance = [made(f"svd, tolerance {t}", bias="svd", tolerance=t) for t in (0.3, 0.2, 0.1, 0.05)]
    others = [
        made("structured, tolerance 0.1", bias="structured", tolerance=0.1),
        made("auto, tolerance 0.1", bias="auto", tolerance=0.1),
        made("svd, certified tolerance 0.5", bias="svd", tolerance=0.5, certified=True),
    ]
    by_place = [
        made(f"svd, rank {RANK_OF_PLACES}, {place}", place, pattern, bias="svd", rank=RANK_OF_PLACES)
        for place, pattern in PLACES.items()
    ]
    return [Variant("dense", DENSE), *by_rank, *by_tolerance, *others, *by_place]


def read_targets(data: Path, names: str, scratch: Path) -> list[tuple[str, Batch]]:
    """Fv crystals of ``data/fv_crystal``: those named, comma-separated, or all.

    Raises
    ------
    FileNotFoundError
        If files are missing.
    InputError
        If they are damaged, or a name is none of theirs.
    """
    try:
        crystals = {crystal.id: crystal for crystal in read_crystals(data)}
    except ValueError as error:
        raise InputError(str(error)) from None
    chosen = names.split(",") if names else list(crystals)
    if unknown := [name for name in chosen if name not in crystals]:
        raise InputError(f"{data} has no crystal {', '.join(unknown)}; it has {', '.join(crystals)}")
    write_shard(scratch / "crystal.safetensors", [crystal_structure(crystals[name]) for name in chosen])
    dataset = AntibodyDataset(scratch, "crystal")
    return [(dataset.ids[i], collate([dataset[i]])) for i in range(len(dataset))]


def approximation_rows(
    targets: list[tuple[str, Batch]], known: list[Row], deadline: float, commit: str | None
) -> Iterator[Row]:
    """One row for each structure and variant that ``known`` has not, as soon as it is measured.

    The structure with the dense bias is computed again for every structure, as it is what the others are held against.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_checkpoint(default_checkpoint()).to(device).eval()
    origin = machine(commit) | {"training": checkpoint_metadata(default_checkpoint())["step"]}
    done = {(row["id"], row["impl"]) for row in known}
    for name, host_batch in targets:
        dense: Tensor | None = None
        for variant in variants():
            head = {"suite": "approximation", "op": "fold", "id": name, "n": host_batch.features.mask.shape[1]}
            head |= {"recycles": model.config.recycles, "dtype": "float32", **variant.asked()}
            if dense is not None and (name, head["impl"]) in done:
                continue
            if time.monotonic() > deadline:
                return
            batch = host_batch.to(device)
            folded, measured = measure(model, batch, variant)
            dense = folded if dense is None else dense
            if (name, head["impl"]) not in done:
                yield {**head, **measured, **structure_scores(folded, dense, batch), **origin}


def measure(model: FoldingModel, batch: Batch, variant: Variant) -> tuple[Tensor, Row]:
    """CA atoms ``[1, N, 3]`` (Å), and what became of the pair biases in the last recycle.

    Seconds are of the whole model with the making and judging of factors: of the processor on a CPU, so that other
    processes do not count, and of the clock on a GPU.
    """
    found: list[Row] = []
    calls = Counter[str]()
    clock = _gpu_clock if batch.features.mask.is_cuda else time.process_time
    watching = 0.0

    def watch(path: str, decision: Decision) -> None:
        nonlocal watching
        entered = clock()
        calls[path] += 1
        if calls[path] == model.config.recycles + 1:
            found.append({"name": path, **attention_errors(decision)})
        watching += clock() - entered

    variant.set_on(model)
    began = clock()
    with torch.inference_mode(), observed_decisions(model, watch):
        folded = model(batch.features, model.config.recycles).atom14[:, :, 1]
    seconds = clock() - began - watching
    return folded, {"seconds": round(seconds, 3), **summary(found), "attentions": found}


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.monotonic()


def attention_errors(decision: Decision) -> Row:
    """Rank and errors of one attention: means over heads of bias, probe and rank (of factors), else the worst head."""
    report, factors = decision.report, decision.outcome.factors
    if factors is None:
        return {"choice": report.choice, "rank": round(fmean(report.rank), 1)}
    ranks = factor_ranks(report.rank, report.dense_heads)
    return {
        "choice": report.choice,
        "rank": round(fmean(ranks), 1),
        "dense_heads": len(report.dense_heads),
        "bias_error": round(relative_error(decision.outcome.bias, factors, decision.mask), 4),
        "bound": round(max(report.bound), 5),
        "probed_mean": round(fmean(report.probed_mean), 5),
        "probed_worst": round(max(report.probed_mean), 5),
        "probed_max": round(max(report.probed_max), 5),
    }


def relative_error(bias: Tensor, factors: Any, mask: Tensor | None) -> float:
    """Frobenius norm of what the factors leave, relative to that of the bias less each row's mean; mean over heads."""
    keep = kept_tokens(mask, bias)
    pairs = kept_pairs(keep)
    count = keep.sum(-1)[:, None, None, None]

    def centred(table: Tensor) -> Tensor:
        table = table.double().masked_fill(~pairs, 0)
        return (table - table.sum(-1, keepdim=True) / count).masked_fill(~pairs, 0)

    product = factors.phi_q.double() @ factors.phi_k.double().mT
    if factors.table is not None:
        product = product + toeplitz(factors.table.double(), bias.shape[-1])
    left, whole = (torch.linalg.vector_norm(centred(x), dim=(-2, -1)) for x in (bias - product, bias))
    return float((left / whole).masked_fill(factors.dense_heads, 0).mean())


def summary(attentions: list[Row]) -> Row:
    """The attentions with factors together: means, and the worst bound and probe."""
    with_factors = [row for row in attentions if row["choice"] == "factors"]
    row: Row = {"factors": len(with_factors), "dense": len(attentions) - len(with_factors)}
    row["mean_rank"] = round(fmean(one["rank"] for one in with_factors), 1) if with_factors else None
    for name in ("bias_error", "bound", "probed_mean"):
        row[name] = round(fmean(one[name] for one in with_factors), 5) if with_factors else 0.0
    for name in ("bound", "probed_worst", "probed_max"):
        row[f"largest_{name}"] = max((one[name] for one in with_factors), default=0.0)
    return row


def structure_scores(folded: Tensor, dense: Tensor, batch: Batch) -> Row:
    """Change against the structure of the dense bias, and accuracy against the crystal; CA atoms, RMSD in Å."""
    known = batch.atom14_mask[:, :, 1]
    target = batch.atom14[:, :, 1]
    h3 = (batch.cdr == CDR_H3) & (batch.features.chain_index == 0)
    moved, accuracy = lddt_ca(folded, dense, torch.ones_like(known)), lddt_ca(folded, target, known)
    return {
        "ca_rmsd": round(superposed_rmsd(folded[0], dense[0]), 4),
        "lddt": round(float(moved.mean()), 4),
        "lddt_h3": round(float(moved[h3].mean()), 4),
        "crystal_ca_rmsd": round(superposed_rmsd(folded[known], target[known]), 4),
        "crystal_lddt": round(float(accuracy[known].mean()), 4),
        "crystal_lddt_h3": round(float(accuracy[h3 & known].mean()), 4),
    }


def line(row: Row) -> str:
    """A row for the terminal."""
    return (
        f"{row['id']} {row['impl']}: mean rank {row['mean_rank']}, attention {row['probed_mean']:.4f}, "
        f"CA RMSD {row['ca_rmsd']:.3f} Å, lDDT {row['lddt']:.4f}, {row['seconds']:.1f} s"
    )
