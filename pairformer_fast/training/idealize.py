"""Teacher structures with closed peptide bonds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

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
        done.extend(_idealize(structures[begin : begin + batch_size], device))
    return done


def _idealize(structures: Sequence[Structure], device: str) -> list[Structure]:
    start = pad_sequence([torch.from_numpy(s.atom14) for s in structures], batch_first=True)
    chain = pad_sequence([torch.from_numpy(s.chain_index).long() for s in structures], True, padding_value=-1)
    aatype = pad_sequence([torch.from_numpy(s.aatype).long() for s in structures], batch_first=True)
    moved = close_peptides(start.to(device), chain.to(device), aatype.to(device)).cpu()
    return [replace(s, atom14=_cut(atoms, s)) for s, atoms in zip(structures, moved.numpy(), strict=True)]


def _cut(atoms: np.ndarray, structure: Structure) -> np.ndarray:
    return atoms[: len(structure)] * structure.atom14_mask[..., None]
