"""What goes into a folding model and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from pairformer_fast.model.residue import RESTYPES, UNKNOWN


@dataclass(frozen=True)
class TokenFeatures:
    """One token per residue, chains one after another, batches padded at the end.

    Attributes
    ----------
    aatype : Tensor
        ``[B, N]`` int64, index into :data:`~pairformer_fast.model.residue.RESTYPES`, 20 for unknown or padding.
    residue_index : Tensor
        ``[B, N]`` int64, position within the chain, from 0.
    chain_index : Tensor
        ``[B, N]`` int64, from 0.
    mask : Tensor
        ``[B, N]`` bool, True for a real residue.
    """

    aatype: Tensor
    residue_index: Tensor
    chain_index: Tensor
    mask: Tensor

    @classmethod
    def from_chains(cls, chains: list[str]) -> Self:
        """Features of one complex (batch of 1) from one-letter sequences."""
        aatype = [RESTYPES.find(aa) % (UNKNOWN + 1) for chain in chains for aa in chain]
        return cls(
            aatype=torch.tensor([aatype]),
            residue_index=torch.cat([torch.arange(len(chain)) for chain in chains])[None],
            chain_index=torch.cat([torch.full((len(chain),), i) for i, chain in enumerate(chains)])[None],
            mask=torch.ones(1, len(aatype), dtype=torch.bool),
        )

    def to(self, device: torch.device | str) -> Self:
        """Copy of the features on ``device``."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True)
class Prediction:
    """A predicted structure with its confidence.

    Attributes
    ----------
    atom14 : Tensor
        ``[B, N, 14, 3]`` fp32, Å, atoms in the order of :data:`~pairformer_fast.model.residue.ATOM14`.
    atom14_mask : Tensor
        ``[B, N, 14]`` bool, True where the residue has that atom.
    plddt : Tensor
        ``[B, N]`` fp32, 0 to 100.
    pae : Tensor
        ``[B, N, N]`` fp32, Å: expected error of residue j in the frame of residue i.
    """

    atom14: Tensor
    atom14_mask: Tensor
    plddt: Tensor
    pae: Tensor
