"""Structures with closed peptide bonds, of a teacher, and as ``pairformer-fast fold`` writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pairformer_fast.model.clashes import relieve_clashes
from pairformer_fast.model.closure import close_peptides
from pairformer_fast.training.shards import Structure


def idealize_backbones(structures: Sequence[Structure], batch_size: int = 128, device: str = "cpu") -> list[Structure]:
    """Structures with closed peptide bonds; side chains move with their residue, O is placed anew.

    Parameters
    ----------
    structures : sequence of Structure
        With complete backbones.
    batch_size : int
        Structures minimised together; does not change the result.
    device : str
        Where they are minimised.
    """
    done = []
    for begin in range(0, len(structures), batch_size):
        done.extend(_minimised(close_peptides, structures[begin : begin + batch_size], device))
    return done


def as_written(structures: Sequence[Structure]) -> list[Structure]:
    """Predictions as ``fold`` writes them: closed peptide bonds and no clashes."""
    return [written for one in structures for written in _minimised(relieve_clashes, [one], "cpu")]


def _minimised(
    minimise: Callable[[Tensor, Tensor, Tensor], Tensor], structures: Sequence[Structure], device: str
) -> list[Structure]:
    start = pad_sequence([torch.from_numpy(s.atom14) for s in structures], batch_first=True)
    chain = pad_sequence([torch.from_numpy(s.chain_index).long() for s in structures], True, padding_value=-1)
    aatype = pad_sequence([torch.from_numpy(s.aatype).long() for s in structures], batch_first=True)
    moved = minimise(start.to(device), chain.to(device), aatype.to(device)).cpu()
    return [replace(s, atom14=_cut(atoms, s)) for s, atoms in zip(structures, moved.numpy(), strict=True)]


def _cut(atoms: np.ndarray, structure: Structure) -> np.ndarray:
    return atoms[: len(structure)] * structure.atom14_mask[..., None]
