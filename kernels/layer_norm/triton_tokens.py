"""Where the tokens of ``[B, I, J, C]`` lie in memory, and tiles of them: for kernels over the pair representation."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Tokens(NamedTuple):
    """Pointer to channel 0 of token (0, 0, 0), and strides of batch, row and column.

    Kernels make it anew, ``x = Tokens(*x)``: Triton 3.6 forgets in loops that a stride passed in a tuple is 1.
    """

    pointer: Tensor | None
    b: int = 0
    i: int = 0
    j: int = 0


class Layout(NamedTuple):
    """Sizes of a launch: ``rows`` x ``columns`` tokens of each of ``batch``, and the operands."""

    batch: int
    rows: int
    columns: int
    operands: list[Tokens]

    def block(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of a tile of ``tokens`` tokens: near square where operands are laid out differently."""
        if self.rows == 1:
            return 1, tokens
        rows = max(1, min(8, tokens // 8))
        return rows, tokens // rows

    def tiles(self, block: tuple[int, int]) -> int:
        """Number of tiles."""
        return self.batch * triton.cdiv(self.rows, block[0]) * triton.cdiv(self.columns, block[1])


def layout(sizes: Sequence[int], operands: Sequence[Tokens]) -> Layout:
    """Rows and columns merged into one line where all operands allow it, in either order.

    Parameters
    ----------
    sizes : sequence of int
        B, I and J.
    operands : sequence of Tokens
        Those without a pointer allow everything.
    """
    batch, rows, columns = sizes
    present = [x for x in operands if x.pointer is not None]
    if rows == 1 or all(x.i == columns * x.j for x in present):
        return Layout(batch, 1, rows * columns, [Tokens(x.pointer, x.b, 0, x.j) for x in operands])
    if columns == 1 or all(x.j == rows * x.i for x in present):
        return Layout(batch, 1, rows * columns, [Tokens(x.pointer, x.b, 0, x.i) for x in operands])
    return Layout(batch, rows, columns, list(operands))


def tokens(x: Tensor | None) -> Tokens:
    """Operand of ``[B, I, J, C]``, None without a tensor."""
    return Tokens(None) if x is None else Tokens(x, *x.stride()[:3])


def as_pairs(x: Tensor) -> Tensor:
    """View of ``[..., C]`` as ``[B, I, J, C]``; a copy if more than three leading dimensions cannot be merged."""
    if x.ndim > 4:
        return x.flatten(0, x.ndim - 4)
    return x[(None,) * (4 - x.ndim)]


@triton.jit
def locate(i_tile, rows, columns, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Batch, row and column of the tokens of a tile, and which of them exist; columns run fastest."""
    tiles_j = tl.cdiv(columns, BLOCK_J)
    tiles_i = tl.cdiv(rows, BLOCK_I)
    o_t = tl.arange(0, BLOCK_I * BLOCK_J)
    o_i = (i_tile // tiles_j) % tiles_i * BLOCK_I + o_t // BLOCK_J
    o_j = i_tile % tiles_j * BLOCK_J + o_t % BLOCK_J
    return i_tile // tiles_j // tiles_i, o_i, o_j, (o_i < rows) & (o_j < columns)


@triton.jit
def token_offsets(x, i_b, o_i, o_j):
    """Offsets of tokens, in 64 bits because a pair representation may hold more than 2^31 entries."""
    return tl.cast(i_b, tl.int64) * x.b + o_i.to(tl.int64) * x.i + o_j.to(tl.int64) * x.j  # [T]


@triton.jit
def load_tokens(x, i_b, o_i, o_j, m_t, o_c, C: tl.constexpr):
    """Channels of tokens, zero where there are none, in the dtype of memory."""
    p_x = x.pointer + token_offsets(x, i_b, o_i, o_j)[:, None] + o_c[None, :]
    return tl.load(p_x, mask=m_t[:, None] & (o_c < C)[None, :], other=0.0)  # [T, BLOCK_C]


@triton.jit
def store_tokens(x, b_x, i_b, o_i, o_j, m_t, o_c, C: tl.constexpr):
    """Write channels of tokens, in the dtype of memory."""
    p_x = x.pointer + token_offsets(x, i_b, o_i, o_j)[:, None] + o_c[None, :]
    tl.store(p_x, b_x.to(x.pointer.dtype.element_ty), mask=m_t[:, None] & (o_c < C)[None, :])
