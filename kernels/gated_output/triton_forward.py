"""Forward pass in Triton: tokens are read once, normed, gated, projected, added and written."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.gated_output.triton_common import (
    COMPUTE,
    SIZES,
    Tiles,
    Tokens,
    grid_of,
    in_order,
    load_tokens,
    load_weight,
    locate,
    programs,
    store_tokens,
    tokens,
)
from pairformer_fast.kernels.launching import on_device, padded, precision, tf32
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm.triton_rows import normalised_rows


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    z,
    attended,
    dropout,
    out,
    norm_weight,
    norm_bias,
    gate_weight,
    out_weight,
    B,
    I,  # noqa: E741 -- as in [B, I, J, C]
    J,
    tiles,
    C: tl.constexpr,
    HD: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Tiles of ``BLOCK_I x BLOCK_J`` tokens, ``BLOCK_H`` channels of ``attended`` at a time."""
    # Made again here: Triton 3.6 forgets in loops what is constant in a tuple that was passed.
    z, attended, dropout, out = Tokens(*z), Tokens(*attended), Tokens(*dropout), Tokens(*out)
    o_c, o_h = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_H)
    if HD <= BLOCK_H:
        b_gate_weight = load_weight(gate_weight, o_h, o_c, HD, C, DTYPE)  # [BH, BC]
        b_out_weight = load_weight(out_weight, o_c, o_h, C, HD, DTYPE)  # [BC, BH]
    for i_tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        i_b, o_i, o_j, m_t = locate(i_tile, B, I, J, BLOCK_I, BLOCK_J)
        b_z = load_tokens(z, i_b, o_i, o_j, m_t, o_c, C, BLOCK_C).to(tl.float32)  # [BT, BC]
        if HD <= BLOCK_H:
            b_attended = load_tokens(attended, i_b, o_i, o_j, m_t, o_h, HD, BLOCK_H)  # [BT, BH]
        b_x = normalised_rows(b_z, norm_weight, norm_bias, o_c, C, EPS, norm_bias is not None).to(DTYPE)
        b_update = tl.zeros([BLOCK_I * BLOCK_J, BLOCK_C], tl.float32)
        for start in range(0, HD, BLOCK_H):
            if HD > BLOCK_H:
                b_attended = load_tokens(attended, i_b, o_i, o_j, m_t, start + o_h, HD, BLOCK_H)
                b_gate_weight = load_weight(gate_weight, start + o_h, o_c, HD, C, DTYPE)
                b_out_weight = load_weight(out_weight, o_c, start + o_h, C, HD, DTYPE)
            b_gate = tl.sigmoid(tl.dot(b_x, tl.trans(b_gate_weight), input_precision=PRECISION))  # [BT, BH]
            b_gated = (b_gate * b_attended.to(tl.float32)).to(DTYPE)
            b_update = tl.dot(b_gated, tl.trans(b_out_weight), b_update, input_precision=PRECISION)
        if BLOCK_C > 128:
            # Read again: kept across the products, it would not fit into registers.
            b_z = load_tokens(z, i_b, o_i, o_j, m_t, o_c, C, BLOCK_C).to(tl.float32)
        if dropout.pointer is not None:
            b_update *= load_tokens(dropout, i_b, o_i, o_j, m_t, o_c, C, BLOCK_C).to(tl.float32)
        store_tokens(out, b_z + b_update, i_b, o_i, o_j, m_t, o_c, C, BLOCK_C)


def choose_tiles(z: Tensor, width: int, compute: torch.dtype) -> Tiles:
    """Tiles for ``z [..., C]`` and ``width`` channels of ``attended``, with products in ``compute``."""
    widest = max(z.shape[-1], width)
    if tf32(compute) and widest <= 128:
        return Tiles(64, 8, 64, 0, 8, 1)
    if compute == torch.float32:
        return Tiles(32, 4, 32, 0, 8, 1)
    if widest <= 128:
        # The pipeline of an fp32 tile would leave no room for a second program.
        return Tiles(64, 8, 128, 2, 4, 2 if z.dtype.itemsize == 2 else 1)
    if z.shape[-1] <= 256:
        return Tiles(128, 8, 64, 1, 8, 2) if z.dtype.itemsize == 2 else Tiles(64, 8, 64, 1, 8, 1)
    return Tiles(32, 4, 32, 0, 8, 2)


def forward(
    z: Tensor,
    attended: Tensor,
    norm: NormParameters,
    gate_weight: Tensor,
    out_weight: Tensor,
    dropout: Tensor | None,
    out: Tensor,
    compute: torch.dtype,
    *,
    tiles: Tiles | None = None,
) -> None:
    """Launch the kernel.

    Parameters
    ----------
    z, out : Tensor
        ``[B, I, J, C]``, bf16, fp16 or fp32; ``out`` may be ``z``.
    attended : Tensor
        ``[B, I, J, HD]``.
    norm : NormParameters
    gate_weight, out_weight : Tensor
        ``[HD, C]`` and ``[C, HD]``, cast to ``compute`` on load.
    dropout : Tensor, optional
        ``[B, I, J, C]``, any strides.
    compute : torch.dtype
        Of the products.
    tiles : Tiles, optional
        In place of those of ``choose_tiles``.
    """
    z, attended, dropout, out = in_order(z, attended, dropout, out)
    batch, count_i, count_j, channels = z.shape
    width = attended.shape[-1]
    tiles = tiles or choose_tiles(z, width, compute)
    grid = grid_of(z, attended, tiles)
    with on_device(z):
        forward_kernel[(programs(grid.tiles, tiles, z.device),)](
            tokens(z),
            tokens(attended),
            tokens(dropout),
            tokens(out),
            norm.weight,
            norm.bias,
            gate_weight.contiguous(),
            out_weight.contiguous(),
            batch,
            count_i,
            count_j,
            grid.tiles,
            C=channels,
            HD=width,
            EPS=norm.eps,
            DTYPE=COMPUTE[compute],
            PRECISION=precision(compute),
            BLOCK_I=grid.block_i,
            BLOCK_J=grid.block_j,
            BLOCK_C=padded(channels),
            BLOCK_H=min(tiles.width, padded(width)),
            STAGES=tiles.stages,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
