"""The transition in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm.reference import layer_norm


def relu_transition(
    x: Tensor,
    norm: NormParameters,
    weight_1: Tensor,
    offset_1: Tensor,
    weight_2: Tensor,
    offset_2: Tensor,
    mask: Tensor | None,
    compute: torch.dtype,
) -> Tensor:
    """Update of ``x [..., C]``, with products in ``compute``; differentiable."""
    with torch.autocast(x.device.type, enabled=False):
        hidden = linear(layer_norm(x, norm, compute), weight_1.to(compute), offset_1.to(compute)).relu()
        update = linear(hidden, weight_2.to(compute), offset_2.to(compute)).to(x.dtype)
        return update if mask is None else update.masked_fill(~mask[..., None], 0)
