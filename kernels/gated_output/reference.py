"""Gated output in plain PyTorch: what the kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm.reference import layer_norm


def gated_output(
    z: Tensor,
    attended: Tensor,
    norm: NormParameters,
    gate_weight: Tensor,
    out_weight: Tensor,
    dropout: Tensor | None,
    compute: torch.dtype,
) -> Tensor:
    """``z [B, I, J, C]`` with the gated and projected ``attended [B, I, J, HD]`` added; products in ``compute``."""
    gate = linear(layer_norm(z, norm, compute), gate_weight.to(compute)).sigmoid()
    update = linear(gate * attended.to(compute), out_weight.to(compute)).to(z.dtype)
    return z + (update if dropout is None else update * dropout)
