"""Gradient of a dense pair bias for Hopper GPUs in Gluon: the sum over all rows i, held in registers.

A consumer owns one 64 x 64 tile of the gradient and streams the rows past it. No atomics: rows are split into chunks
only to fill the GPU, and the chunks are added in a fixed order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from pairformer_fast.kernels.flash_bias.hopper_common import (
    LOG2E,
    OWN,
    advance,
    copy_tile,
    copy_tokens,
    drop_keys,
    flag_at,
    init_barriers,
    load_states,
    multiply,
    store_rows,
)


@gluon.jit
def locate(work, blocks, H, chunks, key_blocks):
    """Batch entry, chunk of rows, head, query block and key block; work on one chunk of rows is in one place."""
    rest = work // blocks // key_blocks
    return rest // H // chunks, rest // H % chunks, rest % H, work % blocks, work // blocks % key_blocks


@gluon.jit
def any_dense(flags, b, h, H, block, n, X, Y, CONSUMERS: gl.constexpr, BIAS: gl.constexpr):
    """Whether any consumer's tile has a gradient."""
    found = gl.to_tensor(0)
    for c in gl.static_range(CONSUMERS):
        found |= flag_at(flags, b, h, H, block * CONSUMERS + c, n, X, Y, BIAS)
    return found


@gluon.jit
def last_row(i_chunk, chunk, rows, found):
    """End of the loop over rows: its beginning where no tile has a gradient.

    A branch around the loop would hold products of the tensor cores, whose addresses ptxas 12.8 was seen to lose there.
    """
    return gl.where(found != 0, gl.minimum((i_chunk + 1) * chunk, rows), i_chunk * chunk)


@gluon.jit
def producer(copied, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, BIAS: gl.constexpr):
    """Copy queries, keys, values and the output's gradient for each row."""
    descs, buffers, flags, sizes = copied
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc = descs
    q_buf, do_buf, k_buf, v_buf, lse_buf, delta_buf, full, empty = buffers
    total, blocks, key_blocks, H, chunks, chunk, rows, flag_rows, flag_columns = sizes
    row_bytes: gl.constexpr = 2 * k_desc.block_type.nbytes + 2 * CONSUMERS * (
        q_desc.block_type.nbytes + lse_desc.block_type.nbytes
    )
    stage, phase = 0, 1
    for work in range(gl.program_id(0), total, gl.num_programs(0)):
        b, i_chunk, h, block, n = locate(work, blocks, H, chunks, key_blocks)
        found = any_dense(flags, b, h, H, block, n, flag_rows, flag_columns, CONSUMERS, BIAS)
        for i in range(i_chunk * chunk, last_row(i_chunk, chunk, rows, found)):
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(ready, row_bytes)
            copy_tokens(k_desc, b, i, n * OWN, h, ready, k_buf.index(stage))
            copy_tokens(v_desc, b, i, n * OWN, h, ready, v_buf.index(stage))
            for c in gl.static_range(CONSUMERS):
                slot = stage * CONSUMERS + c
                first = (block * CONSUMERS + c) * OWN
                copy_tokens(q_desc, b, i, first, h, ready, q_buf.index(slot))
                copy_tokens(do_desc, b, i, first, h, ready, do_buf.index(slot))
                copy_tile(lse_desc, [b, i, h, first], ready, lse_buf.index(slot))
                copy_tile(delta_desc, [b, i, h, first], ready, delta_buf.index(slot))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def consumer(
    c: gl.constexpr,
    shared,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BIAS: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Sum the bias gradient of one 64 x 64 tile over a chunk of rows."""
    buffers, dense, flags, mask, states, out, sizes, lengths, scale = shared
    q_buf, do_buf, k_buf, v_buf, lse_buf, delta_buf, full, empty = buffers
    total, blocks, key_blocks, H, chunks, chunk, rows, flag_rows, flag_columns = sizes
    queries, keys = lengths
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OWN, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    stage, phase = 0, 0
    for work in range(gl.program_id(0), total, gl.num_programs(0)):
        b, i_chunk, h, block, n = locate(work, blocks, H, chunks, key_blocks)
        first = (block * CONSUMERS + c) * OWN
        total_ds = gl.zeros([OWN, OWN], gl.float32, layout=scores)
        found = any_dense(flags, b, h, H, block, n, flag_rows, flag_columns, CONSUMERS, BIAS)
        wanted = flag_at(flags, b, h, H, block * CONSUMERS + c, n, flag_rows, flag_columns, BIAS)
        o_m = first + gl.arange(0, OWN, layout=by_row)
        o_n = n * OWN + gl.arange(0, OWN, layout=gl.SliceLayout(0, scores))
        p_dense = dense[0] + b.to(gl.int64) * dense[1] + h.to(gl.int64) * dense[2]
        p_dense += o_m.to(gl.int64)[:, None] * dense[3] + o_n.to(gl.int64)[None, :] * dense[4]
        m_dense = (o_m < queries)[:, None] & (o_n < keys)[None, :]
        b_bias = gl.load(p_dense, mask=m_dense, other=0.0).to(gl.float32) * LOG2E
        for i in range(i_chunk * chunk, last_row(i_chunk, chunk, rows, found)):
            kept = load_states(states, b, i, rows, n, 1, MASKED)
            slot = stage * CONSUMERS + c
            mbarrier.wait(full.index(stage), phase)
            b_q = q_buf.index(slot).reshape([OWN, BLOCK_D])
            b_do = do_buf.index(slot).reshape([OWN, BLOCK_D])
            next_s = multiply(b_q, k_buf.index(stage).reshape([OWN, BLOCK_D]), OWN, scores)
            next_dp = multiply(b_do, v_buf.index(stage).reshape([OWN, BLOCK_D]), OWN, scores)
            b_lse = lse_buf.index(slot).reshape([OWN]).load(by_row)[:, None]
            b_delta = delta_buf.index(slot).reshape([OWN]).load(by_row)[:, None]
            s, dp = warpgroup_mma_wait(0, deps=(next_s, next_dp))
            p = gl.exp2(gl.fma(s, gl.full_like(s, 0.0) + scale, b_bias) - b_lse)  # [64, 64]
            p = drop_keys(p, kept[0], mask, b, i, n * OWN, keys, OWN, MASKED, False)
            total_ds = gl.fma(p, dp - b_delta, total_ds)
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = advance(stage, phase, STAGES)
        total_ds = gl.where(wanted != 0, total_ds, 0.0)
        share = ((b.to(gl.int64) * chunks + i_chunk) * H + h) * queries * keys
        store_rows(out + share + n * OWN, keys, total_ds, first, queries, keys - n * OWN)


@gluon.jit
def pairs_kernel(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    lse_desc,
    delta_desc,
    dense,
    flags,
    mask,
    states,
    out,
    sizes,
    lengths,
    scale,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BIAS: gl.constexpr,
    MASKED: gl.constexpr,
    REGISTERS_EACH: gl.constexpr,
):
    """Start one producer and three consumers with one key block in common."""
    bf16: gl.constexpr = gl.bfloat16
    OWNED: gl.constexpr = STAGES * CONSUMERS
    q_buf = gl.allocate_shared_memory(bf16, [OWNED] + q_desc.block_type.shape, q_desc.layout)
    do_buf = gl.allocate_shared_memory(bf16, [OWNED] + do_desc.block_type.shape, do_desc.layout)
    k_buf = gl.allocate_shared_memory(bf16, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_buf = gl.allocate_shared_memory(bf16, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    lse_buf = gl.allocate_shared_memory(gl.float32, [OWNED] + lse_desc.block_type.shape, lse_desc.layout)
    delta_buf = gl.allocate_shared_memory(gl.float32, [OWNED] + delta_desc.block_type.shape, delta_desc.layout)
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    init_barriers(full, empty, STAGES, 1, CONSUMERS)
    fence_async_shared()

    buffers = (q_buf, do_buf, k_buf, v_buf, lse_buf, delta_buf, full, empty)
    copied = ((q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc), buffers, flags, sizes)
    shared = (buffers, dense, flags, mask, states, out, sizes, lengths, scale)
    EACH: gl.constexpr = REGISTERS_EACH
    gl.static_assert(CONSUMERS == 3)
    gl.warp_specialize(
        [
            (consumer, (0, shared, CONSUMERS, STAGES, BLOCK_D, BIAS, MASKED)),
            (consumer, (1, shared, CONSUMERS, STAGES, BLOCK_D, BIAS, MASKED)),
            (consumer, (2, shared, CONSUMERS, STAGES, BLOCK_D, BIAS, MASKED)),
            (producer, (copied, CONSUMERS, STAGES, BIAS)),
        ],
        [4, 4, 1],
        [EACH, EACH, 24],
    )
