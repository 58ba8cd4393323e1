"""What the forward and the backward kernels share: operands, loads, and the tile of the bias.

All scores are in units of log2, ``s = q k^T (log2(e) / sqrt(D)) + bias log2(e)``, a weight is ``exp2(s - lse)``.
Neither q nor the factors are scaled beforehand, which would round them once more.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.flash_bias.terms import TILE, BiasTerms
from pairformer_fast.kernels.flash_bias.triton_tiles import Tiles, tile_sizes

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
ONE: tl.constexpr = tl.constexpr(1)
VECTOR: tl.constexpr = tl.constexpr(8)
FLAG_TILE: tl.constexpr = tl.constexpr(TILE)


class Tokens(NamedTuple):
    """Pointer and strides of a tensor ``[B, I, N, H, D]``; those but the last in multiples of ``unit`` entries.

    Triton looks for strides divisible by 16, which D = 24 has not, and would load its entries one by one.
    """

    pointer: Tensor | None
    b: int = 0
    i: int = 0
    n: int = 0
    h: int = 0
    d: int = 0
    unit: tl.constexpr = ONE


class Rows(NamedTuple):
    """Pointer and strides of a tensor ``[B, I, H, N]``."""

    pointer: Tensor | None
    b: int = 0
    i: int = 0
    h: int = 0
    n: int = 0


class Matrix(NamedTuple):
    """Pointer and strides of a tensor ``[B, H, X, Y]``; those but the last in multiples of ``unit`` entries."""

    pointer: Tensor | None
    b: int = 0
    h: int = 0
    x: int = 0
    y: int = 0
    unit: tl.constexpr = ONE


class Bias(NamedTuple):
    """What all rows i share; absent parts have no pointer."""

    phi_q: Matrix
    phi_k: Matrix
    table: Matrix
    dense: Matrix
    dense_tiles: Matrix
    pair_mask: Matrix
    band: int
    """W of the table over clipped i - j."""


def tokens(x: Tensor | None) -> Tokens:
    """Operand of ``[B, I, N, H, D]``."""
    return Tokens(None) if x is None else Tokens(x, *_in_units(x))


def rows(x: Tensor | None) -> Rows:
    """Operand of ``[B, I, H, N]``, or of a mask ``[B, I, M]``."""
    if x is None:
        return Rows(None)
    if x.ndim == 3:
        x = _bytes(x).unsqueeze(2).expand(-1, -1, 1, -1)
    return Rows(x, *x.stride())


def matrix(x: Tensor | None) -> Matrix:
    """Operand of ``[B, H, X, Y]``."""
    return Matrix(None) if x is None else Matrix(_bytes(x), *_in_units(x))


def bias_operand(terms: BiasTerms, pair_mask: Tensor | None) -> Bias:
    """Operand of all that the rows share."""
    table = None if terms.table is None else terms.table[None, ..., None]
    return Bias(
        phi_q=matrix(terms.phi_q),
        phi_k=matrix(terms.phi_k),
        table=matrix(table),
        dense=matrix(terms.dense),
        dense_tiles=matrix(terms.dense_tiles),
        pair_mask=matrix(None if pair_mask is None else pair_mask[:, None])._replace(h=0),
        band=0 if terms.table is None else terms.table.shape[-1] // 2,
    )


def _in_units(x: Tensor) -> tuple[Any, ...]:
    *strides, last = x.stride()
    unit = VECTOR if all(stride % VECTOR.value == 0 for stride in strides) else ONE
    return *(stride // unit.value for stride in strides), last, unit


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def rank_of(terms: BiasTerms) -> int:
    """Rank of the factors, 0 without."""
    return 0 if terms.phi_q is None else terms.phi_q.shape[-1]


def choose_tiles(kind: str, q: Tensor, terms: BiasTerms) -> Tiles:
    """Tiles from the table, with one row per group where there is one row."""
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    tiles = tile_sizes(kind, q.dtype, q.shape[-1], rank_of(terms), q.shape[2], capability)
    return tiles if q.shape[1] > 1 else tiles._replace(group=1)


@triton.jit
def append(values, value):
    """Tuple of blocks with one more, for the rows of a group."""
    return values + (value,)  # noqa: RUF005 -- Triton knows no starred expressions


@triton.jit
def locate(i_program, blocks, H, BLOCK: tl.constexpr):
    """First token, head, and remaining index of a program; blocks of one head are neighbours and share its keys."""
    start = (i_program % blocks) * BLOCK
    i_h = (i_program // blocks) % H
    return start, i_h, i_program // blocks // H


@triton.jit
def wide(stride, unit):
    """Stride in entries, in 64 bits: one in multiples of ``unit`` may fit into 32 bits where it does not."""
    return tl.cast(stride, tl.int64) * unit


@triton.jit
def matrix_pointer(x, i_b, i_h):
    """Pointer to ``[X, Y]`` of one head; 64 bits because a tensor may hold more than 2^31 entries."""
    return x.pointer + i_b * wide(x.b, x.unit) + i_h * wide(x.h, x.unit)


@triton.jit
def tile_pointers(p_x, stride, stride_last, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to rows ``start ..`` of a matrix, given its strides in 64 bits."""
    o_x = tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_x + start * stride + o_x[:, None] * stride
    return p_rows + o_d[None, :] * stride_last  # [BLOCK, BLOCK_D]


@triton.jit
def tile_mask(start, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which entries of a tile lie in a ``[length, WIDTH]`` matrix."""
    return (tl.arange(0, BLOCK)[:, None] < length - start) & (tl.arange(0, BLOCK_D)[None, :] < WIDTH)


@triton.jit
def token_pointers(x, i_b, i_i, i_h, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to tokens ``start ..`` of one row and head."""
    p_x = x.pointer + i_b * wide(x.b, x.unit) + i_i * wide(x.i, x.unit) + i_h * wide(x.h, x.unit)
    return tile_pointers(p_x, wide(x.n, x.unit), wide(x.d, 1), start, BLOCK, BLOCK_D)


@triton.jit
def load_tokens(x, i_b, i_i, i_h, start, length, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens ``start ..`` of one row and head, zero outside."""
    m_x = tile_mask(start, length, D, BLOCK, BLOCK_D)
    return tl.load(token_pointers(x, i_b, i_i, i_h, start, BLOCK, BLOCK_D), mask=m_x, other=0.0)  # [BLOCK, BLOCK_D]


@triton.jit
def store_tokens(x, b_x, i_b, i_i, i_h, start, length, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Inverse of ``load_tokens``; a ``length`` of zero stores nothing."""
    p_x = token_pointers(x, i_b, i_i, i_h, start, BLOCK, BLOCK_D)
    tl.store(p_x, b_x.to(x.pointer.dtype.element_ty), mask=tile_mask(start, length, D, BLOCK, BLOCK_D))


@triton.jit
def load_factors(x, i_b, i_h, start, length, R: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows ``start ..`` of the factors of one head, None without factors."""
    b_phi = None
    if x.pointer is not None:
        p_phi = tile_pointers(matrix_pointer(x, i_b, i_h), wide(x.x, x.unit), wide(x.y, 1), start, BLOCK, BLOCK_R)
        b_phi = tl.load(p_phi, mask=tile_mask(start, length, R, BLOCK, BLOCK_R), other=0.0)
    return b_phi  # [BLOCK, BLOCK_R]


@triton.jit
def store_factors(x, b_phi, i_b, i_h, start, length, R: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr):
    """Inverse of ``load_factors``."""
    p_phi = tile_pointers(matrix_pointer(x, i_b, i_h), wide(x.x, x.unit), wide(x.y, 1), start, BLOCK, BLOCK_R)
    tl.store(p_phi, b_phi.to(x.pointer.dtype.element_ty), mask=tile_mask(start, length, R, BLOCK, BLOCK_R))


@triton.jit
def row_pointer(x, i_b, i_i, i_h):
    """Pointer to ``[N]`` of one row and head of a ``[B, I, H, N]`` tensor."""
    return x.pointer + i_b * wide(x.b, 1) + i_i * wide(x.i, 1) + i_h * wide(x.h, 1)


@triton.jit
def load_vector(x, i_b, i_i, i_h, start, length, other, BLOCK: tl.constexpr):
    """Entries ``start ..`` of one row and head of a ``[B, I, H, N]`` tensor, ``other`` outside it."""
    o_x = tl.arange(0, BLOCK)
    p_x = row_pointer(x, i_b, i_i, i_h) + start * wide(x.n, 1)
    return tl.load(p_x + o_x * wide(x.n, 1), mask=o_x < length - start, other=other)  # [BLOCK]


@triton.jit
def load_pairs(x, i_b, i_h, o_m, o_n, start_m, start_n, N, M):
    """Tile of a ``[B, H, N, M]`` tensor; ``o_m`` and ``o_n`` broadcast against each other in either order."""
    stride, stride_last = wide(x.x, x.unit), wide(x.y, 1)
    p_x = matrix_pointer(x, i_b, i_h) + start_m * stride + start_n * stride_last
    p_tile = p_x + (o_m - start_m) * stride + (o_n - start_n) * stride_last
    return tl.load(p_tile, mask=(o_m < N) & (o_n < M), other=0)


@triton.jit
def tile_flags(bias, i_b, i_h, start_m, start_n, N, BLOCK_M: tl.constexpr):
    """Whether the first and the last query of a block lie in a tile flagged as dense; keys lie in one tile."""
    p_flags = matrix_pointer(bias.dense_tiles, i_b, i_h) + start_n // FLAG_TILE * wide(bias.dense_tiles.y, 1)
    stride = wide(bias.dense_tiles.x, bias.dense_tiles.unit)
    last = tl.minimum(start_m + BLOCK_M, N) - 1
    first_flag = tl.load(p_flags + start_m // FLAG_TILE * stride)
    last_flag = tl.load(p_flags + last // FLAG_TILE * stride)
    return first_flag != 0, last_flag != 0


@triton.jit
def dense_queries(bias, i_b, i_h, o_m, start_m, start_n, N, BLOCK_M: tl.constexpr):
    """Which queries take the dense bias at this block of keys, in the shape of ``o_m``."""
    first, last = tile_flags(bias, i_b, i_h, start_m, start_n, N, BLOCK_M)
    return tl.where(o_m // FLAG_TILE == start_m // FLAG_TILE, first, last)


@triton.jit
def table_tile(bias, i_h, o_m, o_n, start_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Relative-position bias ``table[h, clip(i - j, -W, W) + W]``; one value away from the band."""
    p_table = matrix_pointer(bias.table, 0, i_h)
    stride = bias.table.x * bias.table.unit
    smallest = start_m - (start_n + BLOCK_N - 1)
    largest = start_m + BLOCK_M - 1 - start_n
    b_far = tl.load(p_table + tl.where(smallest >= bias.band, 2 * bias.band, 0) * stride).to(tl.float32)
    b_table = tl.zeros_like(o_m - o_n).to(tl.float32) + b_far
    if (smallest < bias.band) & (largest > -bias.band):
        o_gap = tl.minimum(tl.maximum(o_m - o_n, -bias.band), bias.band) + bias.band
        b_table = tl.load(p_table + o_gap * stride).to(tl.float32)
    return b_table


@triton.jit
def low_rank_tile(
    bias,
    b_phi_x,
    b_phi_y,
    i_h,
    o_m,
    o_n,
    start_m,
    start_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Bias of factors and table; here the factors are eaten."""
    b_bias = tl.dot(b_phi_x, tl.trans(b_phi_y), input_precision=PRECISION)
    if bias.table.pointer is not None:
        b_bias += table_tile(bias, i_h, o_m, o_n, start_m, start_n, BLOCK_M, BLOCK_N)
    return b_bias


@triton.jit
def bias_tile(
    bias,
    b_phi_x,
    b_phi_y,
    i_b,
    i_h,
    o_m,
    o_n,
    start_m,
    start_n,
    N,
    M,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What all rows add to a tile of scores: bias in units of log2, -inf for dropped pairs and beyond the last key.

    ``o_m`` and ``o_n`` are ``[BM, 1]`` and ``[1, BN]``, or ``[1, BM]`` and ``[BN, 1]`` for a transposed tile; then
    ``b_phi_x`` is a tile of ``phi_k`` and ``b_phi_y`` one of ``phi_q``.
    """
    b_bias = tl.zeros_like(o_m - o_n).to(tl.float32)  # [BM, BN] or [BN, BM]
    if bias.phi_q.pointer is not None:
        # In dense tiles too: ptxas 12.8 takes a shared memory address made in a branch, for wgmma, as known after it.
        b_bias = low_rank_tile(bias, b_phi_x, b_phi_y, i_h, o_m, o_n, start_m, start_n, BLOCK_M, BLOCK_N, PRECISION)
        if bias.dense_tiles.pointer is not None:
            first, last = tile_flags(bias, i_b, i_h, start_m, start_n, N, BLOCK_M)
            if first | last:
                b_dense = load_pairs(bias.dense, i_b, i_h, o_m, o_n, start_m, start_n, N, M).to(tl.float32)
                m_dense = tl.where(o_m // FLAG_TILE == start_m // FLAG_TILE, first, last)
                b_bias = tl.where(m_dense, b_dense, b_bias)
    elif bias.dense.pointer is not None:
        b_bias = load_pairs(bias.dense, i_b, i_h, o_m, o_n, start_m, start_n, N, M).to(tl.float32)
    b_bias *= LOG2E
    m_keep = o_n < M
    if bias.pair_mask.pointer is not None:
        m_keep = load_pairs(bias.pair_mask, i_b, i_h, o_m, o_n, start_m, start_n, N, M) != 0
    return tl.where(m_keep, b_bias, float("-inf"))
