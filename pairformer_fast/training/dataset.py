"""Training structures as padded batches, drawn from a mixture of sources.

Batch ``step`` of a sampler is a pure function of its arguments and ``step``: the same on every run, and resumed by
starting at another step. All ranks draw the same kind of batch (single domains or Fv), so that none waits for another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from pairformer_fast.features import TokenFeatures
from pairformer_fast.model.residue import UNKNOWN
from pairformer_fast.training.shards import Shard, Structure, shard_path


@dataclass(frozen=True)
class Draw:
    """A structure of a dataset, reduced to some of its chains in a given order."""

    index: int
    chains: tuple[int, ...]


@dataclass(frozen=True)
class Augmentation:
    """Probabilities with which a two-chain structure is drawn in another form; the rest of the time it is whole.

    Attributes
    ----------
    first_only, second_only : float
        Only the first chain (H) or only the second (L).
    swapped : float
        Both chains, second first.
    """

    first_only: float = 0.0
    second_only: float = 0.0
    swapped: float = 0.0

    def __post_init__(self) -> None:
        values = [getattr(self, f.name) for f in fields(self)]
        if min(values) < 0 or sum(values) > 1:
            raise ValueError(f"augmentation probabilities must be at least 0 and sum to at most 1, got {values}")

    def forms(self) -> dict[tuple[int, ...], float]:
        """Chains and probability of each form."""
        whole = 1 - self.first_only - self.second_only - self.swapped
        return {(0,): self.first_only, (1,): self.second_only, (1, 0): self.swapped, (0, 1): whole}


@dataclass(frozen=True)
class Batch:
    """Padded structures: what the model reads and what it should predict.

    Attributes
    ----------
    features : TokenFeatures
    atom14 : Tensor
        ``[B, N, 14, 3]`` float32, Å.
    atom14_mask : Tensor
        ``[B, N, 14]`` bool, True where the target is known.
    cdr : Tensor
        ``[B, N]`` int64, 0 framework, 1 to 3 the CDR.
    weight : Tensor
        ``[B]`` float32, weight of each structure in the loss.
    """

    features: TokenFeatures
    atom14: Tensor
    atom14_mask: Tensor
    cdr: Tensor
    weight: Tensor

    def to(self, device: torch.device | str) -> Self:
        """Copy of the batch on ``device``."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class AntibodyDataset(Dataset):
    """Structures of one split, kept compressed in memory and decoded on access.

    Parameters
    ----------
    path : Path
        Folder written by ``scripts/prepare_antibody_data.py``.
    split : str
        ``train``, ``val`` or ``crystal``; files ``SPLIT-*.safetensors`` beside that of the split belong to it, too.

    Raises
    ------
    FileNotFoundError
        If the split is not there.
    """

    def __init__(self, path: str | Path, split: str) -> None:
        first = shard_path(Path(path), split)
        more = sorted(first.parent.glob(f"{split}-*{first.suffix}"))
        self._shards = [Shard(file) for file in (first, *more)]
        self._starts = np.cumsum([0, *map(len, self._shards)])
        self.ids = [name for shard in self._shards for name in shard.ids]
        self.sources = [source for shard in self._shards for source in shard.sources]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: int | Draw) -> dict[str, Tensor]:
        """Tensors of one structure.

        Returns
        -------
        dict of Tensor
            ``aatype``, ``residue_index``, ``chain_index``, ``cdr`` ``[N]`` int64; ``atom14`` ``[N, 14, 3]`` float32, Å;
            ``atom14_mask`` ``[N, 14]`` bool, ``weight`` scalar float32.
        """
        structure = self.structure(key.index if isinstance(key, Draw) else key)
        if isinstance(key, Draw):
            rows = [np.flatnonzero(structure.chain_index == chain) for chain in key.chains]
            structure = structure.select(np.concatenate(rows))
        return {
            "aatype": torch.from_numpy(structure.aatype).long(),
            "residue_index": torch.from_numpy(structure.residue_index).long(),
            "chain_index": torch.from_numpy(structure.chain_index).long(),
            "cdr": torch.from_numpy(structure.cdr).long(),
            "atom14": torch.from_numpy(structure.atom14),
            "atom14_mask": torch.from_numpy(structure.atom14_mask),
            "weight": torch.tensor(structure.weight),
        }

    def structure(self, index: int) -> Structure:
        """A structure as the shard holds it."""
        shard, place = self._place(index)
        return shard[place]

    def chain_count(self, index: int) -> int:
        """Number of chains of a structure."""
        shard, place = self._place(index)
        return shard.chain_counts[place]

    def _place(self, index: int) -> tuple[Shard, int]:
        """Shard of a structure and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(f"structure {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shards[number], index - int(self._starts[number])


def collate(items: Sequence[Mapping[str, Tensor]], lengths: Sequence[int] = ()) -> Batch:
    """Stack structures, padded to the least of ``lengths`` that holds them all, or else to the longest of them."""
    longest = max(len(item["aatype"]) for item in items)
    length = min((n for n in lengths if n >= longest), default=longest)

    def padded(name: str, value: int = 0) -> Tensor:
        first = items[0][name]
        out = torch.full((len(items), length, *first.shape[1:]), value, dtype=first.dtype)
        for row, item in zip(out, items, strict=True):
            row[: len(item[name])] = item[name]
        return out

    tokens = torch.tensor([len(item["aatype"]) for item in items])
    return Batch(
        features=TokenFeatures(
            aatype=padded("aatype", UNKNOWN),
            residue_index=padded("residue_index"),
            chain_index=padded("chain_index"),
            mask=torch.arange(length) < tokens[:, None],
        ),
        atom14=padded("atom14"),
        atom14_mask=padded("atom14_mask"),
        cdr=padded("cdr"),
        weight=torch.stack([item["weight"] for item in items]),
    )


class MixtureSampler(Sampler[list[Draw]]):
    """Endless batches from a mixture of sources; a ``batch_sampler`` for a DataLoader.

    Parameters
    ----------
    dataset : AntibodyDataset
    source_weights : mapping of str to float
        Share of structures drawn from each source; sources left out are not drawn.
    batch_size : int
        Chains per batch and rank, so that batches of Fv, which are twice as long, hold half as many structures (at
        least one).
    seed : int
    augmentation : Augmentation
        Forms in which two-chain structures are drawn.
    rank, world_size : int
        Ranks draw different structures.
    start : int
        Step of the first batch (to resume, the number of batches already used).

    Raises
    ------
    ValueError
        If a source is unknown, a weight is negative or all are zero, or a number is out of range.
    """

    def __init__(
        self,
        dataset: AntibodyDataset,
        source_weights: Mapping[str, float],
        batch_size: int,
        seed: int = 0,
        augmentation: Augmentation = Augmentation(),
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        unknown = set(source_weights) - set(dataset.sources)
        if unknown:
            raise ValueError(
                f"unknown sources {sorted(unknown)}; the data has {sorted(set(dataset.sources))}: change the mixture, "
                "or add them with scripts/prepare_antibody_data.py"
            )
        if min(source_weights.values(), default=0) < 0 or sum(source_weights.values()) <= 0:
            raise ValueError(f"source weights must be at least 0 and not all 0, got {dict(source_weights)}")
        if batch_size < 1 or start < 0 or not 0 <= rank < world_size:
            raise ValueError(f"out of range: batch_size {batch_size}, start {start}, rank {rank} of {world_size}")
        self.seed, self.rank, self.world_size, self.start = seed, rank, world_size, start
        self._buckets = _buckets(dataset, source_weights, augmentation)
        self._sizes = [max(1, batch_size // len(bucket[0].chains)) for bucket in self._buckets]
        # A batch of longer structures holds fewer, so it comes up more often.
        shares = np.array([sum(pool.probability for pool in bucket) for bucket in self._buckets])
        frequencies = shares / self._sizes
        self._bucket_probabilities = frequencies / frequencies.sum()

    def batch(self, step: int) -> list[Draw]:
        """This rank's batch of a step."""
        rng = np.random.default_rng([self.seed, step])
        bucket = rng.choice(len(self._buckets), p=self._bucket_probabilities)
        pools, size = self._buckets[bucket], self._sizes[bucket]
        probabilities = np.array([pool.probability for pool in pools])
        count = size * self.world_size
        chosen = rng.choice(len(pools), size=count, p=probabilities / probabilities.sum())
        places = rng.random(count)
        mine = range(self.rank * size, (self.rank + 1) * size)
        return [pools[chosen[i]].draw(places[i]) for i in mine]

    def __iter__(self) -> Iterator[list[Draw]]:
        step = self.start
        while True:
            yield self.batch(step)
            step += 1


@dataclass(frozen=True)
class _Pool:
    """Structures of one source in one form, and how often to draw from them."""

    indices: np.ndarray
    chains: tuple[int, ...]
    probability: float

    def draw(self, place: float) -> Draw:
        return Draw(int(self.indices[int(place * len(self.indices))]), self.chains)


def _buckets(
    dataset: AntibodyDataset, source_weights: Mapping[str, float], augmentation: Augmentation
) -> list[list[_Pool]]:
    """Pools grouped by the number of chains drawn, so that a batch holds structures of similar length."""
    by_kind: dict[tuple[str, int], list[int]] = {}
    for index, source in enumerate(dataset.sources):
        by_kind.setdefault((source, dataset.chain_count(index)), []).append(index)
    buckets: dict[int, list[_Pool]] = {}
    for (source, chain_count), indices in sorted(by_kind.items()):
        share = source_weights.get(source, 0) * len(indices) / dataset.sources.count(source)
        forms = augmentation.forms() if chain_count == 2 else {tuple(range(chain_count)): 1.0}
        for chains, probability in forms.items():
            if share * probability > 0:
                buckets.setdefault(len(chains), []).append(_Pool(np.array(indices), chains, share * probability))
    return [buckets[count] for count in sorted(buckets)]
