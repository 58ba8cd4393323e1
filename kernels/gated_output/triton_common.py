"""What the forward and the backward kernel share: operands, tiles of tokens, and how they are launched."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.launching import processors

ONE: tl.constexpr = tl.constexpr(1)
COMPUTE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


SIZES = ("B", "I", "J", "first", "tiles")
"""Arguments whose divisibility by 16 is not worth compiling again for."""


class Tokens(NamedTuple):
    """Pointer and strides of a tensor ``[B, I, J, X]``."""

    pointer: Tensor | None
    b: int = 0
    i: int = 0
    j: int = 0
    x: tl.constexpr = ONE


class Tiles(NamedTuple):
    """How a kernel cuts its work.

    Attributes
    ----------
    tokens : int
        Tokens of a tile, a power of two >= 16.
    rows : int
        Rows i of a tile where ``z`` and ``attended`` are laid out in different orders; one row otherwise.
    width : int
        Channels of ``attended`` taken at once, a power of two >= 16. The weights stay on chip where it covers them all.
    programs : int
        Programs of a multiprocessor, each of which takes many tiles; 0 for one tile a program.
    warps, stages : int
        Warps of a program and depth of the software pipeline.
    """

    tokens: int
    rows: int
    width: int
    programs: int
    warps: int
    stages: int


class Grid(NamedTuple):
    """Shape of the tiles of tokens, and how many there are."""

    block_i: int
    block_j: int
    tiles: int


def tokens(x: Tensor | None) -> Tokens:
    """Operand of ``[B, I, J, X]``."""
    if x is None:
        return Tokens(None)
    b, i, j, last = x.stride()
    return Tokens(x, b, i, j, tl.constexpr(last))


def in_order(z: Tensor, *others: Tensor | None) -> list[Any]:
    """The tensors, their dimensions I and J swapped if ``z`` is transposed: neighbours j are neighbours in memory."""
    if z.stride(1) >= z.stride(2) and z.shape[2] > 1:
        return [z, *others]
    return [x if x is None else x.transpose(1, 2) for x in (z, *others)]


def grid_of(z: Tensor, attended: Tensor, tiles: Tiles) -> Grid:
    """Tiles of tensors that are ``in_order``."""
    batch, count_i, count_j, _ = z.shape
    block_i = min(tiles.rows, triton.next_power_of_2(count_i)) if attended.stride(1) < attended.stride(2) else 1
    block_j = tiles.tokens // block_i
    return Grid(block_i, block_j, batch * triton.cdiv(count_i, block_i) * triton.cdiv(count_j, block_j))


def programs(count: int, tiles: Tiles, device: torch.device) -> int:
    """Programs to launch for ``count`` tiles."""
    if not tiles.programs:
        return count
    return min(count, tiles.programs * processors(device))


@triton.jit
def locate(i_tile, B, I, J, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):  # noqa: E741 -- as in [B, I, J, C]
    """Batch index of a tile, rows and columns of its tokens, and which of them exist."""
    tiles_i, tiles_j = tl.cdiv(I, BLOCK_I), tl.cdiv(J, BLOCK_J)
    i_b = i_tile // tiles_j // tiles_i
    o_t = tl.arange(0, BLOCK_I * BLOCK_J)
    o_i = i_tile // tiles_j % tiles_i * BLOCK_I + o_t // BLOCK_J  # [BT]
    o_j = i_tile % tiles_j * BLOCK_J + o_t % BLOCK_J  # [BT]
    rows = tl.where(i_b < B, I, 0)
    return i_b, o_i, o_j, (o_i < rows) & (o_j < J)


@triton.jit
def token_pointers(x, i_b, o_i, o_j, o_x):
    """Pointers to channels ``o_x`` of tokens; 64 bits because a tensor may hold more than 2^31 entries."""
    o_token = o_i.to(tl.int64) * x.i + o_j.to(tl.int64) * x.j
    return x.pointer + i_b.to(tl.int64) * x.b + o_token[:, None] + o_x[None, :] * x.x  # [BT, BX]


@triton.jit
def token_mask(m_t, o_x, X: tl.constexpr, BLOCK_X: tl.constexpr):
    """Which entries of a tile of tokens exist."""
    m_x = m_t[:, None]
    if X % BLOCK_X != 0:
        m_x = m_x & (o_x < X)[None, :]
    return m_x


@triton.jit
def load_tokens(x, i_b, o_i, o_j, m_t, o_x, X: tl.constexpr, BLOCK_X: tl.constexpr):
    """Channels ``o_x`` of tokens, zero where there are none."""
    return tl.load(token_pointers(x, i_b, o_i, o_j, o_x), mask=token_mask(m_t, o_x, X, BLOCK_X), other=0.0)


@triton.jit
def store_tokens(x, b_x, i_b, o_i, o_j, m_t, o_x, X: tl.constexpr, BLOCK_X: tl.constexpr):
    """Inverse of ``load_tokens``."""
    p_x = token_pointers(x, i_b, o_i, o_j, o_x)
    tl.store(p_x, b_x.to(x.pointer.dtype.element_ty), mask=token_mask(m_t, o_x, X, BLOCK_X))


@triton.jit
def load_weight(weight, o_rows, o_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """Part of a contiguous weight ``[ROWS, COLUMNS]``, zero outside it."""
    m_weight = (o_rows < ROWS)[:, None] & (o_columns < COLUMNS)[None, :]
    p_weight = weight + o_rows[:, None] * COLUMNS + o_columns[None, :]
    return tl.load(p_weight, mask=m_weight, other=0.0).to(DTYPE)
