"""Forward pass in Triton: a tile of tokens is normalised once and multiplied by all weights.

Two kernels do so: where the weights fit into shared memory they stay there, elsewhere each tile streams them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.launching import on_device, padded, processors
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm.triton_rows import normalised_rows
from pairformer_fast.kernels.layer_norm.triton_tokens import Tokens, layout, load_tokens, locate, token_offsets, tokens

RESIDENT_ENTRIES = 384 * 128
"""Largest weight that fits into shared memory beside two tiles of tokens in fp32."""


class Tiles(NamedTuple):
    """How the kernels cut their work.

    Attributes
    ----------
    tokens : int
        Tokens of a tile, a power of two >= 16.
    outputs : int
        Columns of ``tokens`` computed at once, a power of two >= 16.
    warps : int
        Warps of a program.
    stages : int
        Depth of the pipeline that loads tokens, or weights where they are streamed.
    resident : int
        Programs for each multiprocessor, which keep the weights in shared memory; 0 if every tile is a program of its
        own, which streams them.
    """

    tokens: int
    outputs: int
    warps: int
    stages: int
    resident: int


@triton.jit
def append(values, value):
    """Tuple of blocks with one more."""
    return values + (value,)  # noqa: RUF005 -- Triton knows no starred expressions


@triton.jit
def load_weight(weight, start, OUT: tl.constexpr, C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows ``start ..`` of a contiguous ``[OUT, C]``, transposed."""
    o_o = start + tl.arange(0, BLOCK_O)[None, :]
    o_c = tl.arange(0, BLOCK_C)[:, None]
    p_weight = weight + o_o * C + o_c
    if OUT % BLOCK_O == 0 and C == BLOCK_C:
        return tl.load(p_weight)
    return tl.load(p_weight, mask=(o_o < OUT) & (o_c < C), other=0.0)  # [BLOCK_C, BLOCK_O]


@triton.jit
def store_product(p_tokens, b_y, b_weight, start, m_t, OUT: tl.constexpr, BLOCK_O: tl.constexpr):
    """Columns ``start ..`` of ``tokens``."""
    b_out = tl.dot(b_y.to(b_weight.dtype), b_weight)  # [T, BLOCK_O]
    o_o = start + tl.arange(0, BLOCK_O)[None, :]
    m_out = m_t[:, None] if OUT % BLOCK_O == 0 else m_t[:, None] & (o_o < OUT)
    tl.store(p_tokens[:, None] + o_o, b_out.to(b_weight.dtype), mask=m_out)


@triton.jit
def store_planes(p_planar, plane, b_y, b_weight, m_t, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """All planes; the store runs along tokens, so that it is coalesced."""
    b_planes = tl.trans(tl.dot(b_y.to(b_weight.dtype), b_weight))  # [BLOCK_P, T]
    o_p = tl.arange(0, BLOCK_P)[:, None]
    p_planes = p_planar[None, :] + o_p.to(tl.int64) * plane
    tl.store(p_planes, b_planes.to(b_weight.dtype), mask=(o_p < P) & m_t[None, :])


@triton.jit
def streamed_kernel(
    z,
    tokens,
    planar,
    norm_weight,
    norm_bias,
    weight,
    planar_weight,
    plane,
    rows,
    columns,
    tiles,
    C: tl.constexpr,
    OUT: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All linear layers of one tile of tokens; the planes of ``planar`` are ``plane`` entries apart."""
    z, tokens, planar = Tokens(*z), Tokens(*tokens), Tokens(*planar)
    i_b, o_i, o_j, m_t = locate(tl.program_id(0), rows, columns, BLOCK_I, BLOCK_J)
    o_c = tl.arange(0, BLOCK_C)
    b_z = load_tokens(z, i_b, o_i, o_j, m_t, o_c, C).to(tl.float32)  # [T, BLOCK_C]
    b_y = normalised_rows(b_z, norm_weight, norm_bias, o_c, C, EPS, norm_bias is not None)
    if planar_weight is not None:
        b_planar_weight = load_weight(planar_weight, 0, P, C, BLOCK_P, BLOCK_C)
        p_planar = planar.pointer + token_offsets(planar, i_b, o_i, o_j)
        store_planes(p_planar, plane, b_y, b_planar_weight, m_t, P, BLOCK_P)
    if weight is not None:
        p_tokens = tokens.pointer + token_offsets(tokens, i_b, o_i, o_j)
        for start in tl.range(0, OUT, BLOCK_O, num_stages=STAGES):
            b_weight = load_weight(weight, start, OUT, C, BLOCK_O, BLOCK_C)
            store_product(p_tokens, b_y, b_weight, start, m_t, OUT, BLOCK_O)


@triton.jit
def resident_kernel(
    z,
    tokens,
    planar,
    norm_weight,
    norm_bias,
    weight,
    planar_weight,
    plane,
    rows,
    columns,
    tiles,
    C: tl.constexpr,
    OUT: tl.constexpr,
    P: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All linear layers of every ``num_programs``-th tile; the weights stay on chip, the next tokens are under way."""
    z, tokens, planar = Tokens(*z), Tokens(*tokens), Tokens(*planar)
    o_c = tl.arange(0, BLOCK_C)
    b_weights = ()
    if weight is not None:
        for i_part in tl.static_range((OUT + BLOCK_O - 1) // BLOCK_O):
            b_weights = append(b_weights, load_weight(weight, i_part * BLOCK_O, OUT, C, BLOCK_O, BLOCK_C))
    if planar_weight is not None:
        b_planar_weight = load_weight(planar_weight, 0, P, C, BLOCK_P, BLOCK_C)
    for i_tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        i_b, o_i, o_j, m_t = locate(i_tile, rows, columns, BLOCK_I, BLOCK_J)
        b_z = load_tokens(z, i_b, o_i, o_j, m_t, o_c, C).to(tl.float32)  # [T, BLOCK_C]
        b_y = normalised_rows(b_z, norm_weight, norm_bias, o_c, C, EPS, norm_bias is not None)
        if planar_weight is not None:
            p_planar = planar.pointer + token_offsets(planar, i_b, o_i, o_j)
            store_planes(p_planar, plane, b_y, b_planar_weight, m_t, P, BLOCK_P)
        if weight is not None:
            p_tokens = tokens.pointer + token_offsets(tokens, i_b, o_i, o_j)
            for i_part in tl.static_range((OUT + BLOCK_O - 1) // BLOCK_O):
                store_product(p_tokens, b_y, b_weights[i_part], i_part * BLOCK_O, m_t, OUT, BLOCK_O)


def forward(
    z: Tensor,
    norm: NormParameters,
    weight: Tensor | None,
    planar_weight: Tensor | None,
    out_tokens: Tensor,
    out_planar: Tensor,
    *,
    tiles: Tiles | None = None,
) -> None:
    """Launch one of the kernels, which write ``out_tokens [B, I, J, O]`` and ``out_planar [B, P, I, J]``.

    Parameters
    ----------
    z, norm, weight, planar_weight
        As in the api, bf16, fp16 or fp32.
    out_tokens, out_planar : Tensor
        Both bf16 or both fp16, to which weights and normalised tokens are rounded too; any strides but the last of
        ``out_tokens``. Unused without their weight.
    tiles : Tiles, optional
        In place of those of the table.
    """
    channels = z.shape[-1]
    compute = out_tokens.dtype
    weight, planar_weight = (None if w is None else w.to(compute).contiguous() for w in (weight, planar_weight))
    tiles = tiles or tile_sizes(channels, 0 if weight is None else weight.shape[0])
    planes = Tokens(None) if planar_weight is None else tokens(out_planar.permute(0, 2, 3, 1))
    plan = layout(z.shape[:3], [tokens(z), tokens(None if weight is None else out_tokens), planes])
    block = plan.block(tiles.tokens)
    count = plan.tiles(block)
    kernel, programs = streamed_kernel, count
    if tiles.resident:
        kernel, programs = resident_kernel, min(count, tiles.resident * processors(z.device))
    with on_device(z):
        kernel[(programs,)](
            *plan.operands,
            norm.weight,
            norm.bias,
            weight,
            planar_weight,
            0 if planar_weight is None else out_planar.stride(1),
            plan.rows,
            plan.columns,
            count,
            C=channels,
            OUT=0 if weight is None else weight.shape[0],
            P=0 if planar_weight is None else planar_weight.shape[0],
            EPS=norm.eps,
            BLOCK_C=padded(channels),
            BLOCK_O=tiles.outputs,
            BLOCK_P=16 if planar_weight is None else padded(planar_weight.shape[0]),
            BLOCK_I=block[0],
            BLOCK_J=block[1],
            STAGES=tiles.stages,
            num_warps=tiles.warps,
        )


def tile_sizes(channels: int, outputs: int) -> Tiles:
    """Tiles for ``C`` channels of z and ``O`` of ``tokens``, 0 for planes alone."""
    if outputs == 0:
        return Tiles(64, 16, 4, 3, 4) if channels <= 128 else Tiles(64, 16, 4, 1, 0)
    if channels > 128:
        return Tiles(64, min(64, padded(outputs)), 4, 2, 0)
    if padded(channels) * outputs > RESIDENT_ENTRIES:
        return Tiles(128, 64, 8, 3, 0)
    if channels > 64:
        return Tiles(64, min(128, padded(outputs)), 8, 3, 1)
    return Tiles(128, min(64, padded(outputs)), 8, 2, 2)
