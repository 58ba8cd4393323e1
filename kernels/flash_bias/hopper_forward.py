"""Forward pass for Hopper GPUs in Gluon: persistent, warp-specialised, without a running maximum.

Weights are ``exp2(s)`` as they stand: bf16 and fp32 have the exponents for every score between -100 and 100, so neither
the maximum nor the rescaling of online softmax is needed. A query whose sum leaves that range (or is not a number) gets
NaN for its log-sum-exp, and ``triton_redo`` computes exactly those queries again with a running maximum.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="misc, assignment"

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pairformer_fast.kernels.flash_bias.hopper_common import (
    DENSE,
    FACTORS,
    FLAG_TILE,
    LN2,
    LOG2E,
    MIXED,
    OWN,
    REGISTERS,
    advance,
    append,
    bias_operands,
    ceil_div,
    copy_tile,
    copy_tokens,
    drop_keys,
    either,
    flag_at,
    init_barriers,
    load_states,
    mask_operands,
    multiply,
    no_keys,
    padded,
    processors,
    replace,
    store_rows,
    take_dense,
    token_descriptor,
    widths,
)
from pairformer_fast.kernels.flash_bias.hopper_tiles import HopperTiles, choose
from pairformer_fast.kernels.flash_bias.terms import BiasTerms

SMALLEST_SUM = gl.constexpr(2.0**-100)
LARGEST_SUM = gl.constexpr(2.0**100)


@gluon.constexpr_function
def query_places(consumers, block, block_d):
    """Places for queries in shared memory: 1 where registers hold them, 2 where they stay in shared memory.

    Four consumers have too few registers. And where weights and queries have one layout as operands, machine code was
    found in which weights take the registers of the queries (ptxas 12.8 and 13.0).
    """
    return 2 if consumers == 4 or block == block_d else 1


@gluon.jit
def locate(work, blocks, H, groups):
    """Batch entry, first row, head and query block; blocks of one row and head are neighbours and share its keys."""
    rest = work // blocks
    return rest // H // groups, rest // H % groups, rest % H, work % blocks


@gluon.jit
def producer(
    copied,
    CONSUMERS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BIAS: gl.constexpr,
):
    """Copy queries once for each work item, and keys, values and bias for each of its key blocks."""
    PLACES: gl.constexpr = query_places(CONSUMERS, BLOCK, BLOCK_D)
    descs, buffers, flags, sizes = copied
    q_desc, k_desc, v_desc, phi_q_desc, phi_k_desc, dense_desc = descs
    q_buf, phi_q_buf, k_buf, v_buf, phi_k_buf, dense_buf, q_full, q_empty, full, empty = buffers
    total, blocks, H, groups, key_blocks, flag_rows, flag_columns = sizes
    stage, phase, place, q_phase = 0, 1, 0, 1
    for work in range(gl.program_id(0), total, gl.num_programs(0)):
        b, group, h, block = locate(work, blocks, H, groups)
        for c in gl.static_range(CONSUMERS):
            first = (block * CONSUMERS + c) * OWN
            slot = place * CONSUMERS + c
            ready = q_full.index(slot)
            mbarrier.wait(q_empty.index(slot), q_phase)
            if BIAS == FACTORS or BIAS == MIXED:
                mbarrier.expect(ready, GROUP * q_desc.block_type.nbytes + phi_q_desc.block_type.nbytes)
                copy_tile(phi_q_desc, [b, h, first, 0], ready, phi_q_buf.index(slot))
            else:
                mbarrier.expect(ready, GROUP * q_desc.block_type.nbytes)
            for g in gl.static_range(GROUP):
                copy_tokens(q_desc, b, group * GROUP + g, first, h, ready, q_buf.index(slot * GROUP + g))
        place, q_phase = advance(place, q_phase, PLACES)
        for n in range(key_blocks):
            start = n * BLOCK
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            if BIAS == FACTORS or BIAS == MIXED:
                mbarrier.expect(ready, 2 * GROUP * k_desc.block_type.nbytes + phi_k_desc.block_type.nbytes)
                copy_tile(phi_k_desc, [b, h, start, 0], ready, phi_k_buf.index(stage))
            else:
                mbarrier.expect(ready, 2 * GROUP * k_desc.block_type.nbytes)
            for g in gl.static_range(GROUP):
                copy_tokens(k_desc, b, group * GROUP + g, start, h, ready, k_buf.index(stage * GROUP + g))
                copy_tokens(v_desc, b, group * GROUP + g, start, h, ready, v_buf.index(stage * GROUP + g))
            if BIAS == DENSE or BIAS == MIXED:
                for c in gl.static_range(CONSUMERS):
                    x = block * CONSUMERS + c
                    wanted = flag_at(flags, b, h, H, x, start // FLAG_TILE, flag_rows, flag_columns, BIAS)
                    mbarrier.arrive(ready, count=1, pred=wanted == 0)
                    mbarrier.expect(ready, dense_desc.block_type.nbytes, pred=wanted != 0)
                    copy_tile(
                        dense_desc, [b, h, x * OWN, start], ready, dense_buf.index(stage * CONSUMERS + c), wanted != 0
                    )
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def by_lane(p, BLOCK: gl.constexpr):
    """Sum of each thread's own weights of a row, ``[64, 8]``: lanes are added once, after the last key."""
    return gl.sum(p.reshape([OWN, BLOCK // 8, 8]), 1)


@gluon.jit
def consumer(
    c: gl.constexpr,
    shared,
    CONSUMERS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_R: gl.constexpr,
    BIAS: gl.constexpr,
    MASKED: gl.constexpr,
    TAIL: gl.constexpr,
    GATED: gl.constexpr,
):
    """Attention of 64 queries of ``GROUP`` rows: each tile of the bias is made once and used for all of them."""
    PLACES: gl.constexpr = query_places(CONSUMERS, BLOCK, BLOCK_D)
    buffers, flags, mask, states, gate, out, lse, sizes, lengths, scale = shared
    q_buf, phi_q_buf, k_buf, v_buf, phi_k_buf, dense_buf, q_full, q_empty, full, empty = buffers
    total, blocks, H, groups, key_blocks, flag_rows, flag_columns = sizes
    rows, queries, keys = lengths
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    weights_operand: gl.constexpr = gl.DotOperandLayout(0, outputs, 2)
    own_operand: gl.constexpr = gl.DotOperandLayout(0, scores, 2)
    zero = gl.zeros([OWN, BLOCK], gl.float32, layout=scores)
    stage, phase, place, q_phase = 0, 0, 0, 0
    for work in range(gl.program_id(0), total, gl.num_programs(0)):
        b, group, h, block = locate(work, blocks, H, groups)
        first = (block * CONSUMERS + c) * OWN
        slot = place * CONSUMERS + c
        mbarrier.wait(q_full.index(slot), q_phase)
        q, acc, sums = (), (), ()
        for g in gl.static_range(GROUP):
            b_q = q_buf.index(slot * GROUP + g).reshape([OWN, BLOCK_D])
            q = append(q, b_q.load(own_operand) if PLACES == 1 else b_q)
            acc = append(acc, gl.zeros([OWN, BLOCK_D], gl.float32, layout=outputs))
            sums = append(sums, by_lane(zero, BLOCK))
        phi_q = q[0]
        if BIAS == FACTORS or BIAS == MIXED:
            b_phi_q = phi_q_buf.index(slot).reshape([OWN, BLOCK_R])
            phi_q = b_phi_q.load(own_operand) if PLACES == 1 else b_phi_q
        seen = no_keys(GROUP)

        for n in range(key_blocks):
            kept = load_states(states, b, group, rows, n * BLOCK // FLAG_TILE, GROUP, MASKED)
            seen = either(seen, kept, GROUP)
            wanted = flag_at(
                flags, b, h, H, block * CONSUMERS + c, n * BLOCK // FLAG_TILE, flag_rows, flag_columns, BIAS
            )
            mbarrier.wait(full.index(stage), phase)
            b_bias = zero
            pending = multiply(q[0], k_buf.index(stage * GROUP).reshape([BLOCK, BLOCK_D]), BLOCK, scores)
            if BIAS == FACTORS or BIAS == MIXED:
                low_rank = multiply(phi_q, phi_k_buf.index(stage).reshape([BLOCK, BLOCK_R]), BLOCK, scores)
                s, b_bias = warpgroup_mma_wait(0, deps=(pending, low_rank))
                b_bias *= LOG2E
            else:
                s = warpgroup_mma_wait(0, deps=(pending,))
            b_bias = take_dense(b_bias, wanted, dense_buf, stage * CONSUMERS + c, BLOCK, BIAS)
            for g in gl.static_range(GROUP):
                p = gl.exp2(gl.fma(s, gl.full_like(s, 0.0) + scale, b_bias))  # [64, BLOCK]
                i = gl.minimum(group * GROUP + g, rows - 1)
                p = drop_keys(p, kept[g], mask, b, i, n * BLOCK, keys, BLOCK, MASKED, TAIL)
                sums = replace(sums, g, sums[g] + by_lane(p, BLOCK))
                b_p = gl.convert_layout(p.to(gl.bfloat16), weights_operand)
                if g + 1 < GROUP:
                    b_k = k_buf.index(stage * GROUP + g + 1).reshape([BLOCK, BLOCK_D])
                    pending = multiply(q[g + 1], b_k, BLOCK, scores)
                b_v = v_buf.index(stage * GROUP + g).reshape([BLOCK, BLOCK_D])
                acc = replace(acc, g, warpgroup_mma(b_p, b_v, acc[g], is_async=True))
                if g + 1 < GROUP:
                    s = warpgroup_mma_wait(1, deps=(pending,))
            if GROUP == 1:
                acc = (warpgroup_mma_wait(0, deps=acc),)
            else:
                acc = warpgroup_mma_wait(0, deps=acc)
            mbarrier.arrive(empty.index(stage), count=1)
            if PLACES == 1:
                # Once products have read the registers: before that the loads may still be under way.
                mbarrier.arrive(q_empty.index(slot), count=1, pred=n == 0)
            stage, phase = advance(stage, phase, STAGES)

        if PLACES > 1:
            mbarrier.arrive(q_empty.index(slot), count=1)
        place, q_phase = advance(place, q_phase, PLACES)
        for g in gl.static_range(GROUP):
            i = group * GROUP + g
            if i < rows:
                targets, where = (gate, out, lse), (b, i, h, first)
                write_row(acc[g], sums[g], seen[g], targets, where, (H, rows, queries), D, MASKED, GATED)


@gluon.jit
def write_row(acc, sums, seen, targets, where, sizes, D: gl.constexpr, MASKED: gl.constexpr, GATED: gl.constexpr):
    """Normalise, gate and store the output of 64 queries of one row, and their log-sum-exp."""
    gate, out, lse = targets
    b, i, h, first = where
    H, rows, queries = sizes
    outputs: gl.constexpr = acc.type.layout
    BLOCK_D: gl.constexpr = acc.shape[1]
    total = gl.convert_layout(gl.sum(sums, 1), gl.SliceLayout(1, outputs))
    index = first + gl.arange(0, OWN, layout=gl.SliceLayout(1, outputs))
    b_lse = gl.where((total > SMALLEST_SUM) & (total < LARGEST_SUM), gl.log2(total) * LN2, float("nan"))
    if MASKED:
        b_lse = gl.where(seen == 0, float("-inf"), b_lse)
    row = (b.to(gl.int64) * rows + i) * H + h
    gl.store(lse + row * queries + index, b_lse, mask=index < queries)
    value = acc * gl.where(total > 0, 1.0 / total, 0.0)[:, None]
    if GATED:
        columns = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, outputs))
        p_gate = gate[0] + b.to(gl.int64) * gate[1] + i.to(gl.int64) * gate[2] + h.to(gl.int64) * gate[4]
        p_gate += index.to(gl.int64)[:, None] * gate[3] + columns[None, :] * gate[5]
        b_gate = gl.load(p_gate, mask=(index < queries)[:, None] & (columns < D)[None, :], other=0.0)
        value = value / (1.0 + gl.exp2(-b_gate.to(gl.float32) * LOG2E))
    p_out = out + (b.to(gl.int64) * rows + i) * queries * H * D + h * D
    store_rows(p_out, H * D, value, first, queries, D)


@gluon.jit
def forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    phi_q_desc,
    phi_k_desc,
    dense_desc,
    flags,
    mask,
    states,
    gate,
    out,
    lse,
    sizes,
    lengths,
    scale,
    CONSUMERS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_R: gl.constexpr,
    BIAS: gl.constexpr,
    MASKED: gl.constexpr,
    TAIL: gl.constexpr,
    GATED: gl.constexpr,
    REGISTERS_EACH: gl.constexpr,
):
    """Start one producer and the consumers, which share the keys and values of ``GROUP`` rows."""
    PLACES: gl.constexpr = query_places(CONSUMERS, BLOCK, BLOCK_D)
    LOW_RANK: gl.constexpr = BIAS == FACTORS or BIAS == MIXED
    TABLE: gl.constexpr = BIAS == DENSE or BIAS == MIXED
    bf16: gl.constexpr = gl.bfloat16
    q_buf = gl.allocate_shared_memory(bf16, [PLACES * CONSUMERS * GROUP] + q_desc.block_type.shape, q_desc.layout)
    k_buf = gl.allocate_shared_memory(bf16, [STAGES * GROUP] + k_desc.block_type.shape, k_desc.layout)
    v_buf = gl.allocate_shared_memory(bf16, [STAGES * GROUP] + v_desc.block_type.shape, v_desc.layout)
    phi_q_buf, phi_k_buf, dense_buf = q_buf, k_buf, k_buf
    if LOW_RANK:
        phi_q_buf = gl.allocate_shared_memory(
            bf16, [PLACES * CONSUMERS] + phi_q_desc.block_type.shape, phi_q_desc.layout
        )
        phi_k_buf = gl.allocate_shared_memory(bf16, [STAGES] + phi_k_desc.block_type.shape, phi_k_desc.layout)
    if TABLE:
        dense_buf = gl.allocate_shared_memory(
            bf16, [STAGES * CONSUMERS] + dense_desc.block_type.shape, dense_desc.layout
        )
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [PLACES * CONSUMERS, 1], barriers)
    q_empty = gl.allocate_shared_memory(gl.int64, [PLACES * CONSUMERS, 1], barriers)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    init_barriers(q_full, q_empty, PLACES * CONSUMERS, 1, 1)
    init_barriers(full, empty, STAGES, 1 + CONSUMERS if TABLE else 1, CONSUMERS)
    fence_async_shared()

    descs = (q_desc, k_desc, v_desc, phi_q_desc, phi_k_desc, dense_desc)
    buffers = (q_buf, phi_q_buf, k_buf, v_buf, phi_k_buf, dense_buf, q_full, q_empty, full, empty)
    copied = (descs, buffers, flags, sizes)
    shared = (buffers, flags, mask, states, gate, out, lse, sizes, lengths, scale)
    EACH: gl.constexpr = REGISTERS_EACH
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    consumer,
                    (0, shared, CONSUMERS, GROUP, BLOCK, STAGES, D, BLOCK_D, BLOCK_R, BIAS, MASKED, TAIL, GATED),
                ),
                (
                    consumer,
                    (1, shared, CONSUMERS, GROUP, BLOCK, STAGES, D, BLOCK_D, BLOCK_R, BIAS, MASKED, TAIL, GATED),
                ),
                (producer, (copied, CONSUMERS, GROUP, BLOCK, STAGES, BLOCK_D, BIAS)),
            ],
            [4, 1],
            [EACH, 24],
        )
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (
                    consumer,
                    (0, shared, CONSUMERS, GROUP, BLOCK, STAGES, D, BLOCK_D, BLOCK_R, BIAS, MASKED, TAIL, GATED),
                ),
                (
                    consumer,
                    (1, shared, CONSUMERS, GROUP, BLOCK, STAGES, D, BLOCK_D, BLOCK_R, BIAS, MASKED, TAIL, GATED),
                ),
                (
                    consumer,
                    (2, shared, CONSUMERS, GROUP, BLOCK, STAGES, D, BLOCK_D, BLOCK_R, BIAS, MASKED, TAIL, GATED),
                ),
                (producer, (copied, CONSUMERS, GROUP, BLOCK, STAGES, BLOCK_D, BIAS)),
            ],
            [4, 4, 1],
            [EACH, EACH, 24],
        )
    if CONSUMERS == 4:
        gl.warp_specialize(
            [
                (
                    consumer,
                    (0, shared, CONSUMERS, GROUP, BLOCK, STAGES, D, BLOCK_D, BLOCK_R, BIAS, MASKED, TAIL, GATED),
                ),
                (
                    consumer,
                    (1, shared, CONSUMERS, GROUP, BLOCK, STAGES, D, BLOCK_D, BLOCK_R, BIAS, MASKED, TAIL, GATED),
                ),
                (
                    consumer,
                    (2, shared, CONSUMERS, GROUP, BLOCK, STAGES, D, BLOCK_D, BLOCK_R, BIAS, MASKED, TAIL, GATED),
                ),
                (
                    consumer,
                    (3, shared, CONSUMERS, GROUP, BLOCK, STAGES, D, BLOCK_D, BLOCK_R, BIAS, MASKED, TAIL, GATED),
                ),
                (producer, (copied, CONSUMERS, GROUP, BLOCK, STAGES, BLOCK_D, BIAS)),
            ],
            [4, 4, 4, 1],
            [EACH, EACH, EACH, 24],
        )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: BiasTerms,
    mask: Tensor | None,
    gate: Tensor | None,
    *,
    tiles: HopperTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments in the triangle layout, as ``launch.hopper_takes`` asks for them.

    Parameters
    ----------
    q, k, v, gate : Tensor
        bf16 ``[B, I, N, H, D]`` (``M`` for ``N`` in k and v).
    terms : BiasTerms
        None, factors, dense or mixed; no table.
    mask : Tensor, optional
        Bool ``[B, I, M]``.
    tiles : HopperTiles, optional
        In place of those of the table.

    Returns
    -------
    tuple of Tensor
        Output like q, contiguous, and the log-sum-exp ``[B, I, H, N]`` in fp32, NaN where ``triton_redo`` has to do a
        query again.
    """
    batch, rows, queries, heads, dim = q.shape
    keys = k.shape[2]
    tiles = tiles or choose("forward", queries, rows, widths(terms, q))
    q_desc = token_descriptor(q, OWN.value)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, rows, heads, queries, dtype=torch.float32, device=q.device)
    blocks, groups = ceil_div(queries, tiles.consumers * OWN.value), ceil_div(rows, tiles.group)
    total = batch * groups * heads * blocks
    bias = bias_operands(terms, q_desc, tiles.block)
    with torch.cuda.device(q.device):
        forward_kernel[(min(total, processors(q.device)),)](
            q_desc,
            token_descriptor(k, tiles.block),
            token_descriptor(v, tiles.block),
            bias.own,
            bias.streamed,
            bias.dense,
            bias.flags,
            *mask_operands(mask, out),
            (out, 0, 0, 0, 0, 0) if gate is None else (gate, *gate.stride()),
            out,
            lse,
            (total, blocks, heads, groups, ceil_div(keys, tiles.block), *bias.flag_shape),
            (rows, queries, keys),
            dim**-0.5 * LOG2E.value,
            CONSUMERS=tiles.consumers,
            GROUP=tiles.group,
            BLOCK=tiles.block,
            STAGES=tiles.stages,
            D=dim,
            BLOCK_D=padded(dim),
            BLOCK_R=bias.width,
            BIAS=bias.kind,
            MASKED=mask is not None,
            TAIL=keys % tiles.block != 0,
            GATED=gate is not None,
            REGISTERS_EACH=REGISTERS[tiles.consumers],
            num_warps=4,
        )
    return out, lse
