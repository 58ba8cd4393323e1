"""What the Hopper kernels share: warp-specialised pipelines, tensor-core helpers, descriptors of the copy engine.

A kernel is persistent. One warp, the producer, copies tiles to shared memory; every other group of four warps is a
consumer that owns 64 queries or keys. Scores are in units of log2, ``s = q k^T (log2(e) / sqrt(D)) + bias log2(e)``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pairformer_fast.kernels.flash_bias import hopper_tiles
from pairformer_fast.kernels.flash_bias.hopper_tiles import Widths
from pairformer_fast.kernels.flash_bias.terms import TILE, BiasTerms

copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""Start the copy of one tile to shared memory; Triton 3.8 gave it another name."""

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

NO_BIAS = gl.constexpr(0)
FACTORS = gl.constexpr(1)
DENSE = gl.constexpr(2)
MIXED = gl.constexpr(3)

OWN = gl.constexpr(hopper_tiles.OWN)

FLAG_TILE = gl.constexpr(TILE)

REGISTERS = {2: 240, 3: 160, 4: 112}
"""Registers of a thread by the number of consumers; the producer gets 24."""


@gluon.jit
def multiply(a, b, N: gl.constexpr, layout: gl.constexpr):
    """Start ``a @ b.T`` of a tile ``[64, K]`` and a tile ``[N, K]`` in shared memory."""
    zero = gl.zeros([OWN, N], gl.float32, layout=layout)
    return warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def append(values, value):
    """Tuple with one value more."""
    return values + (value,)


@gluon.jit
def replace(values, index: gl.constexpr, value):
    """Tuple with one value exchanged."""
    out = ()
    for j in gl.static_range(len(values)):
        if j == index:
            out = append(out, value)
        else:
            out = append(out, values[j])
    return out


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """Next place in a ring of buffers; the phase flips with every round."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def init_barriers(full, empty, COUNT: gl.constexpr, WRITES: gl.constexpr, READS: gl.constexpr):
    """Two barriers for each place of a ring: all writes announced and landed, all reads done."""
    for s in gl.static_range(COUNT):
        mbarrier.init(full.index(s), count=WRITES)
        mbarrier.init(empty.index(s), count=READS)


@gluon.jit
def flag_at(flags, b, h, H, x, y, X, Y, BIAS: gl.constexpr):
    """Whether the 64 x 64 tile at (x, y) takes the dense bias; ``flags`` are contiguous ``[B, H, X, Y]`` bytes."""
    flag = 1
    if BIAS == MIXED:
        flag = gl.load(flags + ((b * H + h) * X + x) * Y + y, mask=(x < X) & (y < Y), other=0).to(gl.int32)
    return flag


@gluon.jit
def no_keys(GROUP: gl.constexpr):
    """No row has met a key yet."""
    out = ()
    for _ in gl.static_range(GROUP):
        out = append(out, gl.to_tensor(0))
    return out


@gluon.jit
def either(some, others, GROUP: gl.constexpr):
    """Row by row, whether a key was met here or there."""
    out = ()
    for g in gl.static_range(GROUP):
        out = append(out, some[g] | others[g])
    return out


@gluon.jit
def load_states(states, b, group, rows, block, GROUP: gl.constexpr, MASKED: gl.constexpr):
    """For each row of the group, whether none (0), some (1) or all (2) of 64 keys are kept."""
    out = ()
    for g in gl.static_range(GROUP):
        state = gl.to_tensor(2)
        if MASKED:
            i = gl.minimum(group * GROUP + g, rows - 1)
            state = gl.load(states[0] + (b * rows + i) * states[1] + block).to(gl.int32)
        out = append(out, state)
    return out


@gluon.jit
def drop_keys(tile, state, mask, b, i, start, keys, BLOCK: gl.constexpr, MASKED: gl.constexpr, TAIL: gl.constexpr):
    """Zero in the columns of a tile whose key is dropped or does not exist."""
    layout: gl.constexpr = gl.SliceLayout(0, tile.type.layout)
    if MASKED:
        if state != 2:
            columns = start + gl.arange(0, BLOCK, layout=layout)
            p_mask = mask[0] + b.to(gl.int64) * mask[1] + i.to(gl.int64) * mask[2]
            keep = gl.load(p_mask + columns, mask=columns < keys, other=0)
            tile = gl.where((keep != 0)[None, :], tile, 0.0)
    elif TAIL:
        if start + BLOCK > keys:
            columns = start + gl.arange(0, BLOCK, layout=layout)
            tile = gl.where((columns < keys)[None, :], tile, 0.0)
    return tile


@gluon.jit
def take_dense(b_bias, wanted, dense_buf, slot, N: gl.constexpr, BIAS: gl.constexpr):
    """The bias of one consumer's tile in units of log2: dense where it is wanted, ``b_bias`` elsewhere.

    Selected, not branched: ptxas 12.8 takes an address in shared memory that was made in a branch as known after it,
    for the tensor cores' next operands too. What an unwanted tile reads is never used.
    """
    if BIAS == DENSE or BIAS == MIXED:
        b_dense = dense_buf.index(slot).reshape([OWN, N]).load(b_bias.type.layout).to(gl.float32) * LOG2E
        b_bias = gl.where(wanted != 0, b_dense, b_bias) if BIAS == MIXED else b_dense
    return b_bias


@gluon.jit
def store_rows(pointer, stride, value, first, length, width):
    """Write 64 rows from ``first`` on, straight from the accumulator's layout.

    Wider stores would need a conversion through shared memory.
    """
    layout: gl.constexpr = value.type.layout
    rows = first + gl.arange(0, OWN, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, value.shape[1], layout=gl.SliceLayout(0, layout))
    kept = (rows < length)[:, None] & (columns < width)[None, :]
    p_rows = pointer + rows.to(gl.int64)[:, None] * stride + columns[None, :]
    gl.store(p_rows, value.to(pointer.dtype.element_ty), mask=kept)


@gluon.jit
def copy_tokens(desc, b, i, n, h, barrier, buffer):
    """Start the copy of one tile of ``[B, I, N, H, D]``."""
    copy_tile(desc, [b, i, n, h, 0], barrier, buffer)


@cache
def shared_layout(block: tuple[int, ...]) -> gl.NVMMASharedLayout:
    """Layout of a bf16 tile that both the copy engine and the tensor cores read."""
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)


@cache
def vector_layout() -> gl.NVMMASharedLayout:
    """Layout of a piece of an fp32 vector."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=4)


def token_descriptor(x: Tensor, length: int) -> TensorDescriptor:
    """Tiles of ``length`` tokens of one row and head of ``[B, I, N, H, D]``."""
    block = (1, 1, length, 1, padded(x.shape[-1]))
    return _descriptor(x, block, shared_layout(block))


def matrix_descriptor(x: Tensor, height: int, width: int) -> TensorDescriptor:
    """Tiles ``[height, width]`` of one head of ``[B, H, X, Y]``."""
    block = (1, 1, height, width)
    return _descriptor(x, block, shared_layout(block))


def vector_descriptor(x: Tensor, length: int) -> TensorDescriptor:
    """Pieces of ``[B, I, H, N]`` in fp32."""
    return _descriptor(x, (1, 1, 1, length), vector_layout())


def _descriptor(x: Tensor, block: tuple[int, ...], layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    """Descriptor without the checks of its constructor, which cost more than the rest of a launch."""
    # A dimension of one entry may have any stride; the copy engine wants multiples of 16 bytes.
    strides = [64 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    strides[-1] = 1
    desc = object.__new__(TensorDescriptor)
    desc.base, desc.shape, desc.strides, desc.block_shape = x, list(x.shape), strides, list(block)
    desc.layout, desc.padding = layout, "zero"
    return desc


def widths(terms: BiasTerms, q: Tensor) -> Widths:
    """Padded widths of a problem's tiles."""
    rank = 0 if terms.phi_q is None else padded(terms.phi_q.shape[-1])
    return Widths(padded(q.shape[-1]), rank, terms.dense is not None)


def ceil_div(items: int, size: int) -> int:
    """Pieces of ``size`` that hold all items. Triton's own is slow outside kernels."""
    return -(-items // size)


def padded(width: int) -> int:
    """Smallest width of a tile that the tensor cores take."""
    return max(16, 1 << (width - 1).bit_length())


def copyable(x: Tensor) -> bool:
    """Whether the copy engine can read a bf16 tensor as it lies."""
    *sizes, width = x.shape
    *strides, last = x.stride()
    if x.data_ptr() % 16 or (last != 1 and width != 1):
        return False
    return all(size == 1 or (stride > 0 and stride % 8 == 0) for size, stride in zip(sizes, strides, strict=True))


def readable(x: Tensor) -> Tensor:
    """The tensor, or a copy with padded rows where the copy engine cannot read it as it lies."""
    if copyable(x):
        return x
    width = x.shape[-1]
    out = torch.empty(*x.shape[:-1], width + -width % 8, dtype=x.dtype, device=x.device)[..., :width]
    return out.copy_(x)


class BiasOperands(NamedTuple):
    """Bias as the kernels take it: descriptors, and flags of the dense tiles with their shape.

    Descriptors and flags that the form of the bias does not need are stand-ins that nothing reads.
    """

    kind: int
    own: TensorDescriptor
    streamed: TensorDescriptor
    dense: TensorDescriptor
    flags: Tensor
    flag_shape: tuple[int, int]
    width: int


def bias_operands(
    terms: BiasTerms, stand_in: TensorDescriptor, block: int, *, transposed: bool = False
) -> BiasOperands:
    """Operands for consumers that own 64 queries, or keys if ``transposed``, and stream ``block`` of the other."""
    phi_own, phi_streamed, dense, flags = terms.phi_q, terms.phi_k, terms.dense, terms.dense_tiles
    if transposed:
        phi_own, phi_streamed = phi_streamed, phi_own
        dense, flags = (None if x is None else x.mT.contiguous() for x in (dense, flags))
    own = streamed = table = stand_in
    width = 16
    if phi_own is not None and phi_streamed is not None:
        width = padded(phi_own.shape[-1])
        own = matrix_descriptor(readable(phi_own), OWN.value, width)
        streamed = matrix_descriptor(readable(phi_streamed), block, width)
    if dense is not None:
        table = matrix_descriptor(readable(dense), OWN.value, block)
    flag_bytes = stand_in.base if flags is None else flags.contiguous().view(torch.uint8)
    shape = (0, 0) if flags is None else (flags.shape[2], flags.shape[3])
    return BiasOperands(_bias_kind(terms), own, streamed, table, flag_bytes, shape, width)


def _bias_kind(terms: BiasTerms) -> int:
    if terms.phi_q is None:
        return NO_BIAS.value if terms.dense is None else DENSE.value
    return FACTORS.value if terms.dense_tiles is None else MIXED.value


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _states_kernel(mask, stride_b, stride_i, states, rows, keys, blocks, BLOCKS: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    o_n = block[:, None] * TILE + tl.arange(0, TILE)[None, :]
    p_mask = mask + tl.cast(row // rows, tl.int64) * stride_b + tl.cast(row % rows, tl.int64) * stride_i
    b_keep = tl.load(p_mask + o_n, mask=o_n < keys, other=0) != 0  # [BLOCKS, TILE]
    kept = tl.sum(b_keep.to(tl.int32), 1)
    state = tl.where(kept == 0, 0, tl.where(kept == TILE, 2, 1))
    tl.store(states + row * blocks + block, state.to(tl.uint8), mask=block < blocks)


def mask_operands(mask: Tensor | None, stand_in: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Bytes and strides of ``[B, I, M]``, and for every 64 keys of a row whether none, some or all are kept."""
    if mask is None:
        return (stand_in, 0, 0), (stand_in, 0)
    if mask.stride(-1) != 1:
        mask = mask.contiguous()
    batch, rows, keys = mask.shape
    blocks = ceil_div(keys, TILE)
    states = torch.empty(batch * rows, blocks, dtype=torch.uint8, device=mask.device)
    operand = mask.view(torch.uint8), mask.stride(0), mask.stride(1)
    _states_kernel[(batch * rows, ceil_div(blocks, 16))](*operand, states, rows, keys, blocks, BLOCKS=16, TILE=TILE)
    return operand, (states, blocks)
