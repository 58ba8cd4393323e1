"""Distogram and confidence heads (AF2 supplement 1.9)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pairformer_fast.config import ModelConfig
from pairformer_fast.model.primitives import linear

PAE_LARGEST = 32.0
"""Upper edge of the last PAE bin, Å."""


class DistogramHead(nn.Module):
    """Logits over binned CB distances."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = linear(config.pairformer.c_z, config.distogram_bins, bias=True, init="final")

    def forward(self, z: Tensor) -> Tensor:
        """Symmetric logits ``[B, N, N, bins]`` from ``z [B, N, N, C_z]``."""
        logits = self.linear(z)
        return logits + logits.transpose(1, 2)


class PlddtHead(nn.Module):
    """Predicted lDDT-CA of each residue (AF2 Algorithm 29)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c_s, hidden = config.pairformer.c_s, config.structure.c_angle
        self.layers = nn.Sequential(
            nn.LayerNorm(c_s),
            linear(c_s, hidden, bias=True, init="relu"),
            nn.ReLU(),
            linear(hidden, hidden, bias=True, init="relu"),
            nn.ReLU(),
            linear(hidden, config.plddt_bins, bias=True, init="final"),
        )

    def forward(self, s: Tensor) -> Tensor:
        """Logits ``[B, N, bins]`` over lDDT from 0 to 1, from ``s [B, N, C_s]`` of the structure module."""
        return self.layers(s)


class PaeHead(nn.Module):
    """Predicted error of residue j in the frame of residue i."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = linear(config.pairformer.c_z, config.pae_bins, bias=True, init="final")

    def forward(self, z: Tensor) -> Tensor:
        """Logits ``[B, N, N, bins]`` over errors from 0 to 32 Å, from ``z [B, N, N, C_z]``."""
        return self.linear(z)


def expected_value(logits: Tensor, largest: float) -> Tensor:
    """Mean of a distribution over equal bins from 0 to ``largest``, ``[..., bins]`` to ``[...]``."""
    return (logits.float().softmax(-1) * bin_centres(logits, largest)).sum(-1)


def bin_centres(logits: Tensor, largest: float) -> Tensor:
    """Centres ``[bins]`` of the equal bins from 0 to ``largest`` that ``logits [..., bins]`` are over."""
    bins = logits.shape[-1]
    return (torch.arange(bins, device=logits.device) + 0.5) * (largest / bins)
