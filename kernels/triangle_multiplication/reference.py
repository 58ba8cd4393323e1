"""Triangle multiplication in plain PyTorch, differentiable, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from pairformer_fast.kernels.layer_norm.reference import layer_norm
from pairformer_fast.kernels.triangle_multiplication.parameters import TriangleWeights


def triangle_multiplication(
    z: Tensor,
    mask: Tensor,
    weights: TriangleWeights,
    dropout: Tensor | None,
    incoming: bool,
    residual: bool,
    compute: torch.dtype,
) -> Tensor:
    """``z [B, N, N, C]`` with its update, or that alone; products are in ``compute``, layer norms in fp32 or wider."""
    x = layer_norm(z, weights.norm_in, compute)
    offsets = weights.split_offsets()

    def linear(x: Tensor, name: str) -> Tensor:
        offset = offsets.get(name)
        weight = getattr(weights, name).to(compute)
        return torch.nn.functional.linear(x, weight, None if offset is None else offset.to(compute))

    keep = mask[..., None]
    a = linear(x, "a_gate").sigmoid() * linear(x, "a") * keep
    b = linear(x, "b_gate").sigmoid() * linear(x, "b") * keep
    product = torch.einsum("bkic,bkjc->bijc" if incoming else "bikc,bjkc->bijc", a, b)
    update = linear(x, "gate").sigmoid() * linear(layer_norm(product, weights.norm_out, compute), "out")
    if dropout is not None:
        update = update * dropout
    return (z + update if residual else update).to(z.dtype)
