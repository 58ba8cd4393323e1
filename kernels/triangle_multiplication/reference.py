"""Triangle multiplication in plain PyTorch, differentiable, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from pairformer_fast.kernels.layer_norm.reference import layer_norm
from pairformer_fast.kernels.triangle_multiplication.parameters import TriangleWeights


def triangle_multiplication(
    z: Tensor, mask: Tensor, weights: TriangleWeights, dropout: Tensor | None, incoming: bool, compute: torch.dtype
) -> Tensor:
    """``z [B, N, N, C]`` with its update; products are in ``compute``, layer norms in fp32 or wider."""
    x = layer_norm(z, weights.norm_in, compute)

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight.to(compute))

    keep = mask[..., None]
    a = linear(x, weights.a_gate).sigmoid() * linear(x, weights.a) * keep
    b = linear(x, weights.b_gate).sigmoid() * linear(x, weights.b) * keep
    product = torch.einsum("bkic,bkjc->bijc" if incoming else "bikc,bjkc->bijc", a, b)
    update = linear(x, weights.gate).sigmoid() * linear(layer_norm(product, weights.norm_out, compute), weights.out)
    if dropout is not None:
        update = update * dropout
    return (z + update).to(z.dtype)
