"""Raw antibody data to training and evaluation structures, with every drop counted.

Pairs of sequences get structures from a teacher. Where that runs on another machine, a table of the pairs goes there,
and :func:`add_pairs` puts their structures beside the shards that are there already.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from pairformer_fast.inference.antibody import check_variable_domain
from pairformer_fast.inference.files import write_atomically
from pairformer_fast.model.residue import ATOM14, RESTYPES
from pairformer_fast.training.derive import DERIVED_SOURCE, Derivation, derive_pairs, heavy_chain
from pairformer_fast.training.idealize import idealize_backbones
from pairformer_fast.training.leakage import HeavyChain, annotated_chain, check_leakage, find_leaks
from pairformer_fast.training.quality import checked
from pairformer_fast.training.shards import Shard, Structure, shard_path, write_shard
from pairformer_fast.training.sources import (
    COVABDAB_SOURCE,
    Crystal,
    Pair,
    SabdabEntry,
    read_covabdab,
    read_crystals,
    read_sabdab,
    write_pairs,
)
from pairformer_fast.training.teacher import predict_pairs

SABDAB_SOURCE = "sabdab"
CRYSTAL_SOURCE = "fv_crystal"
TABLE = "pairs.csv.gz"
REPAIRED = {"cpu": 128, "gpu": 1024}
"""Structures repaired together: on a GPU launches cost more than the work."""

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
        if isinstance(item, Pair):
            chains.append(heavy_chain(item))
        elif isinstance(item, SabdabEntry):
            chains.append(annotated_chain(item.id, item.sequence, [item.cdr]))
        else:
            chains.append(annotated_chain(item.id, item.vh, [check_variable_domain(item.vh).cdr]))
    return chains


def training_pairs(
    data: Path, held_out: Sequence[HeavyChain], derivation: Derivation | None = None
) -> tuple[list[Pair], dict[str, dict[str, int]]]:
    """Pairs of CoV-AbDab that share no cluster with evaluation data, and pairs derived from them and SAbDab domains.

    Parameters
    ----------
    data : Path
        Folder with the raw data.
    held_out : sequence of HeavyChain
        Evaluation domains.
    derivation : Derivation, optional
        Without it nothing is derived.

    Returns
    -------
    pairs : list of Pair
    dropped : dict of str to dict
        Drops of each source, by reason.
    """
    pairs, drops = read_covabdab(data)
    domains = [pair for pair in pairs if _is_domain(pair.vh, "H") and _is_domain(pair.vl, "L")]
    drops["not_variable_domains"] = len(pairs) - len(domains)
    domains = [replace(pair, cdr=_annotate(pair.vh, pair.vl)) for pair in domains]
    pairs, leaks = _without_leaks(domains, held_out)
    dropped = {COVABDAB_SOURCE: drops | leaks}
    if derivation is not None:
        crystals, _ = _without_leaks([entry for entry in read_sabdab(data) if entry.split == "train"], held_out)
        heavy = [entry.sequence for entry in crystals] + [pair.vh for pair in pairs]
        derived, dropped[DERIVED_SOURCE] = derive_pairs(heavy, [pair.vl for pair in pairs], held_out, derivation)
        pairs = pairs + derived
    return pairs, dropped


def prepare(
    data: Path,
    output: Path,
    predict: Callable[[Sequence[Pair]], list[Structure]] | None,
    derivation: Derivation | None = None,
) -> dict:
    """Write ``train``, ``val`` and ``crystal`` shards and ``summary.json`` to a folder.

    Parameters
    ----------
    data : Path
        Folder with ``sabdab_vh.jsonl.gz``, ``covabdab_pairs.csv.gz`` and ``fv_crystal/``.
    output : Path
    predict : callable, optional
        Structures of VH/VL pairs, in order (see :func:`predict_with_teacher`); without it the pairs are left out.
    derivation : Derivation, optional
        Pairs to derive from known ones and predict, too.

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
    held_out = _held_out(entries, crystals)
    domains, dropped_domains = _without_leaks([entry for entry in entries if entry.split == "train"], held_out)
    dropped: dict[str, dict[str, int]] = {SABDAB_SOURCE: dropped_domains}
    train, kept = [sabdab_structure(entry) for entry in domains], heavy_chains(domains)
    if predict is not None:
        pairs, drops = training_pairs(data, held_out, derivation)
        pairs, structures, unsound = sound_structures(pairs, predict(pairs))
        dropped |= {source: drops[source] | unsound.get(source, {}) for source in drops}
        train += structures
        kept += heavy_chains(pairs)
    check_leakage(kept, held_out)
    splits = {
        "train": train,
        "val": [sabdab_structure(entry) for entry in entries if entry.split == "val"],
        "crystal": [crystal_structure(crystal) for crystal in crystals],
    }
    summary: dict = {"splits": {}, "dropped": dropped, "leaks_remaining": 0}
    for name, structures in splits.items():
        path = shard_path(output, name)
        write_shard(path, structures)
        summary["splits"][name] = _counts(path, structures)
    write_atomically(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def write_table(data: Path, output: Path, derivation: Derivation | None = None) -> dict:
    """Write the pairs of :func:`training_pairs` to ``pairs.csv.gz`` in a folder, for :func:`add_pairs`.

    Returns
    -------
    dict
        Pairs and drops per source, also written to ``table.json`` there.

    Raises
    ------
    LeakageError
        If a pair shares a cluster with evaluation data after filtering; nothing is written then.
    """
    held_out = _held_out(read_sabdab(data), read_crystals(data))
    pairs, dropped = training_pairs(data, held_out, derivation)
    check_leakage(heavy_chains(pairs), held_out)
    write_pairs(output / TABLE, pairs)
    counts = {"pairs": dict(sorted(Counter(pair.source for pair in pairs).items())), "dropped": dropped}
    write_atomically(output / "table.json", json.dumps(counts, indent=2) + "\n")
    return counts


def add_pairs(
    pairs: Sequence[Pair],
    folder: Path,
    device: str,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> dict:
    """Predict pairs and write them beside the shards of a folder, as ``train-pairs.safetensors``.

    Parameters
    ----------
    pairs : sequence of Pair
        As :func:`training_pairs` gives them.
    folder : Path
        Holds ``val`` and ``crystal``, with which no pair may share a cluster.
    device : str
        Where the teacher runs and backbones are repaired.
    batch_size : int
        Pairs predicted together.
    on_progress : callable, optional
        Called with the number of pairs each batch had.

    Returns
    -------
    dict
        Counts and drops, also written to ``pairs.json`` there.

    Raises
    ------
    FileNotFoundError
        If a hold-out is missing.
    LeakageError
        If a pair shares a cluster with them; nothing is predicted then.
    """
    held_out = [chain for split in ("val", "crystal") for chain in _first_chains(Shard(shard_path(folder, split)))]
    check_leakage(heavy_chains(pairs), held_out)
    predicted = predict_structures(pairs, device, batch_size, on_progress)
    _, structures, unsound = sound_structures(pairs, predicted, device)
    path = shard_path(folder, "train-pairs")
    write_shard(path, structures)
    summary = {**_counts(path, structures), "dropped": unsound, "leaks_remaining": 0}
    write_atomically(folder / "pairs.json", json.dumps(summary, indent=2) + "\n")
    return summary


def predict_with_teacher(
    pairs: Sequence[Pair], cache: Path, device: str, on_progress: Callable[[int], None] | None = None
) -> list[Structure]:
    """Teacher structures of pairs, from ``cache`` if it holds exactly these, else predicted and stored there."""
    if cache.is_file():
        shard = Shard(cache)
        if shard.ids == [pair.id for pair in pairs]:
            structures = list(shard)
            if all(s.sequence == pair.vh + pair.vl for s, pair in zip(structures, pairs, strict=True)):
                return structures
    write_shard(cache, predict_structures(pairs, device, on_progress=on_progress))
    return list(Shard(cache))  # rounded as on every later call


def predict_structures(
    pairs: Sequence[Pair], device: str, batch_size: int = 8, on_progress: Callable[[int], None] | None = None
) -> list[Structure]:
    """Teacher structures of pairs; the teacher's mean pLDDT is their weight."""
    predictions = predict_pairs([(pair.vh, pair.vl) for pair in pairs], batch_size, device, on_progress)
    return [
        _structure(
            id=pair.id,
            source=pair.source,
            chains=[pair.vh, pair.vl],
            cdr=pair.cdr or _annotate(pair.vh, pair.vl),
            atom14=prediction.atom14,
            mask=_ATOM_EXISTS[_aatype(pair.vh + pair.vl)],
            weight=float(prediction.plddt.mean()) / 100,
        )
        for pair, prediction in zip(pairs, predictions, strict=True)
    ]


def sound_structures(
    pairs: Sequence[Pair], predictions: Sequence[Structure], device: str = "cpu"
) -> tuple[list[Pair], list[Structure], dict[str, dict[str, int]]]:
    """Predictions with closed peptide bonds, without those that are unsure or broken, and drops of each source."""
    kept, dropped = [], dict[str, dict[str, int]]()
    repaired = idealize_backbones(predictions, REPAIRED["cpu" if device == "cpu" else "gpu"], device)
    for pair, before, after in zip(pairs, predictions, repaired, strict=True):
        sound, problem = checked(before, after)
        if sound is None:
            counts = dropped.setdefault(pair.source, {})
            counts[problem] = counts.get(problem, 0) + 1
        else:
            kept.append((pair, sound))
    return [pair for pair, _ in kept], [structure for _, structure in kept], dropped


def _held_out(entries: Sequence[SabdabEntry], crystals: Sequence[Crystal]) -> list[HeavyChain]:
    return heavy_chains([entry for entry in entries if entry.split == "val"]) + heavy_chains(crystals)


def _counts(path: Path, structures: Sequence[Structure]) -> dict:
    return {
        "structures": dict(sorted(Counter(structure.source for structure in structures).items())),
        "residues": sum(map(len, structures)),
        "residues_without_target": sum(int((~structure.atom14_mask[:, 1]).sum()) for structure in structures),
        "bytes": path.stat().st_size,
    }


def _first_chains(shard: Shard) -> list[HeavyChain]:
    """VH and CDR-H3 of the structures of a shard, by their annotation and by ours."""
    chains = []
    for structure in shard:
        first = structure.select(np.flatnonzero(structure.chain_index == 0))
        annotations = ["".join(map(str, first.cdr)), check_variable_domain(first.sequence).cdr]
        chains.append(annotated_chain(structure.id, first.sequence, annotations))
    return chains


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
