"""Forward pass in Triton: a program normalises a tile of tokens once and multiplies it by all weights."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm.triton_rows import normalised_rows
from pairformer_fast.kernels.layer_norm.triton_tokens import (
    Tokens,
    layout,
    load_tokens,
    locate,
    on_device,
    token_offsets,
    tokens,
)


class Tiles(NamedTuple):
    """How the kernel cuts its work.

    Attributes
    ----------
    tokens : int
        Tokens of a program, a power of two >= 16.
    outputs : int
        Columns of ``tokens`` computed at once, a power of two >= 16.
    warps, stages : int
        Warps of a program and depth of the pipeline that loads the weight.
    """

    tokens: int
    outputs: int
    warps: int
    stages: int


@triton.jit
def load_weight(weight, start, OUT: tl.constexpr, C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows ``start ..`` of a contiguous ``[O, C]``, transposed."""
    o_o = start + tl.arange(0, BLOCK_O)[None, :]
    o_c = tl.arange(0, BLOCK_C)[:, None]
    p_weight = weight + o_o * C + o_c
    if OUT % BLOCK_O == 0 and C == BLOCK_C:
        return tl.load(p_weight)
    return tl.load(p_weight, mask=(o_o < OUT) & (o_c < C), other=0.0)  # [BLOCK_C, BLOCK_O]


@triton.jit
def forward_kernel(
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
        b_planes = tl.trans(tl.dot(b_y.to(b_planar_weight.dtype), b_planar_weight))  # [BLOCK_P, T]
        o_p = tl.arange(0, BLOCK_P)[:, None]
        p_planes = planar.pointer + o_p.to(tl.int64) * plane + token_offsets(planar, i_b, o_i, o_j)[None, :]
        tl.store(p_planes, b_planes.to(b_planar_weight.dtype), mask=(o_p < P) & m_t[None, :])

    if weight is not None:
        p_tokens = tokens.pointer + token_offsets(tokens, i_b, o_i, o_j)[:, None]
        for start in tl.range(0, OUT, BLOCK_O, num_stages=STAGES):
            b_weight = load_weight(weight, start, OUT, C, BLOCK_O, BLOCK_C)
            b_out = tl.dot(b_y.to(b_weight.dtype), b_weight)  # [T, BLOCK_O]
            o_o = start + tl.arange(0, BLOCK_O)[None, :]
            m_out = m_t[:, None] if OUT % BLOCK_O == 0 else m_t[:, None] & (o_o < OUT)
            tl.store(p_tokens + o_o, b_out.to(b_weight.dtype), mask=m_out)


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
    """Launch the kernel, which writes ``out_tokens [B, I, J, O]`` and ``out_planar [B, P, I, J]``.

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
    tiles = tiles or tile_sizes(channels, planar_only=weight is None)
    planes = Tokens(None) if planar_weight is None else tokens(out_planar.permute(0, 2, 3, 1))
    plan = layout(z.shape[:3], [tokens(z), tokens(None if weight is None else out_tokens), planes])
    block = plan.block(tiles.tokens)
    with on_device(z):
        forward_kernel[(plan.tiles(block),)](
            *plan.operands,
            norm.weight,
            norm.bias,
            weight,
            planar_weight,
            0 if planar_weight is None else out_planar.stride(1),
            plan.rows,
            plan.columns,
            C=channels,
            OUT=0 if weight is None else weight.shape[0],
            P=0 if planar_weight is None else planar_weight.shape[0],
            EPS=norm.eps,
            BLOCK_C=_padded(channels),
            BLOCK_O=tiles.outputs,
            BLOCK_P=16 if planar_weight is None else _padded(planar_weight.shape[0]),
            BLOCK_I=block[0],
            BLOCK_J=block[1],
            STAGES=tiles.stages,
            num_warps=tiles.warps,
        )


def tile_sizes(channels: int, *, planar_only: bool) -> Tiles:
    """Tiles for ``C`` channels."""
    if planar_only:
        return Tiles(64, 16, 4, 1)
    return Tiles(64, 64, 4, 2) if channels > 128 else Tiles(128, 64, 8, 3)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))
