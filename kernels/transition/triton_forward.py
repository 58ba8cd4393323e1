"""Forward pass in Triton: a program holds a tile of tokens on chip and goes through the hidden layer by blocks."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.launching import on_device, padded, precision, tf32
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm.triton_rows import normalised_rows
from pairformer_fast.kernels.transition.triton_common import (
    Tiles,
    Tokens,
    approximate,
    descriptor,
    keep_masked,
    load_rows,
    programs,
    sigmoid,
    store_rows,
    tokens,
    with_rows,
)

PREFETCHED_BYTES = 256
"""Largest token that is loaded ahead."""


@triton.jit(do_not_specialize=["TOKENS", "ROWS", "COLUMNS", "HIDDEN"])
def forward_kernel(
    x,
    mask,
    out,
    norm_weight,
    norm_bias,
    a_desc,
    b_desc,
    out_desc,
    TOKENS,
    ROWS,
    COLUMNS,
    HIDDEN,
    C: tl.constexpr,
    EPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Updates of tiles of ``BLOCK_T`` tokens, every ``programs``-th one; ``out`` may be ``x``."""
    x, mask, out = Tokens(*x), Tokens(*mask), Tokens(*out)
    o_c = tl.arange(0, BLOCK_C)
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    stride = tl.num_programs(0) * BLOCK_T
    b_x = load_rows(x, o_t, o_c, TOKENS, ROWS, COLUMNS, C)
    # Carried from tile to tile: only so does Triton keep the left side of the products in shared memory, where they
    # need not wait for one another.
    b_y = normalised_rows(b_x, norm_weight, norm_bias, o_c, C, EPS, HAS_BIAS).to(a_desc.dtype)  # [T, BLOCK_C]
    for _ in range(tl.program_id(0) * BLOCK_T, TOKENS, stride):
        if PREFETCH:
            b_next = load_rows(x, o_t + stride, o_c, TOKENS, ROWS, COLUMNS, C)
        b_update = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for start in range(0, HIDDEN, BLOCK_H):
            b_p = tl.dot(b_y, a_desc.load([start, 0]).T, input_precision=PRECISION)  # [T, BLOCK_H]
            b_q = tl.dot(b_y, b_desc.load([start, 0]).T, input_precision=PRECISION)
            b_h = (b_p * sigmoid(b_p, APPROXIMATE) * b_q).to(b_y.dtype)
            b_update = tl.dot(b_h, out_desc.load([0, start]).T, b_update, input_precision=PRECISION)
        b_update = keep_masked(b_update, mask, o_t, TOKENS, ROWS, COLUMNS)
        if RESIDUAL:
            # Loaded once more, from cache: kept, it would take the registers of the loop.
            b_update += load_rows(x, o_t, o_c, TOKENS, ROWS, COLUMNS, C)
        store_rows(out, b_update, o_t, o_c, TOKENS, ROWS, COLUMNS, C)
        o_t += stride
        if not PREFETCH:
            b_next = load_rows(x, o_t, o_c, TOKENS, ROWS, COLUMNS, C)
        b_y = normalised_rows(b_next, norm_weight, norm_bias, o_c, C, EPS, HAS_BIAS).to(a_desc.dtype)


def transition(
    x: Tensor,
    norm: NormParameters,
    a_weight: Tensor,
    b_weight: Tensor,
    out_weight: Tensor,
    mask: Tensor | None,
    out: Tensor,
    residual: bool,
    compute: torch.dtype,
    *,
    tiles: Tiles | None = None,
) -> None:
    """Launch the kernel.

    Parameters
    ----------
    x, out : Tensor
        ``[B, I, J, C]`` or ``[B, N, C]``, any strides but the last; the result is written to ``out``.
    norm : NormParameters
    a_weight, b_weight, out_weight : Tensor
        ``[hidden, C]``, ``[hidden, C]`` and ``[C, hidden]``.
    mask : Tensor, optional
        Bool, ``x.shape[:-1]``.
    residual : bool
        Whether ``x`` is added.
    compute : torch.dtype
        Of the products.
    tiles : Tiles, optional
        In place of those of the table.
    """
    flat = with_rows(x, mask, out)
    _, rows, columns, channels = flat[0].shape
    count, width, hidden = x.numel() // channels, padded(channels), a_weight.shape[0]
    tiles = tiles or choose_tiles(width, compute)
    with on_device(x):
        forward_kernel[(programs(x, count, tiles),)](
            *map(tokens, flat),
            norm.weight,
            norm.bias,
            descriptor(a_weight, compute, [tiles.block_h, width]),
            descriptor(b_weight, compute, [tiles.block_h, width]),
            descriptor(out_weight, compute, [width, tiles.block_h]),
            count,
            rows,
            columns,
            hidden,
            C=channels,
            EPS=norm.eps,
            HAS_BIAS=norm.bias is not None,
            RESIDUAL=residual,
            BLOCK_C=width,
            PRECISION=precision(compute),
            APPROXIMATE=approximate(compute),
            # Held in registers while the tile before it is computed, which leaves no room for more.
            PREFETCH=width * x.element_size() <= PREFETCHED_BYTES,
            **tiles.options(),
        )


def choose_tiles(width: int, compute: torch.dtype) -> Tiles:
    """Tiles for a padded number of channels and a dtype of the products."""
    if tf32(compute) and width <= 128:
        return Tiles(64, 32, 4, 2, 1)
    if compute == torch.float32:
        return Tiles(32, 32, 8, 1, 1) if width <= 128 else Tiles(16, 16, 8, 1, 1)
    if width <= 128:
        return Tiles(64, 64, 4, 2, 2)
    return Tiles(128, 32, 8, 2, 1) if width <= 256 else Tiles(16, 32, 8, 2, 1)
