"""What the forward and the backward kernels share: operands, tokens in memory, gate."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pairformer_fast.kernels.launching import processors

ALIGNMENT = 16
"""Bytes to which the hardware that copies tiles wants addresses aligned."""


class Tokens(NamedTuple):
    """Pointer and strides of a tensor ``[B, I, J]`` or ``[B, I, J, C]`` with contiguous channels."""

    pointer: Tensor | None
    b: int = 0
    i: int = 0
    j: int = 0


class Tiles(NamedTuple):
    """How a kernel cuts its work: tokens and hidden channels of a tile, warps, depth of the pipeline.

    ``resident`` programs share a multiprocessor.
    """

    block_t: int
    block_h: int
    warps: int
    stages: int
    resident: int

    def options(self) -> dict[str, int]:
        """Arguments of a launch."""
        blocks = {"BLOCK_T": self.block_t, "BLOCK_H": self.block_h}
        return blocks | {"num_warps": self.warps, "num_stages": self.stages}


def with_rows(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """``x`` and others of its tokens with dimensions ``[B, I, J]``; where ``x`` is ``[B, N, C]``, I is 1."""
    every = x, *others
    return every if x.ndim == 4 else tuple(None if one is None else one[:, None] for one in every)


def tokens(x: Tensor | None) -> Tokens:
    """Operand of a tensor with dimensions ``[B, I, J]`` before the channels."""
    return Tokens(None) if x is None else Tokens(x, *x.stride()[:3])


def approximate(compute: torch.dtype) -> bool:
    """Whether the tanh of the hardware, 11 bits, is exact enough for the gate: that of bf16 has 8."""
    return compute == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None


def descriptor(x: Tensor, compute: torch.dtype, block: list[int]) -> TensorDescriptor:
    """Matrix in the dtype of the products, read by tiles, with zeros beyond its ends."""
    x = x.detach().to(compute).contiguous()
    return TensorDescriptor.from_tensor(x.clone() if x.data_ptr() % ALIGNMENT else x, block)


def programs(x: Tensor, count: int, tiles: Tiles) -> int:
    """How many programs share the tiles of ``count`` tokens: those that run at once."""
    return min(triton.cdiv(count, tiles.block_t), processors(x.device) * tiles.resident)


@triton.jit
def token_pointers(x, o_t, ROWS, COLUMNS):
    """Pointers to tokens numbered in the order of ``[B, I, J]``, whatever the strides."""
    o_bi = o_t // COLUMNS
    i_b, i_i, i_j = (o_bi // ROWS).to(tl.int64), (o_bi % ROWS).to(tl.int64), (o_t % COLUMNS).to(tl.int64)
    return x.pointer + i_b * x.b + i_i * x.i + i_j * x.j


@triton.jit
def load_rows(x, o_t, o_c, TOKENS, ROWS, COLUMNS, C: tl.constexpr):
    """Tile ``[T, BLOCK_C]`` of fp32, zero beyond the ends."""
    inside = (o_t < TOKENS)[:, None] & (o_c < C)[None, :]
    return tl.load(token_pointers(x, o_t, ROWS, COLUMNS)[:, None] + o_c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, b_x, o_t, o_c, TOKENS, ROWS, COLUMNS, C: tl.constexpr):
    """Store a tile ``[T, BLOCK_C]`` but for what lies beyond the ends."""
    inside = (o_t < TOKENS)[:, None] & (o_c < C)[None, :]
    pointers = token_pointers(x, o_t, ROWS, COLUMNS)[:, None] + o_c[None, :]
    tl.store(pointers, b_x.to(x.pointer.dtype.element_ty), mask=inside)


@triton.jit
def keep_masked(b_x, mask, o_t, TOKENS, ROWS, COLUMNS):
    """Zero in rows of tokens that the mask leaves out."""
    if mask.pointer is not None:
        b_keep = tl.load(token_pointers(mask, o_t, ROWS, COLUMNS), mask=o_t < TOKENS, other=0)
        b_x = tl.where((b_keep != 0)[:, None], b_x, 0.0)
    return b_x


@triton.jit
def half_tanh(x):
    """``tanh(x / 2) / 2`` by one instruction of the special function unit, where a sigmoid takes two."""
    return 0.5 * tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def sigmoid(x, APPROXIMATE: tl.constexpr):
    """``1 / (1 + exp(-x))``."""
    return 0.5 + half_tanh(x) if APPROXIMATE else tl.sigmoid(x)
