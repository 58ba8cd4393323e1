"""The transition in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm import reference as layer_norm


def transition(
    x: Tensor,
    norm: NormParameters,
    a_weight: Tensor,
    b_weight: Tensor,
    out_weight: Tensor,
    mask: Tensor | None,
    residual: bool,
    compute: torch.dtype,
) -> Tensor:
    """Update of ``x [..., C]``, added to it with ``residual``, with products in ``compute``; differentiable."""
    with torch.autocast(x.device.type, enabled=False):
        normalised = layer_norm.layer_norm(x, norm, compute)
        gate = torch.nn.functional.silu(normalised @ a_weight.to(compute).T)
        update = (gate * (normalised @ b_weight.to(compute).T)) @ out_weight.to(compute).T
        if mask is not None:
            update = update.masked_fill(~mask[..., None], 0)
        update = update.to(x.dtype)
        return x + update if residual else update
