"""Backward pass in Triton: each of a fixed number of programs sums its share of the gradients of the parameters."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.launching import on_device
from pairformer_fast.kernels.layer_norm.parameters import NormParameters
from pairformer_fast.kernels.layer_norm.triton_rows import unit_rows
from pairformer_fast.kernels.layer_norm.triton_tokens import (
    Tokens,
    as_pairs,
    layout,
    load_tokens,
    locate,
    store_tokens,
    tokens,
)

BLOCK_ENTRIES = 2048
"""Tokens of a tile times channels: 16 entries a thread of each operand and of both sums."""

PROGRAMS = 528
"""Most programs, and so most terms of the sum over their shares: four for each multiprocessor of an H100, at once."""


@triton.jit
def backward_kernel(
    x,
    dy,
    residual,
    dx,
    weight,
    shares,
    rows,
    columns,
    tiles,
    C: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Gradients of every ``num_programs``-th tile of tokens, and this program's share of those of the parameters."""
    x, dy, residual, dx = Tokens(*x), Tokens(*dy), Tokens(*residual), Tokens(*dx)
    o_c = tl.arange(0, BLOCK_C)
    b_weight = tl.load(weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
    b_dweight = tl.zeros([BLOCK_I * BLOCK_J, BLOCK_C], tl.float32)
    b_dbias = tl.zeros([BLOCK_I * BLOCK_J, BLOCK_C], tl.float32)
    for i_tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i_b, o_i, o_j, m_t = locate(i_tile, rows, columns, BLOCK_I, BLOCK_J)
        b_x = load_tokens(x, i_b, o_i, o_j, m_t, o_c, C).to(tl.float32)  # [T, BLOCK_C]
        b_dy = load_tokens(dy, i_b, o_i, o_j, m_t, o_c, C).to(tl.float32)
        b_unit, b_inverse = unit_rows(b_x, o_c, C, EPS)
        b_dweight += b_dy * b_unit
        b_dbias += b_dy
        b_scaled = b_dy * b_weight
        b_mean = tl.sum(b_scaled, 1) / C
        b_slope = tl.sum(b_scaled * b_unit, 1) / C
        b_dx = (b_scaled - b_mean[:, None] - b_unit * b_slope[:, None]) * b_inverse[:, None]
        if residual.pointer is not None:
            b_dx += load_tokens(residual, i_b, o_i, o_j, m_t, o_c, C).to(tl.float32)
        store_tokens(dx, b_dx, i_b, o_i, o_j, m_t, o_c, C)
    p_share = shares + tl.program_id(0) * C + o_c
    tl.store(p_share, tl.sum(b_dweight, 0), mask=o_c < C)
    tl.store(p_share + tl.num_programs(0) * C, tl.sum(b_dbias, 0), mask=o_c < C)


def layer_norm_backward(
    x: Tensor, norm: NormParameters, dy: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel; ``dx`` is laid out as ``x``, the gradients of the parameters are fp32.

    Beside the results it takes 8 C bytes for each of at most ``PROGRAMS`` programs.
    """
    pairs = as_pairs(x)
    dx = torch.empty_like(pairs)
    others = [None if t is None else as_pairs(t if t.stride(-1) == 1 else t.contiguous()) for t in (dy, residual)]
    channels = x.shape[-1]
    width = max(16, triton.next_power_of_2(channels))
    plan = layout(pairs.shape[:3], [tokens(t) for t in (pairs, *others, dx)])
    block = plan.block(max(1, BLOCK_ENTRIES // width))
    tiles = plan.tiles(block)
    programs = min(tiles, PROGRAMS)
    shares = torch.empty(2, programs, channels, dtype=torch.float32, device=x.device)
    with on_device(x):
        backward_kernel[(programs,)](
            *plan.operands,
            norm.weight,
            shares,
            plan.rows,
            plan.columns,
            tiles,
            C=channels,
            EPS=norm.eps,
            BLOCK_C=width,
            BLOCK_I=block[0],
            BLOCK_J=block[1],
            num_warps=4,
        )
    return dx.view(x.shape), shares[0].sum(0), shares[1].sum(0)
