"""Layer norm and linear layers in plain PyTorch, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from pairformer_fast.kernels.layer_norm import NormParameters, reference


def layer_norm_linear(
    z: Tensor,
    norm: NormParameters,
    weight: Tensor | None,
    planar_weight: Tensor | None,
    transposed: bool,
    compute: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Arguments and results as in the api; products in ``compute``, layer norm in fp32 or fp64."""
    y = reference.layer_norm(z, norm, compute)
    tokens = planar = None
    if weight is not None:
        tokens = linear(y, weight.to(compute))
        if transposed:
            tokens = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    if planar_weight is not None:
        planar = linear(y, planar_weight.to(compute)).permute(0, 3, 1, 2).contiguous()
    return tokens, planar
