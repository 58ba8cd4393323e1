"""Backward kernels. Each recomputes the weights it needs and owns what it writes: no atomics, no order of arrival.

``dS = P (dO V^T - delta)`` is the gradient of the scores in natural units and, summed over the rows i, of the bias.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from pairformer_fast.kernels.flash_bias.triton_common import (
    LOG2E,
    Bias,
    Matrix,
    Rows,
    Tokens,
    append,
    bias_tile,
    dense_queries,
    load_factors,
    load_tokens,
    load_vector,
    locate,
    matrix_pointer,
    row_pointer,
    store_factors,
    store_tokens,
    tile_flags,
)


@triton.jit
def load_lse(lse, i_b, i_i, i_h, start, length, BLOCK: tl.constexpr):
    """Log-sum-exp in units of log2; +inf for queries without keys or outside, which makes their weights zero."""
    b_lse = load_vector(lse, i_b, i_i, i_h, start, length, float("inf"), BLOCK)
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)  # [BLOCK]


@triton.jit
def weights(b_qk, b_bias, b_lse, scale):
    """Softmax weights of one tile, in either orientation."""
    return tl.exp2(b_qk * (scale * LOG2E) + b_bias - b_lse)


@triton.jit
def prepare_kernel(
    dout,
    out,
    gate,
    lse,
    dlse,
    do,
    delta,
    dgate,
    ROWS,
    N,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``delta = rowsum(dout out) - dlse``; through the gate, ``do = dout sigmoid(gate)`` and the gate's gradient."""
    start_m, i_h, i_rest = locate(tl.program_id(0), tl.cdiv(N, BLOCK_M), H, BLOCK_M)
    i_b, i_i = i_rest // ROWS, i_rest % ROWS
    b_dout = load_tokens(dout, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D)
    b_out = load_tokens(out, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D)
    b_product = b_dout.to(tl.float32) * b_out.to(tl.float32)  # [BM, BD]
    b_delta = tl.sum(b_product, 1)
    if dlse.pointer is not None:
        b_delta -= load_vector(dlse, i_b, i_i, i_h, start_m, N, 0.0, BLOCK_M)
    # The gradient that reaches the lse of a query without keys may be anything; its weights are zero.
    b_lse = load_vector(lse, i_b, i_i, i_h, start_m, N, 0.0, BLOCK_M)
    b_delta = tl.where(b_lse == float("-inf"), 0.0, b_delta)
    o_x = start_m + tl.arange(0, BLOCK_M)
    tl.store(row_pointer(delta, i_b, i_i, i_h) + o_x * delta.n, b_delta, mask=o_x < N)
    if gate.pointer is not None:
        b_gate = load_tokens(gate, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D)
        b_open = tl.sigmoid(b_gate.to(tl.float32))
        b_do = b_dout.to(tl.float32) * b_open
        store_tokens(do, b_do, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D)
        b_dgate = b_product * (1.0 - b_open)
        store_tokens(dgate, b_dgate, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D)


@triton.jit
def dq_kernel(
    q,
    k,
    v,
    do,
    bias,
    mask,
    lse,
    delta,
    dq,
    dphi_q,
    ends,
    scale,
    ROWS,
    N,
    M,
    H,
    chunks,
    chunk_rows,
    band_tiles,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    BAND_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of ``BLOCK_M`` queries of one chunk of rows, and the chunk's share of those of their factors."""
    # Triton 3.6 forgets in loops and branches that a stride passed in a tuple is 1, unless the tuple was made here.
    q, k, v, do, dq = Tokens(*q), Tokens(*k), Tokens(*v), Tokens(*do), Tokens(*dq)
    mask, lse, delta, dphi_q, ends = Rows(*mask), Rows(*lse), Rows(*delta), Matrix(*dphi_q), Matrix(*ends)
    phi_q, phi_k, table = Matrix(*bias.phi_q), Matrix(*bias.phi_k), Matrix(*bias.table)
    dense, dense_tiles, pair_mask = Matrix(*bias.dense), Matrix(*bias.dense_tiles), Matrix(*bias.pair_mask)
    bias = Bias(phi_q, phi_k, table, dense, dense_tiles, pair_mask, bias.band)

    start_m, i_h, i_share = locate(tl.program_id(0), tl.cdiv(N, BLOCK_M), H, BLOCK_M)
    i_b = i_share // chunks
    first_row = (i_share % chunks) * chunk_rows
    end_row = tl.minimum(first_row + chunk_rows, ROWS)
    o_m = start_m + tl.arange(0, BLOCK_M)[:, None]
    b_phi_q = load_factors(bias.phi_q, i_b, i_h, start_m, N, R, BLOCK_M, BLOCK_R)
    b_dphi_q = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    b_below = tl.zeros([BLOCK_M], tl.float32)
    b_above = tl.zeros([BLOCK_M], tl.float32)

    for i_first in range(first_row, end_row, GROUP):
        qs, dos, lses, deltas, dqs = (), (), (), (), ()
        for g in tl.static_range(GROUP):
            i_i = tl.minimum(i_first + g, ROWS - 1)
            present = tl.where(i_first + g < end_row, N, 0)
            qs = append(qs, load_tokens(q, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D))
            dos = append(dos, load_tokens(do, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D))
            lses = append(lses, load_lse(lse, i_b, i_i, i_h, start_m, present, BLOCK_M)[:, None])
            deltas = append(deltas, load_vector(delta, i_b, i_i, i_h, start_m, N, 0.0, BLOCK_M)[:, None])
            dqs = append(dqs, tl.zeros([BLOCK_M, BLOCK_D], tl.float32))

        for start_n in range(0, M, BLOCK_N):
            o_n = start_n + tl.arange(0, BLOCK_N)[None, :]
            b_phi_k = load_factors(bias.phi_k, i_b, i_h, start_n, M, R, BLOCK_N, BLOCK_R)
            b_bias = bias_tile(
                bias, b_phi_q, b_phi_k, i_b, i_h, o_m, o_n, start_m, start_n, N, M, BLOCK_M, BLOCK_N, PRECISION
            )  # [BM, BN]
            b_dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            next_dqs = ()
            for g in tl.static_range(GROUP):
                i_i = tl.minimum(i_first + g, ROWS - 1)
                b_k = load_tokens(k, i_b, i_i, i_h, start_n, M, D, BLOCK_N, BLOCK_D)
                b_v = load_tokens(v, i_b, i_i, i_h, start_n, M, D, BLOCK_N, BLOCK_D)
                b_row = b_bias
                if mask.pointer is not None:
                    b_keep = load_vector(mask, i_b, i_i, 0, start_n, M, 0, BLOCK_N)
                    b_row = tl.where((b_keep != 0)[None, :], b_bias, float("-inf"))
                b_qk = tl.dot(qs[g], tl.trans(b_k), input_precision=PRECISION)
                b_dp = tl.dot(dos[g], tl.trans(b_v), input_precision=PRECISION)
                b_ds = weights(b_qk, b_row, lses[g], scale) * (b_dp - deltas[g])
                b_dbias += b_ds
                next_dqs = append(next_dqs, tl.dot(b_ds.to(b_k.dtype), b_k, dqs[g], input_precision=PRECISION))
            dqs = next_dqs
            if bias.dense_tiles.pointer is not None:
                m_dense = dense_queries(bias, i_b, i_h, o_m, start_m, start_n, N, BLOCK_M)
                b_dbias = tl.where(m_dense, 0.0, b_dbias)
            if dphi_q.pointer is not None:
                b_dphi_q = tl.dot(b_dbias.to(b_phi_k.dtype), b_phi_k, b_dphi_q, input_precision=PRECISION)
            if ends.pointer is not None:
                o_gap = o_m // BAND_TILE - o_n // BAND_TILE
                b_below += tl.sum(tl.where(o_gap < -band_tiles, b_dbias, 0.0), 1)
                b_above += tl.sum(tl.where(o_gap > band_tiles, b_dbias, 0.0), 1)

        for g in tl.static_range(GROUP):
            i_i = tl.minimum(i_first + g, ROWS - 1)
            stored = tl.where(i_first + g < end_row, N, 0)
            store_tokens(dq, dqs[g] * scale, i_b, i_i, i_h, start_m, stored, D, BLOCK_M, BLOCK_D)

    if dphi_q.pointer is not None:
        store_factors(dphi_q, b_dphi_q, i_share, i_h, start_m, N, R, BLOCK_M, BLOCK_R)
    if ends.pointer is not None:
        o_x = start_m + tl.arange(0, BLOCK_M)
        p_ends = matrix_pointer(ends, i_share, i_h) + o_x * ends.y
        tl.store(p_ends, b_below, mask=o_x < N)
        tl.store(p_ends + ends.x * ends.unit, b_above, mask=o_x < N)


@triton.jit
def dkv_kernel(
    q,
    k,
    v,
    do,
    bias,
    mask,
    lse,
    delta,
    dk,
    dv,
    dphi_k,
    scale,
    ROWS,
    N,
    M,
    H,
    chunks,
    chunk_rows,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of ``BLOCK_N`` keys and values of one chunk of rows, and the chunk's share of those of their factors.

    Tiles are transposed, so that weights and score gradients are the left operands, which stay in registers.
    """
    # Triton 3.6 forgets in loops and branches that a stride passed in a tuple is 1, unless the tuple was made here.
    q, k, v, do, dk, dv = Tokens(*q), Tokens(*k), Tokens(*v), Tokens(*do), Tokens(*dk), Tokens(*dv)
    mask, lse, delta, dphi_k = Rows(*mask), Rows(*lse), Rows(*delta), Matrix(*dphi_k)
    phi_q, phi_k, table = Matrix(*bias.phi_q), Matrix(*bias.phi_k), Matrix(*bias.table)
    dense, dense_tiles, pair_mask = Matrix(*bias.dense), Matrix(*bias.dense_tiles), Matrix(*bias.pair_mask)
    bias = Bias(phi_q, phi_k, table, dense, dense_tiles, pair_mask, bias.band)

    start_n, i_h, i_share = locate(tl.program_id(0), tl.cdiv(M, BLOCK_N), H, BLOCK_N)
    i_b = i_share // chunks
    first_row = (i_share % chunks) * chunk_rows
    end_row = tl.minimum(first_row + chunk_rows, ROWS)
    o_n = start_n + tl.arange(0, BLOCK_N)[:, None]
    b_phi_k = load_factors(bias.phi_k, i_b, i_h, start_n, M, R, BLOCK_N, BLOCK_R)
    b_dphi_k = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)

    for i_first in range(first_row, end_row, GROUP):
        ks, vs, keeps, dks, dvs = (), (), (), (), ()
        for g in tl.static_range(GROUP):
            i_i = tl.minimum(i_first + g, ROWS - 1)
            ks = append(ks, load_tokens(k, i_b, i_i, i_h, start_n, M, D, BLOCK_N, BLOCK_D))
            vs = append(vs, load_tokens(v, i_b, i_i, i_h, start_n, M, D, BLOCK_N, BLOCK_D))
            if mask.pointer is not None:
                keeps = append(keeps, load_vector(mask, i_b, i_i, 0, start_n, M, 0, BLOCK_N)[:, None])
            dks = append(dks, tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
            dvs = append(dvs, tl.zeros([BLOCK_N, BLOCK_D], tl.float32))

        for start_m in range(0, N, BLOCK_M):
            o_m = start_m + tl.arange(0, BLOCK_M)[None, :]
            b_phi_q = load_factors(bias.phi_q, i_b, i_h, start_m, N, R, BLOCK_M, BLOCK_R)
            b_bias = bias_tile(
                bias, b_phi_k, b_phi_q, i_b, i_h, o_m, o_n, start_m, start_n, N, M, BLOCK_M, BLOCK_N, PRECISION
            )  # [BN, BM]
            b_dbias = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            next_dks, next_dvs = (), ()
            for g in tl.static_range(GROUP):
                i_i = tl.minimum(i_first + g, ROWS - 1)
                present = tl.where(i_first + g < end_row, N, 0)
                b_q = load_tokens(q, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D)
                b_do = load_tokens(do, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D)
                b_lse = load_lse(lse, i_b, i_i, i_h, start_m, present, BLOCK_M)
                b_delta = load_vector(delta, i_b, i_i, i_h, start_m, N, 0.0, BLOCK_M)
                b_row = b_bias
                if mask.pointer is not None:
                    b_row = tl.where(keeps[g] != 0, b_bias, float("-inf"))
                b_qk = tl.dot(ks[g], tl.trans(b_q), input_precision=PRECISION)
                b_dp = tl.dot(vs[g], tl.trans(b_do), input_precision=PRECISION)
                b_p = weights(b_qk, b_row, b_lse[None, :], scale)
                b_ds = b_p * (b_dp - b_delta[None, :])
                b_dbias += b_ds
                next_dvs = append(next_dvs, tl.dot(b_p.to(b_do.dtype), b_do, dvs[g], input_precision=PRECISION))
                next_dks = append(next_dks, tl.dot(b_ds.to(b_q.dtype), b_q, dks[g], input_precision=PRECISION))
            dks, dvs = next_dks, next_dvs
            if dphi_k.pointer is not None:
                if bias.dense_tiles.pointer is not None:
                    m_dense = dense_queries(bias, i_b, i_h, o_m, start_m, start_n, N, BLOCK_M)
                    b_dbias = tl.where(m_dense, 0.0, b_dbias)
                b_dphi_k = tl.dot(b_dbias.to(b_phi_q.dtype), b_phi_q, b_dphi_k, input_precision=PRECISION)

        for g in tl.static_range(GROUP):
            i_i = tl.minimum(i_first + g, ROWS - 1)
            stored = tl.where(i_first + g < end_row, M, 0)
            store_tokens(dk, dks[g] * scale, i_b, i_i, i_h, start_n, stored, D, BLOCK_N, BLOCK_D)
            store_tokens(dv, dvs[g], i_b, i_i, i_h, start_n, stored, D, BLOCK_N, BLOCK_D)

    if dphi_k.pointer is not None:
        store_factors(dphi_k, b_dphi_k, i_share, i_h, start_n, M, R, BLOCK_N, BLOCK_R)


@triton.jit
def pairs_kernel(
    q,
    k,
    v,
    do,
    bias,
    mask,
    lse,
    delta,
    ddense,
    diagonals,
    scale,
    ROWS,
    N,
    M,
    H,
    chunks,
    chunk_rows,
    band_tiles,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Score gradients of one tile of pairs, summed over one chunk of rows.

    With ``ddense`` the tiles cover all pairs and those not flagged as dense give zero. With ``diagonals`` they are
    square and cover the band around i = j, flagged ones give zero, and only sums along diagonals are stored:
    ``[0, d]`` over ``j - i = d`` and ``[1, d]`` over ``j - i = d - BLOCK_N`` inside the tile.
    """
    # Triton 3.6 forgets in loops and branches that a stride passed in a tuple is 1, unless the tuple was made here.
    q, k, v, do = Tokens(*q), Tokens(*k), Tokens(*v), Tokens(*do)
    mask, lse, delta = Rows(*mask), Rows(*lse), Rows(*delta)
    ddense, diagonals = Matrix(*ddense), Matrix(*diagonals)
    phi_q, phi_k, table = Matrix(*bias.phi_q), Matrix(*bias.phi_k), Matrix(*bias.table)
    dense, dense_tiles, pair_mask = Matrix(*bias.dense), Matrix(*bias.dense_tiles), Matrix(*bias.pair_mask)
    bias = Bias(phi_q, phi_k, table, dense, dense_tiles, pair_mask, bias.band)

    i_rest = tl.program_id(0)
    column_blocks = 2 * band_tiles + 1 if ddense.pointer is None else tl.cdiv(M, BLOCK_N)
    i_column = i_rest % column_blocks
    row_blocks = tl.cdiv(N, BLOCK_M)
    i_row = (i_rest // column_blocks) % row_blocks
    i_h = (i_rest // column_blocks // row_blocks) % H
    i_share = i_rest // column_blocks // row_blocks // H
    i_b = i_share // chunks
    first_row = (i_share % chunks) * chunk_rows
    end_row = tl.minimum(first_row + chunk_rows, ROWS)
    start_m = i_row * BLOCK_M
    start_n = i_column * BLOCK_N
    if ddense.pointer is None:
        start_n += (i_row - band_tiles) * BLOCK_N

    wanted = (start_n >= 0) & (start_n < M)
    if bias.dense_tiles.pointer is not None:
        inside = tl.minimum(tl.maximum(start_n, 0), M - 1)
        flagged, _ = tile_flags(bias, i_b, i_h, start_m, inside, N, BLOCK_M)
        wanted &= flagged == (ddense.pointer is not None)
    o_m = start_m + tl.arange(0, BLOCK_M)[:, None]
    o_n = start_n + tl.arange(0, BLOCK_N)[None, :]
    b_dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if wanted:
        b_phi_q = load_factors(bias.phi_q, i_b, i_h, start_m, N, R, BLOCK_M, BLOCK_R)
        b_phi_k = load_factors(bias.phi_k, i_b, i_h, start_n, M, R, BLOCK_N, BLOCK_R)
        b_bias = bias_tile(
            bias, b_phi_q, b_phi_k, i_b, i_h, o_m, o_n, start_m, start_n, N, M, BLOCK_M, BLOCK_N, PRECISION
        )  # [BM, BN]
        for i_i in range(first_row, end_row):
            b_q = load_tokens(q, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D)
            b_do = load_tokens(do, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D)
            b_k = load_tokens(k, i_b, i_i, i_h, start_n, M, D, BLOCK_N, BLOCK_D)
            b_v = load_tokens(v, i_b, i_i, i_h, start_n, M, D, BLOCK_N, BLOCK_D)
            b_lse = load_lse(lse, i_b, i_i, i_h, start_m, N, BLOCK_M)
            b_delta = load_vector(delta, i_b, i_i, i_h, start_m, N, 0.0, BLOCK_M)
            b_row = b_bias
            if mask.pointer is not None:
                b_keep = load_vector(mask, i_b, i_i, 0, start_n, M, 0, BLOCK_N)
                b_row = tl.where((b_keep != 0)[None, :], b_bias, float("-inf"))
            b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            b_dbias += weights(b_qk, b_row, b_lse[:, None], scale) * (b_dp - b_delta[:, None])

    if ddense.pointer is not None:
        p_ddense = matrix_pointer(ddense, i_share, i_h) + tl.cast(o_m, tl.int64) * (ddense.x * ddense.unit)
        p_ddense += o_n * ddense.y
        tl.store(p_ddense, b_dbias.to(ddense.pointer.dtype.element_ty), mask=(o_m < N) & (o_n < M))
    else:
        o_row = tl.arange(0, BLOCK_M)[:, None]
        o_d = tl.arange(0, BLOCK_N)[None, :]
        b_skewed = tl.gather(b_dbias, (o_row + o_d) % BLOCK_N, 1)  # [BM, BN], column d holds j - i = d or d - BN
        m_right = o_row + o_d < BLOCK_N
        p_diagonals = matrix_pointer(diagonals, i_share * row_blocks + i_row, i_h) + i_column * (
            diagonals.x * diagonals.unit
        )
        p_diagonals += tl.arange(0, BLOCK_N) * diagonals.y
        tl.store(p_diagonals, tl.sum(tl.where(m_right, b_skewed, 0.0), 0))
        tl.store(p_diagonals + BLOCK_N * diagonals.y, tl.sum(tl.where(m_right, 0.0, b_skewed), 0))
