"""What the kernels of both passes share: how work is cut, and tokens and weights on chip."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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


def padded(width: int) -> int:
    """Smallest width that ``tl.dot`` takes."""
    return max(16, triton.next_power_of_2(width))


def precision(dtype: torch.dtype) -> str:
    """Products of fp32 are exact unless PyTorch's own switch allows TF32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def on_device(x: Tensor) -> AbstractContextManager:
    """Make the device of ``x`` current, where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def programs_of(tiles: Tiles, blocks: int, device: torch.device) -> int:
    """Programs that share ``blocks`` tiles of tokens."""
    if not tiles.programs:
        return blocks
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return min(blocks, tiles.programs * processors)


@triton.jit
def locate_tokens(start, ROWS, N, P, BLOCK_T: tl.constexpr):
    """Place of consecutive tokens in a plane, their rows and columns, and whether they are tokens at all."""
    o_t = start + tl.arange(0, BLOCK_T)  # [T]
    o_i = o_t // P
    o_j = o_t - o_i * P
    return o_t, o_i.to(tl.int64), o_j.to(tl.int64), (o_i < ROWS) & (o_j < N)


@triton.jit
def load_weight(weight, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows from ``start`` of a contiguous ``[ROWS, COLUMNS]``, zero beyond."""
    o_r = start + tl.arange(0, BLOCK_R)[:, None]
    o_k = tl.arange(0, BLOCK_K)[None, :]
    return tl.load(weight + o_r * COLUMNS + o_k, mask=(o_r < ROWS) & (o_k < COLUMNS), other=0.0)  # [R, K]
