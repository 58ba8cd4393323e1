"""Triangle multiplication in plain PyTorch, some rows at a time, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pairformer_fast.kernels.layer_norm.reference import layer_norm
from pairformer_fast.kernels.triangle_multiplication.parameters import TriangleWeights

SLAB_TOKENS = 8192
"""Pairs of tokens of a slab, whose temporaries then stay in the cache of a CPU."""

LEAST_ROWS = 32
"""Rows of the smallest slab: each reads all of b again."""


@torch.no_grad()
def triangle_multiplication(
    z: Tensor,
    mask: Tensor,
    weights: TriangleWeights,
    dropout: Tensor | None,
    out: Tensor,
    incoming: bool,
    residual: bool,
    slab_rows: int | None,
    compute: torch.dtype,
) -> None:
    """Write the update into ``out``, which may be ``z``: edges are made before the first row is written."""
    batch, tokens = z.shape[:2]
    step = min(slab_rows or tokens, max(LEAST_ROWS, SLAB_TOKENS // tokens))
    slabs = [slice(start, start + step) for start in range(0, tokens, step)]
    weight = {name: getattr(weights, name).to(compute) for name in ("a", "a_gate", "b", "b_gate", "gate", "out")}
    offset = {name: x.to(compute) for name, x in weights.split_offsets().items()}
    scale = None if dropout is None else dropout.expand(z.shape)

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.linear(x, weight[name], offset.get(name))

    edges = {name: z.new_empty(batch, len(weights.a), tokens, tokens, dtype=compute) for name in ("a", "b")}
    for rows in slabs:
        x, keep = layer_norm(z[:, rows], weights.norm_in, compute), mask[:, rows, :, None]
        for name, planes in edges.items():
            edge = linear(x, f"{name}_gate").sigmoid_().mul_(linear(x, name)).masked_fill_(~keep, 0)
            planes[:, :, rows] = edge.permute(0, 3, 1, 2)
    a, b = (planes.flatten(0, 1) for planes in edges.values())
    a, b = (a.mT, b) if incoming else (a, b.mT)
    for rows in slabs:
        product = torch.bmm(a[:, rows], b).unflatten(0, (batch, -1)).permute(0, 2, 3, 1)
        update = linear(layer_norm(product, weights.norm_out, compute), "out")
        update *= linear(layer_norm(z[:, rows], weights.norm_in, compute), "gate").sigmoid_()
        if scale is not None:
            update = update * scale[:, rows]
        out[:, rows] = z[:, rows] + update if residual else update
