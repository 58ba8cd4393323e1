"""Forward pass in Triton: one program normalises a tile of tokens."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.launching import on_device
from pairformer_fast.kernels.layer_norm.parameters import NormParameters
from pairformer_fast.kernels.layer_norm.triton_rows import normalised_rows
from pairformer_fast.kernels.layer_norm.triton_tokens import (
    Tokens,
    as_pairs,
    layout,
    load_tokens,
    locate,
    store_tokens,
    tokens,
)

BLOCK_ENTRIES = 4096
"""Tokens of a tile times channels: 32 entries a thread."""


@triton.jit
def forward_kernel(
    x,
    y,
    weight,
    bias,
    rows,
    columns,
    C: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Layer norm of one tile of tokens."""
    x, y = Tokens(*x), Tokens(*y)
    i_b, o_i, o_j, m_t = locate(tl.program_id(0), rows, columns, BLOCK_I, BLOCK_J)
    o_c = tl.arange(0, BLOCK_C)
    b_x = load_tokens(x, i_b, o_i, o_j, m_t, o_c, C).to(tl.float32)  # [T, BLOCK_C]
    b_y = normalised_rows(b_x, weight, bias, o_c, C, EPS, bias is not None)
    store_tokens(y, b_y, i_b, o_i, o_j, m_t, o_c, C)


def layer_norm(x: Tensor, norm: NormParameters, dtype: torch.dtype) -> Tensor:
    """Launch the kernel on ``x [..., C]``; the result is contiguous, of ``dtype``."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    pairs = as_pairs(x)
    channels = x.shape[-1]
    width = max(16, triton.next_power_of_2(channels))
    plan = layout(pairs.shape[:3], [tokens(pairs), tokens(as_pairs(y))])
    block = plan.block(max(1, BLOCK_ENTRIES // width))
    with on_device(x):
        forward_kernel[(plan.tiles(block),)](
            *plan.operands,
            norm.weight,
            norm.bias,
            plan.rows,
            plan.columns,
            C=channels,
            EPS=norm.eps,
            BLOCK_C=width,
            BLOCK_I=block[0],
            BLOCK_J=block[1],
            num_warps=4,
        )
    return y
