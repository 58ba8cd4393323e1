"""What the kernels of both passes share: how work is cut, and tokens and weights on chip."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pairformer_fast.kernels.launching import processors

ALIGNMENT = 8
"""Elements: rows of 16-bit numbers then start at multiples of 16 bytes, which cuBLAS wants."""


class Tiles(NamedTuple):
    """How a kernel cuts its work.

    Attributes
    ----------
    tokens, channels : int
        Pairs of tokens and output channels at a time, powers of two >= 16.
    warps, stages : int
    programs : int
        Programs of one multiprocessor that go through many tiles with all weights on chip; 0 starts a program for every
        tile, and weights are read by each.
    """

    tokens: int
    channels: int
    warps: int
    stages: int
    programs: int = 0


def aligned(tokens: int) -> int:
    """``tokens`` rounded up to ``ALIGNMENT``."""
    return triton.cdiv(tokens, ALIGNMENT) * ALIGNMENT


def programs_of(tiles: Tiles, blocks: int, device: torch.device) -> int:
    """Programs that share ``blocks`` tiles of tokens."""
    if not tiles.programs:
        return blocks
    return min(blocks, tiles.programs * processors(device))


@triton.jit
def locate_tokens(start, ROWS, N, P, BLOCK_T: tl.constexpr):
    """Place of consecutive tokens in a plane, their rows and columns, and whether they are tokens at all."""
    o_t = start + tl.arange(0, BLOCK_T)  # [T]
    o_i = o_t // P
    o_j = o_t - o_i * P
    return o_t, o_i.to(tl.int64), o_j.to(tl.int64), (o_i < ROWS) & (o_j < N)


@triton.jit
def load_offset(offset, start, ROWS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Offsets from ``start`` on of a layer of ``ROWS`` outputs, in fp32, zero beyond."""
    o_r = start + tl.arange(0, BLOCK_R)
    return tl.load(offset + o_r, mask=o_r < ROWS, other=0.0).to(tl.float32)  # [R]


@triton.jit
def load_weight(weight, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows from ``start`` of a contiguous ``[ROWS, COLUMNS]``, zero beyond."""
    o_r = start + tl.arange(0, BLOCK_R)[:, None]
    o_k = tl.arange(0, BLOCK_K)[None, :]
    return tl.load(weight + o_r * COLUMNS + o_k, mask=(o_r < ROWS) & (o_k < COLUMNS), other=0.0)  # [R, K]
