"""Forward pass in Triton: a program holds a tile of tokens on chip and goes through the hidden layer by blocks."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.launching import on_device, padded, precision
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm.triton_rows import normalised_rows
from pairformer_fast.kernels.transition.triton_common import (
    Tiles,
    Tokens,
    descriptor,
    keep_masked,
    load_rows,
    programs,
    store_rows,
    tokens,
    with_rows,
)
from pairformer_fast.kernels.transition.triton_forward import choose_tiles


@triton.jit
def load_offset(offset, o, COUNT):
    """Entries ``o`` of an offset in fp32, zero beyond its end."""
    return tl.load(offset + o, mask=o < COUNT, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["TOKENS", "ROWS", "COLUMNS", "HIDDEN"])
def forward_kernel(
    x,
    mask,
    out,
    norm_weight,
    norm_bias,
    desc_1,
    offset_1,
    desc_2,
    offset_2,
    TOKENS,
    ROWS,
    COLUMNS,
    HIDDEN,
    C: tl.constexpr,
    EPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Update of tiles of ``BLOCK_T`` tokens, every ``programs``-th one."""
    x, mask, out = Tokens(*x), Tokens(*mask), Tokens(*out)
    o_c = tl.arange(0, BLOCK_C)
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    stride = tl.num_programs(0) * BLOCK_T
    b_x = load_rows(x, o_t, o_c, TOKENS, ROWS, COLUMNS, C)
    # Carried from tile to tile: only so does Triton keep the left side of the products in shared memory.
    b_y = normalised_rows(b_x, norm_weight, norm_bias, o_c, C, EPS, HAS_BIAS).to(desc_1.dtype)  # [T, BLOCK_C]
    for _ in range(tl.program_id(0) * BLOCK_T, TOKENS, stride):
        b_update = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for start in range(0, HIDDEN, BLOCK_H):
            b_p = tl.dot(b_y, desc_1.load([start, 0]).T, input_precision=PRECISION)  # [T, BLOCK_H]
            b_p += load_offset(offset_1, start + tl.arange(0, BLOCK_H), HIDDEN)[None, :]
            b_h = tl.where(b_p < 0, 0.0, b_p).to(b_y.dtype)
            b_update = tl.dot(b_h, desc_2.load([0, start]).T, b_update, input_precision=PRECISION)
        b_update += load_offset(offset_2, o_c, C)[None, :]
        store_rows(out, keep_masked(b_update, mask, o_t, TOKENS, ROWS, COLUMNS), o_t, o_c, TOKENS, ROWS, COLUMNS, C)
        o_t += stride
        b_x = load_rows(x, o_t, o_c, TOKENS, ROWS, COLUMNS, C)
        b_y = normalised_rows(b_x, norm_weight, norm_bias, o_c, C, EPS, HAS_BIAS).to(desc_1.dtype)


def relu_transition(
    x: Tensor,
    norm: NormParameters,
    weight_1: Tensor,
    offset_1: Tensor,
    weight_2: Tensor,
    offset_2: Tensor,
    mask: Tensor | None,
    compute: torch.dtype,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """Launch the kernel; arguments as in the api, ``compute`` is the dtype of the products."""
    out = torch.empty_like(x)
    flat = with_rows(x, mask, out)
    _, rows, columns, channels = flat[0].shape
    count, width, hidden = x.numel() // channels, padded(channels), weight_1.shape[0]
    tiles = tiles or choose_tiles(width, compute)
    with on_device(x):
        forward_kernel[(programs(x, count, tiles),)](
            *map(tokens, flat),
            norm.weight,
            norm.bias,
            descriptor(weight_1, compute, [tiles.block_h, width]),
            offset_1,
            descriptor(weight_2, compute, [width, tiles.block_h]),
            offset_2,
            count,
            rows,
            columns,
            hidden,
            C=channels,
            EPS=norm.eps,
            HAS_BIAS=norm.bias is not None,
            BLOCK_C=width,
            PRECISION=precision(compute),
            **tiles.options(),
        )
    return out
