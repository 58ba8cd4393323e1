"""Compact training files: all structures of one split in one safetensors file.

Residues and atoms of all structures lie one after another. Coordinates are int16 in units of 0.01 Å relative to each
structure's centroid, and only for atoms that exist; bit ``a`` of ``atom_bits`` says whether a residue has atom14 atom
``a``. The same structures give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pairformer_fast.model.residue import RESTYPES

UNIT = 0.01
"""Å per coordinate step."""

FORMAT = "pairformer_fast structures 1"


@dataclass(frozen=True)
class Structure:
    """One chain or complex with coordinates.

    Attributes
    ----------
    id, source : str
        Name, and where it comes from (the sampler mixes by source).
    aatype, chain_index, residue_index, cdr : numpy.ndarray
        ``[N]`` int; ``residue_index`` counts from 0 in each chain, ``cdr`` is 0 to 3, in an Fv chain 0 is H and 1 is L.
    atom14 : numpy.ndarray
        ``[N, 14, 3]`` float32, Å.
    atom14_mask : numpy.ndarray
        ``[N, 14]`` bool, True where ``atom14`` is known.
    weight : float
        Weight in the loss, 0 to 1.
    """

    id: str
    source: str
    aatype: np.ndarray
    chain_index: np.ndarray
    residue_index: np.ndarray
    cdr: np.ndarray
    atom14: np.ndarray
    atom14_mask: np.ndarray
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.aatype)

    @property
    def sequence(self) -> str:
        """One-letter codes of all chains, one after another."""
        return "".join(RESTYPES[aa] for aa in self.aatype)

    def select(self, rows: np.ndarray) -> Structure:
        """The given residues in the given order; chains are numbered anew, by first appearance."""
        chain = self.chain_index[rows]
        _, first, inverse = np.unique(chain, return_index=True, return_inverse=True)
        return Structure(
            id=self.id,
            source=self.source,
            aatype=self.aatype[rows],
            chain_index=np.argsort(np.argsort(first))[inverse].astype(chain.dtype),
            residue_index=self.residue_index[rows],
            cdr=self.cdr[rows],
            atom14=self.atom14[rows],
            atom14_mask=self.atom14_mask[rows],
            weight=self.weight,
        )


def shard_path(folder: Path, split: str) -> Path:
    """File of a split in a folder of shards."""
    return folder / f"{split}.safetensors"


def write_shard(path: Path, structures: Sequence[Structure]) -> None:
    """Write structures to one file; it appears only when complete.

    Raises
    ------
    ValueError
        If there is nothing to write, or a structure has no atoms or reaches beyond what int16 holds (327 Å).
    """
    if not structures:
        raise ValueError(f"no structures to write to {path}")
    coords = []
    for structure in structures:
        atoms = structure.atom14[structure.atom14_mask].astype(np.float64)
        if not len(atoms) or not np.isfinite(atoms).all():
            raise ValueError(f"{structure.id}: no atoms, or coordinates that are not finite")
        steps = np.rint((atoms - atoms.mean(axis=0)) / UNIT)
        if np.abs(steps).max() > np.iinfo(np.int16).max:
            raise ValueError(f"{structure.id}: atoms lie {np.abs(steps).max() * UNIT:.0f} Å from the centroid")
        coords.append(steps.astype(np.int16))
    sources = sorted({structure.source for structure in structures})
    tensors = {
        "aatype": _joined([s.aatype for s in structures], np.int8),
        "chain_index": _joined([s.chain_index for s in structures], np.int8),
        "residue_index": _joined([s.residue_index for s in structures], np.int16),
        "cdr": _joined([s.cdr for s in structures], np.int8),
        "atom_bits": _joined([s.atom14_mask @ (1 << np.arange(14)) for s in structures], np.int16),
        "coords": np.concatenate(coords),
        "residue_offsets": np.cumsum([0, *map(len, structures)], dtype=np.int64),
        "atom_offsets": np.cumsum([0, *map(len, coords)], dtype=np.int64),
        "weight": np.array([s.weight for s in structures], dtype=np.float32),
        "source": np.array([sources.index(s.source) for s in structures], dtype=np.int8),
    }
    # one metadata key: safetensors does not keep the order of several
    metadata = {"shard": json.dumps({"format": FORMAT, "sources": sources, "ids": [s.id for s in structures]})}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(save(tensors, metadata=metadata))
    partial.replace(path)


class Shard:
    """Read access to a file of :func:`write_shard`, by position; decoded on access.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is not such a shard.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; make it with scripts/prepare_antibody_data.py")
        try:
            with safe_open(path, framework="numpy") as file:
                info = json.loads((file.metadata() or {}).get("shard", "{}"))
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from None
        if info.get("format") != FORMAT:
            raise ValueError(
                f"{path} is no file of structures (expected format {FORMAT!r}, got {info.get('format')!r})"
            )
        self.ids: list[str] = info["ids"]
        self.sources: list[str] = [info["sources"][i] for i in self._tensors["source"]]
        starts = self._tensors["residue_offsets"][:-1]
        self.chain_counts: list[int] = (np.maximum.reduceat(self._tensors["chain_index"], starts) + 1).tolist()

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Structure]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Structure:
        if not 0 <= index < len(self):
            raise IndexError(f"structure {index} of {len(self)}")
        t = self._tensors
        residues = slice(*t["residue_offsets"][index : index + 2])
        atoms = slice(*t["atom_offsets"][index : index + 2])
        mask = (t["atom_bits"][residues, None] >> np.arange(14)) & 1 == 1
        atom14 = np.zeros((*mask.shape, 3), dtype=np.float32)
        atom14[mask] = t["coords"][atoms] * np.float32(UNIT)
        return Structure(
            id=self.ids[index],
            source=self.sources[index],
            aatype=t["aatype"][residues],
            chain_index=t["chain_index"][residues],
            residue_index=t["residue_index"][residues],
            cdr=t["cdr"][residues],
            atom14=atom14,
            atom14_mask=mask,
            weight=float(t["weight"][index]),
        )


def _joined(arrays: Sequence[np.ndarray], dtype: type[np.signedinteger]) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype)
