"""Structures with closed peptide bonds, of a teacher, and as ``pairformer-fast fold`` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
        batch = structures[begin : begin + batch_size]
        atom14, _, *tokens = (tensor.to(device) for tensor in _padded(batch))
        done.extend(_with_atoms(batch, close_peptides(atom14, *tokens)))
    return done


def as_written(structures: Sequence[Structure]) -> list[Structure]:
    """Predictions as ``fold`` writes them: closed peptide and disulfide bonds, clashes relieved."""
    return [_with_atoms([one], relieve_clashes(*_padded([one])))[0] for one in structures]


def _padded(structures: Sequence[Structure]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Atoms and their mask, chains and types."""
    atom14 = pad_sequence([torch.from_numpy(s.atom14) for s in structures], batch_first=True)
    mask = pad_sequence([torch.from_numpy(s.atom14_mask) for s in structures], batch_first=True)
    chain = pad_sequence([torch.from_numpy(s.chain_index).long() for s in structures], True, padding_value=-1)
    return atom14, mask, chain, pad_sequence([torch.from_numpy(s.aatype).long() for s in structures], batch_first=True)


def _with_atoms(structures: Sequence[Structure], atom14: Tensor) -> list[Structure]:
    moved = atom14.cpu().numpy()
    return [
        replace(s, atom14=atoms[: len(s)] * s.atom14_mask[..., None])
        for s, atoms in zip(structures, moved, strict=True)
    ]
