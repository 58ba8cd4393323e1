"""Raw antibody data to training and evaluation structures, with every drop counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from pairformer_fast.inference.antibody import check_variable_domain
from pairformer_fast.model.residue import ATOM14, RESTYPES
from pairformer_fast.training.idealize import idealize_backbones
from pairformer_fast.training.leakage import HeavyChain, check_leakage, find_leaks
from pairformer_fast.training.quality import keep_sound, repaired_too_far
from pairformer_fast.training.shards import Shard, Structure, shard_path, write_shard
from pairformer_fast.training.sources import Crystal, Pair, SabdabEntry, read_covabdab, read_crystals, read_sabdab
from pairformer_fast.training.teacher import predict_pairs

SABDAB_SOURCE = "sabdab"
PAIR_SOURCE = "covabdab"
CRYSTAL_SOURCE = "fv_crystal"

_Item = TypeVar("_Item", SabdabEntry, Pair)

_ATOM_EXISTS = np.array([[atom < len(ATOM14[aa]) for atom in range(14)] for aa in RESTYPES])  # [20, 14]


def sabdab_structure(entry: SabdabEntry) -> Structure:
    """Backbone-only structure of a VH domain."""
    atom14 = np.zeros((len(entry.sequence), 14, 3), dtype=np.float32)
    atom14[:, :4] = entry.backbone
    mask = np.zeros(atom14.shape[:2], dtype=bool)
    mask[:, :4] = True
    return _structure(entry.id, SABDAB_SOURCE, [entry.sequence], entry.cdr, atom14, mask)


def crystal_structure(crystal: Crystal) -> Structure:
    """Structure of an Fv crystal with the heavy atoms that were resolved."""
    mask = np.isfinite(crystal.atom14).all(axis=-1)
    chains = [crystal.vh, crystal.vl]
    return _structure(crystal.id, CRYSTAL_SOURCE, chains, _annotate(*chains), np.nan_to_num(crystal.atom14), mask)


def heavy_chains(items: Sequence[SabdabEntry | Pair | Crystal]) -> list[HeavyChain]:
    """VH and CDR-H3 of each item, by the source's own annotation and by ours."""
    chains = []
    for item in items:
        sequence = item.sequence if isinstance(item, SabdabEntry) else item.vh
        annotations = [item.cdr if isinstance(item, SabdabEntry) else check_variable_domain(sequence).cdr]
        cdr3 = {"".join(aa for aa, digit in zip(sequence, cdr, strict=False) if digit == "3") for cdr in annotations}
        if isinstance(item, Pair):
            cdr3.add(item.cdrh3)
        chains.append(HeavyChain(item.id, sequence, frozenset(cdr3 - {""})))
    return chains


def prepare(data: Path, output: Path, predict: Callable[[Sequence[Pair]], list[Structure]] | None) -> dict:
    """Write ``train``, ``val`` and ``crystal`` shards and ``summary.json`` to a folder.

    Parameters
    ----------
    data : Path
        Folder with ``sabdab_vh.jsonl.gz``, ``covabdab_pairs.csv.gz`` and ``fv_crystal/``.
    output : Path
    predict : callable, optional
        Structures of VH/VL pairs, in order (see :func:`predict_with_teacher`); without it the pairs are left out.

    Returns
    -------
    dict
        What ``summary.json`` holds: structures and bytes per split, drops per source, leaks that remain (0).

    Raises
    ------
    LeakageError
        If training data shares a cluster with evaluation data after filtering; nothing is written then.
    """
    entries = read_sabdab(data)
    crystals = read_crystals(data)
    val = [entry for entry in entries if entry.split == "val"]
    held_out = heavy_chains(val) + heavy_chains(crystals)
    domains, dropped_domains = _without_leaks([entry for entry in entries if entry.split == "train"], held_out)
    dropped = {SABDAB_SOURCE: dropped_domains}
    train, kept = [sabdab_structure(entry) for entry in domains], heavy_chains(domains)
    if predict is not None:
        pairs, structures, dropped[PAIR_SOURCE] = _predicted_pairs(data, held_out, predict)
        train += structures
        kept += heavy_chains(pairs)
    check_leakage(kept, held_out)
    splits = {
        "train": train,
        "val": [sabdab_structure(entry) for entry in val],
        "crystal": [crystal_structure(crystal) for crystal in crystals],
    }
    summary: dict = {"splits": {}, "dropped": dropped, "leaks_remaining": 0}
    for name, structures in splits.items():
        path = shard_path(output, name)
        write_shard(path, structures)
        summary["splits"][name] = {
            "structures": dict(sorted(Counter(structure.source for structure in structures).items())),
            "residues": sum(map(len, structures)),
            "residues_without_target": sum(int((~structure.atom14_mask[:, 1]).sum()) for structure in structures),
            "bytes": path.stat().st_size,
        }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def predict_with_teacher(
    pairs: Sequence[Pair], cache: Path, device: str, on_progress: Callable[[int], None] | None = None
) -> list[Structure]:
    """Teacher structures of pairs, from ``cache`` if it holds exactly these, else predicted and stored there."""
    if cache.is_file():
        shard = Shard(cache)
        if shard.ids == [pair.id for pair in pairs]:
            structures = list(shard)
            if all(_sequence(s) == pair.vh + pair.vl for s, pair in zip(structures, pairs, strict=True)):
                return structures
    predictions = predict_pairs([(pair.vh, pair.vl) for pair in pairs], device=device, on_progress=on_progress)
    structures = [
        _structure(
            id=pair.id,
            source=PAIR_SOURCE,
            chains=[pair.vh, pair.vl],
            cdr=_annotate(pair.vh, pair.vl),
            atom14=prediction.atom14,
            mask=_ATOM_EXISTS[_aatype(pair.vh + pair.vl)],
            weight=float(prediction.plddt.mean()) / 100,
        )
        for pair, prediction in zip(pairs, predictions, strict=True)
    ]
    write_shard(cache, structures)
    return list(Shard(cache))  # rounded as on every later call


def _predicted_pairs(
    data: Path, held_out: Sequence[HeavyChain], predict: Callable[[Sequence[Pair]], list[Structure]]
) -> tuple[list[Pair], list[Structure], dict[str, int]]:
    pairs, dropped = read_covabdab(data)
    domains = [pair for pair in pairs if _is_domain(pair.vh, "H") and _is_domain(pair.vl, "L")]
    dropped["not_variable_domains"] = len(pairs) - len(domains)
    pairs, leaks = _without_leaks(domains, held_out)
    dropped |= leaks
    predictions = predict(pairs)
    kept = []
    for pair, before, after in zip(pairs, predictions, idealize_backbones(predictions), strict=True):
        sound, problem = (None, "repaired_too_far") if repaired_too_far(before, after) else keep_sound(after)
        if sound is None:
            dropped[problem] = dropped.get(problem, 0) + 1
        else:
            kept.append((pair, sound))
    return [pair for pair, _ in kept], [structure for _, structure in kept], dropped


def _without_leaks(items: list[_Item], held_out: Sequence[HeavyChain]) -> tuple[list[_Item], dict[str, int]]:
    """Items that share no cluster with ``held_out``, and how many were dropped by what."""
    leaks = find_leaks(heavy_chains(items), held_out)
    leaking = {leak.train for leak in leaks}
    counts = {by: sum(leak.by == by for leak in leaks) for by in ("cdr3", "domain")}
    return [item for item in items if item.id not in leaking], {f"leak_by_{by}": n for by, n in counts.items()}


def _is_domain(sequence: str, chain_type: str) -> bool:
    check = check_variable_domain(sequence)
    return check.is_variable and check.chain_type == chain_type


def _annotate(*chains: str) -> str:
    return "".join(check_variable_domain(chain).cdr or "0" * len(chain) for chain in chains)


def _aatype(sequence: str) -> np.ndarray:
    return np.array([RESTYPES.index(aa) for aa in sequence], dtype=np.int8)


def _sequence(structure: Structure) -> str:
    return "".join(RESTYPES[aa] for aa in structure.aatype)


def _structure(
    id: str, source: str, chains: list[str], cdr: str, atom14: np.ndarray, mask: np.ndarray, weight: float = 1.0
) -> Structure:
    return Structure(
        id=id,
        source=source,
        aatype=_aatype("".join(chains)),
        chain_index=np.repeat(np.arange(len(chains), dtype=np.int8), [len(chain) for chain in chains]),
        residue_index=np.concatenate([np.arange(len(chain), dtype=np.int16) for chain in chains]),
        cdr=np.array([int(digit) for digit in cdr], dtype=np.int8),
        atom14=atom14.astype(np.float32),
        atom14_mask=mask,
        weight=weight,
    )
