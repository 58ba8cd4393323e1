"""Backward pass for Hopper GPUs in Gluon: one kernel for the gradients of queries, the same one mirrored for keys.

Consumers own 64 tokens of one side and stream the tokens of the other side past them. Owning queries gives dq and the
gradient of phi_q, owning keys (tiles transposed) gives dk, dv and the gradient of phi_k. Scores are made anew from the
log-sum-exp. Gradients of the factors stay in registers over all rows i of a work item and leave as one fp32 share.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="misc, assignment"

from __future__ import annotations

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
    LOG2E,
    MIXED,
    OWN,
    advance,
    append,
    copy_tile,
    copy_tokens,
    drop_keys,
    flag_at,
    init_barriers,
    load_states,
    multiply,
    replace,
    store_rows,
    take_dense,
)


@gluon.jit
def locate(work, blocks, H, chunks):
    """Batch entry, chunk of rows, head and block of owned tokens of a work item."""
    rest = work // blocks
    return rest // H // chunks, rest // H % chunks, rest % H, work % blocks


@gluon.jit
def producer(
    copied,
    CONSUMERS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    BIAS: gl.constexpr,
    KEYS: gl.constexpr,
):
    """Copy the owned tokens once for each group of rows, and the streamed ones for each of their blocks."""
    descs, buffers, flags, sizes = copied
    own0, own1, phi_own, other0, other1, phi_other, dense_desc, lse_desc, delta_desc = descs
    own0_buf, own1_buf, phi_own_buf, other0_buf, other1_buf, phi_other_buf, dense_buf, lse_buf, delta_buf = buffers[0]
    own_full, own_empty, phi_full, phi_empty, full, empty = buffers[1]
    total, blocks, H, chunks, groups, chunk, other_blocks, flag_rows, flag_columns = sizes
    LOW_RANK: gl.constexpr = BIAS == FACTORS or BIAS == MIXED
    token_bytes: gl.constexpr = 2 * GROUP * other0.block_type.nbytes
    factor_bytes: gl.constexpr = phi_other.block_type.nbytes if LOW_RANK else 0
    statistics_bytes: gl.constexpr = 2 * GROUP * lse_desc.block_type.nbytes if KEYS else 0
    stage, phase, place, own_phase, phi_phase = 0, 1, 0, 1, 1
    for work in range(gl.program_id(0), total, gl.num_programs(0)):
        b, i_chunk, h, block = locate(work, blocks, H, chunks)
        if LOW_RANK:
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(phi_empty.index(c), phi_phase)
                mbarrier.expect(phi_full.index(c), phi_own.block_type.nbytes)
                first = (block * CONSUMERS + c) * OWN
                copy_tile(phi_own, [b, h, first, 0], phi_full.index(c), phi_own_buf.index(c))
            phi_phase ^= 1
        for group in range(i_chunk * chunk, min((i_chunk + 1) * chunk, groups)):
            for c in gl.static_range(CONSUMERS):
                slot = place * CONSUMERS + c
                first = (block * CONSUMERS + c) * OWN
                ready = own_full.index(slot)
                mbarrier.wait(own_empty.index(slot), own_phase)
                mbarrier.expect(ready, 2 * GROUP * own0.block_type.nbytes)
                for g in gl.static_range(GROUP):
                    copy_tokens(own0, b, group * GROUP + g, first, h, ready, own0_buf.index(slot * GROUP + g))
                    copy_tokens(own1, b, group * GROUP + g, first, h, ready, own1_buf.index(slot * GROUP + g))
            place, own_phase = advance(place, own_phase, 2)
            for n in range(other_blocks):
                start = n * BLOCK
                ready = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(ready, token_bytes + factor_bytes + statistics_bytes)
                if LOW_RANK:
                    copy_tile(phi_other, [b, h, start, 0], ready, phi_other_buf.index(stage))
                for g in gl.static_range(GROUP):
                    i = group * GROUP + g
                    copy_tokens(other0, b, i, start, h, ready, other0_buf.index(stage * GROUP + g))
                    copy_tokens(other1, b, i, start, h, ready, other1_buf.index(stage * GROUP + g))
                    if KEYS:
                        copy_tile(lse_desc, [b, i, h, start], ready, lse_buf.index(stage * GROUP + g))
                        copy_tile(delta_desc, [b, i, h, start], ready, delta_buf.index(stage * GROUP + g))
                if BIAS == DENSE or BIAS == MIXED:
                    for c in gl.static_range(CONSUMERS):
                        x = block * CONSUMERS + c
                        wanted = flag_at(flags, b, h, H, x, start // FLAG_TILE, flag_rows, flag_columns, BIAS)
                        mbarrier.arrive(ready, count=1, pred=wanted == 0)
                        mbarrier.expect(ready, dense_desc.block_type.nbytes, pred=wanted != 0)
                        copy_tile(
                            dense_desc,
                            [b, h, x * OWN, start],
                            ready,
                            dense_buf.index(stage * CONSUMERS + c),
                            wanted != 0,
                        )
                stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def own_statistics(pointer, other: gl.constexpr, b, i, h, H, rows, stride, index, length):
    """Entries of a padded fp32 ``[B, I, H, N]`` for 64 owned queries; ``other`` beyond the last query or row."""
    row = (b.to(gl.int64) * rows + gl.minimum(i, rows - 1)) * H + h
    return gl.load(pointer + row * stride + index, mask=(index < length) & (i < rows), other=other)


@gluon.jit
def own_keys(mask, b, i, rows, index, length):
    """Whether each of 64 owned keys is kept."""
    p_mask = mask[0] + b.to(gl.int64) * mask[1] + gl.minimum(i, rows - 1).to(gl.int64) * mask[2]
    return gl.load(p_mask + index, mask=index < length, other=0).to(gl.int32)


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
    R: gl.constexpr,
    BLOCK_R: gl.constexpr,
    BIAS: gl.constexpr,
    MASKED: gl.constexpr,
    KEYS: gl.constexpr,
):
    """Gradients of 64 owned tokens, over all rows of a chunk."""
    buffers, flags, mask, states, statistics, outputs, sizes, lengths, scale = shared
    own0_buf, own1_buf, phi_own_buf, other0_buf, other1_buf, phi_other_buf, dense_buf, lse_buf, delta_buf = buffers[0]
    own_full, own_empty, phi_full, phi_empty, full, empty = buffers[1]
    total, blocks, H, chunks, groups, chunk, other_blocks, flag_rows, flag_columns = sizes
    rows, own_length, other_length = lengths
    LOW_RANK: gl.constexpr = BIAS == FACTORS or BIAS == MIXED
    # Tiles of keys stay in registers: the tensor cores then read only the streamed side from shared memory.
    HELD: gl.constexpr = KEYS
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    token_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    factor_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_R, 16])
    own_operand: gl.constexpr = gl.DotOperandLayout(0, scores, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    by_column: gl.constexpr = gl.SliceLayout(0, scores)
    stage, phase, place, own_phase, phi_phase = 0, 0, 0, 0, 0
    for work in range(gl.program_id(0), total, gl.num_programs(0)):
        b, i_chunk, h, block = locate(work, blocks, H, chunks)
        first = (block * CONSUMERS + c) * OWN
        index = first + gl.arange(0, OWN, layout=by_row)
        d_phi = gl.zeros([OWN, BLOCK_R], gl.float32, layout=factor_layout)
        b_phi = own0_buf.index(0).reshape([OWN, BLOCK_D])
        if LOW_RANK:
            mbarrier.wait(phi_full.index(c), phi_phase)
            phi_phase ^= 1
            b_phi = phi_own_buf.index(c).reshape([OWN, BLOCK_R])
        if LOW_RANK and HELD:
            b_phi = b_phi.load(own_operand)
        last = min((i_chunk + 1) * chunk, groups)
        gl.assume(i_chunk * chunk < last)
        gl.assume(other_blocks > 0)
        for group in range(i_chunk * chunk, last):
            slot = place * CONSUMERS + c
            own0, own1, grad0, grad1, own_lse, own_delta, keep = (), (), (), (), (), (), ()
            for g in gl.static_range(GROUP):
                i = group * GROUP + g
                if KEYS:
                    grad1 = append(grad1, gl.zeros([OWN, BLOCK_D], gl.float32, layout=token_layout))
                else:
                    lse = own_statistics(
                        statistics[0], float("inf"), b, i, h, H, rows, statistics[2], index, own_length
                    )
                    own_lse = append(own_lse, lse)
                    delta = own_statistics(statistics[1], 0.0, b, i, h, H, rows, statistics[2], index, own_length)
                    own_delta = append(own_delta, delta)
                if KEYS and MASKED:
                    keep = append(keep, own_keys(mask, b, i, rows, index, own_length))
                grad0 = append(grad0, gl.zeros([OWN, BLOCK_D], gl.float32, layout=token_layout))
            mbarrier.wait(own_full.index(slot), own_phase)
            for g in gl.static_range(GROUP):
                b_own0 = own0_buf.index(slot * GROUP + g).reshape([OWN, BLOCK_D])
                b_own1 = own1_buf.index(slot * GROUP + g).reshape([OWN, BLOCK_D])
                own0 = append(own0, b_own0.load(own_operand) if HELD else b_own0)
                own1 = append(own1, b_own1.load(own_operand) if HELD else b_own1)
            for n in range(other_blocks):
                kept = load_states(states, b, group, rows, n * BLOCK // FLAG_TILE, GROUP, MASKED and not KEYS)
                x = block * CONSUMERS + c
                wanted = flag_at(flags, b, h, H, x, n * BLOCK // FLAG_TILE, flag_rows, flag_columns, BIAS)
                mbarrier.wait(full.index(stage), phase)
                b_other0 = other0_buf.index(stage * GROUP).reshape([BLOCK, BLOCK_D])
                b_other1 = other1_buf.index(stage * GROUP).reshape([BLOCK, BLOCK_D])
                b_phi_other = b_other0
                if LOW_RANK:
                    b_phi_other = phi_other_buf.index(stage).reshape([BLOCK, BLOCK_R])
                b_bias = gl.zeros([OWN, BLOCK], gl.float32, layout=scores)
                next_s = multiply(own0[0], b_other0, BLOCK, scores)
                next_dp = multiply(own1[0], b_other1, BLOCK, scores)
                if LOW_RANK:
                    low_rank = multiply(b_phi, b_phi_other, BLOCK, scores)
                    s, dp, b_bias = warpgroup_mma_wait(0, deps=(next_s, next_dp, low_rank))
                    b_bias *= LOG2E
                else:
                    s, dp = warpgroup_mma_wait(0, deps=(next_s, next_dp))
                b_bias = take_dense(b_bias, wanted, dense_buf, stage * CONSUMERS + c, BLOCK, BIAS)
                db = b_bias
                for g in gl.static_range(GROUP):
                    b_other0 = other0_buf.index(stage * GROUP + g).reshape([BLOCK, BLOCK_D])
                    b_other1 = other1_buf.index(stage * GROUP + g).reshape([BLOCK, BLOCK_D])
                    if KEYS:
                        b_lse = lse_buf.index(stage * GROUP + g).reshape([BLOCK]).load(by_column)[None, :]
                        b_delta = delta_buf.index(stage * GROUP + g).reshape([BLOCK]).load(by_column)[None, :]
                    else:
                        b_lse = own_lse[g][:, None]
                        b_delta = own_delta[g][:, None]
                    p = gl.exp2(gl.fma(s, gl.full_like(s, 0.0) + scale, b_bias) - b_lse)  # [64, BLOCK]
                    if MASKED and KEYS:
                        p = gl.where((keep[g] != 0)[:, None], p, 0.0)
                    elif MASKED:
                        i = gl.minimum(group * GROUP + g, rows - 1)
                        p = drop_keys(p, kept[g], mask, b, i, n * BLOCK, other_length, BLOCK, True, False)
                    ds = p * (dp - b_delta)
                    if KEYS:
                        b_p = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, token_layout, 2))
                        grad1 = replace(grad1, g, warpgroup_mma(b_p, b_other1, grad1[g], is_async=True))
                    b_ds = gl.convert_layout(ds.to(gl.bfloat16), gl.DotOperandLayout(0, token_layout, 2))
                    db = ds if g == 0 else db + ds
                    if g + 1 < GROUP:
                        next0 = other0_buf.index(stage * GROUP + g + 1).reshape([BLOCK, BLOCK_D])
                        next1 = other1_buf.index(stage * GROUP + g + 1).reshape([BLOCK, BLOCK_D])
                        next_s = multiply(own0[g + 1], next0, BLOCK, scores)
                        next_dp = multiply(own1[g + 1], next1, BLOCK, scores)
                    grad0 = replace(grad0, g, warpgroup_mma(b_ds, b_other0, grad0[g], is_async=True))
                    if g + 1 < GROUP:
                        s, dp = warpgroup_mma_wait(1, deps=(next_s, next_dp))
                if LOW_RANK:
                    if BIAS == MIXED:
                        db = gl.where(wanted == 0, db, 0.0)
                    b_db = gl.convert_layout(db.to(gl.bfloat16), gl.DotOperandLayout(0, factor_layout, 2))
                    d_phi = warpgroup_mma(b_db, b_phi_other, d_phi, is_async=True)
                    done = warpgroup_mma_wait(0, deps=grad0 + grad1 + (d_phi,))
                    d_phi = done[len(grad0) + len(grad1)]
                else:
                    done = warpgroup_mma_wait(0, deps=grad0 + grad1 + (d_phi,))
                grad0 = done[:GROUP]
                if KEYS:
                    grad1 = done[GROUP : 2 * GROUP]
                mbarrier.arrive(empty.index(stage), count=1)
                if HELD:
                    # Once products have read the registers: before that the loads may still be under way.
                    mbarrier.arrive(own_empty.index(slot), count=1, pred=n == 0)
                stage, phase = advance(stage, phase, STAGES)
            if not HELD:
                mbarrier.arrive(own_empty.index(slot), count=1)
            place, own_phase = advance(place, own_phase, 2)
            for g in gl.static_range(GROUP):
                i = group * GROUP + g
                if i < rows:
                    offset = (b.to(gl.int64) * rows + i) * own_length * outputs[3] + h * D
                    # exp2 took scores in units of log2, whose gradient is that of the scores times 1.
                    store_rows(outputs[0] + offset, outputs[3], grad0[g] * (scale / LOG2E), first, own_length, D)
                    if KEYS:
                        store_rows(outputs[1] + offset, outputs[3], grad1[g], first, own_length, D)
        if LOW_RANK:
            mbarrier.arrive(phi_empty.index(c), count=1)
            share = ((b.to(gl.int64) * chunks + i_chunk) * H + h) * own_length * R
            store_rows(outputs[2] + share, R, d_phi, first, own_length, R)


@gluon.jit
def backward_kernel(
    own0_desc,
    own1_desc,
    phi_own_desc,
    other0_desc,
    other1_desc,
    phi_other_desc,
    dense_desc,
    lse_desc,
    delta_desc,
    flags,
    mask,
    states,
    statistics,
    outputs,
    sizes,
    lengths,
    scale,
    CONSUMERS: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,
    R: gl.constexpr,
    BLOCK_R: gl.constexpr,
    BIAS: gl.constexpr,
    MASKED: gl.constexpr,
    KEYS: gl.constexpr,
    REGISTERS_EACH: gl.constexpr,
):
    """Start one producer and the consumers; the owned side is keys if ``KEYS``, queries otherwise."""
    LOW_RANK: gl.constexpr = BIAS == FACTORS or BIAS == MIXED
    TABLE: gl.constexpr = BIAS == DENSE or BIAS == MIXED
    bf16: gl.constexpr = gl.bfloat16
    OWNED: gl.constexpr = 2 * CONSUMERS * GROUP
    own0_buf = gl.allocate_shared_memory(bf16, [OWNED] + own0_desc.block_type.shape, own0_desc.layout)
    own1_buf = gl.allocate_shared_memory(bf16, [OWNED] + own1_desc.block_type.shape, own1_desc.layout)
    other0_buf = gl.allocate_shared_memory(bf16, [STAGES * GROUP] + other0_desc.block_type.shape, other0_desc.layout)
    other1_buf = gl.allocate_shared_memory(bf16, [STAGES * GROUP] + other1_desc.block_type.shape, other1_desc.layout)
    phi_own_buf, phi_other_buf, dense_buf, lse_buf, delta_buf = own0_buf, other0_buf, own0_buf, own0_buf, own0_buf
    if LOW_RANK:
        phi_own_buf = gl.allocate_shared_memory(bf16, [CONSUMERS] + phi_own_desc.block_type.shape, phi_own_desc.layout)
        phi_other_buf = gl.allocate_shared_memory(
            bf16, [STAGES] + phi_other_desc.block_type.shape, phi_other_desc.layout
        )
    if TABLE:
        dense_buf = gl.allocate_shared_memory(
            bf16, [STAGES * CONSUMERS] + dense_desc.block_type.shape, dense_desc.layout
        )
    if KEYS:
        lse_buf = gl.allocate_shared_memory(gl.float32, [STAGES * GROUP] + lse_desc.block_type.shape, lse_desc.layout)
        delta_buf = gl.allocate_shared_memory(
            gl.float32, [STAGES * GROUP] + delta_desc.block_type.shape, delta_desc.layout
        )
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    own_full = gl.allocate_shared_memory(gl.int64, [2 * CONSUMERS, 1], barriers)
    own_empty = gl.allocate_shared_memory(gl.int64, [2 * CONSUMERS, 1], barriers)
    phi_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barriers)
    phi_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barriers)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    init_barriers(own_full, own_empty, 2 * CONSUMERS, 1, 1)
    init_barriers(phi_full, phi_empty, CONSUMERS, 1, 1)
    init_barriers(full, empty, STAGES, 1 + CONSUMERS if TABLE else 1, CONSUMERS)
    fence_async_shared()

    descs = (
        own0_desc,
        own1_desc,
        phi_own_desc,
        other0_desc,
        other1_desc,
        phi_other_desc,
        dense_desc,
        lse_desc,
        delta_desc,
    )
    tiles = (
        own0_buf,
        own1_buf,
        phi_own_buf,
        other0_buf,
        other1_buf,
        phi_other_buf,
        dense_buf,
        lse_buf,
        delta_buf,
    )
    buffers = (tiles, (own_full, own_empty, phi_full, phi_empty, full, empty))
    copied = (descs, buffers, flags, sizes)
    shared = (buffers, flags, mask, states, statistics, outputs, sizes, lengths, scale)
    EACH: gl.constexpr = REGISTERS_EACH
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (0, shared, CONSUMERS, GROUP, BLOCK, STAGES, D, BLOCK_D, R, BLOCK_R, BIAS, MASKED, KEYS)),
                (consumer, (1, shared, CONSUMERS, GROUP, BLOCK, STAGES, D, BLOCK_D, R, BLOCK_R, BIAS, MASKED, KEYS)),
                (producer, (copied, CONSUMERS, GROUP, BLOCK, STAGES, BIAS, KEYS)),
            ],
            [4, 1],
            [EACH, 24],
        )
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (consumer, (0, shared, CONSUMERS, GROUP, BLOCK, STAGES, D, BLOCK_D, R, BLOCK_R, BIAS, MASKED, KEYS)),
                (consumer, (1, shared, CONSUMERS, GROUP, BLOCK, STAGES, D, BLOCK_D, R, BLOCK_R, BIAS, MASKED, KEYS)),
                (consumer, (2, shared, CONSUMERS, GROUP, BLOCK, STAGES, D, BLOCK_D, R, BLOCK_R, BIAS, MASKED, KEYS)),
                (producer, (copied, CONSUMERS, GROUP, BLOCK, STAGES, BIAS, KEYS)),
            ],
            [4, 4, 1],
            [EACH, EACH, 24],
        )
