"""Sequence, relative position and recycled predictions to the first single and pair representation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pairformer_fast.config import ModelConfig
from pairformer_fast.features import TokenFeatures
from pairformer_fast.model.primitives import Lookup, linear
from pairformer_fast.model.residue import UNKNOWN
from pairformer_fast.model.rigid import distances

RECYCLE_NEAREST = 3.25
RECYCLE_FARTHEST = 20.75
"""Range of the CA-CA distances (Å) that recycling bins (AF2 Algorithm 32)."""


class InputEmbedder(nn.Module):
    """Residue types and relative positions (AF3 Algorithms 1 and 3, tokens are residues, no MSA).

    Parameters
    ----------
    config : ModelConfig
        Dimensions and the largest relative index and chain that are told apart.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c_s, c_z = config.pairformer.c_s, config.pairformer.c_z
        self.residue_dropout = config.residue_dropout
        self.max_idx, self.max_chain = config.max_relative_idx, config.max_relative_chain
        self.restype_s = Lookup(UNKNOWN + 1, c_s)
        self.restype_i = Lookup(UNKNOWN + 1, c_z)
        self.restype_j = Lookup(UNKNOWN + 1, c_z)
        self.relative_position = Lookup(2 * self.max_idx + 2, c_z)
        self.relative_chain = Lookup(2 * self.max_chain + 1, c_z)

    def forward(self, features: TokenFeatures) -> tuple[Tensor, Tensor]:
        """Initial ``s [B, N, C_s]`` and ``z [B, N, N, C_z]``."""
        aatype, index, chain = self._shown(features.aatype), features.residue_index, features.chain_index
        other_chain = chain[:, :, None] != chain[:, None, :]
        offset = (index[:, :, None] - index[:, None, :]).clamp(-self.max_idx, self.max_idx) + self.max_idx
        offset = offset.masked_fill(other_chain, 2 * self.max_idx + 1)
        chain_offset = (chain[:, :, None] - chain[:, None, :]).clamp(-self.max_chain, self.max_chain)
        z = self.restype_i(aatype)[:, :, None] + self.restype_j(aatype)[:, None, :]
        z = z + self.relative_position(offset) + self.relative_chain(chain_offset + self.max_chain)
        return self.restype_s(aatype), z

    def _shown(self, aatype: Tensor) -> Tensor:
        """Residue types, in training without some."""
        if not self.training or self.residue_dropout == 0:
            return aatype
        return aatype.masked_fill(torch.rand(aatype.shape, device=aatype.device) < self.residue_dropout, UNKNOWN)


class RecyclingEmbedder(nn.Module):
    """What the previous pass found, added to the first representations (AF2 Algorithm 32).

    Parameters
    ----------
    config : ModelConfig
        Dimensions and the number of distance bins.
    """

    boundaries: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c_s, c_z = config.pairformer.c_s, config.pairformer.c_z
        self.layer_norm_s = nn.LayerNorm(c_s)
        self.layer_norm_z = nn.LayerNorm(c_z)
        self.linear_s = linear(c_s, c_s, init="final")
        self.linear_z = linear(c_z, c_z, init="final")
        self.distance = Lookup(config.recycle_bins, c_z)
        boundaries = torch.linspace(RECYCLE_NEAREST, RECYCLE_FARTHEST, config.recycle_bins - 1)
        self.register_buffer("boundaries", boundaries, persistent=False)

    def forward(self, s: Tensor, z: Tensor, ca: Tensor) -> tuple[Tensor, Tensor]:
        """Updates of s and z from the previous ``s``, ``z`` and CA coordinates ``ca [B, N, 3]`` (Å)."""
        bins = torch.bucketize(distances(ca), self.boundaries)
        z = self.linear_z(self.layer_norm_z(z)) + self.distance(bins)
        return self.linear_s(self.layer_norm_s(s)), z
