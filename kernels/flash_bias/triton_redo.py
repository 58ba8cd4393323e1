"""Queries that the Hopper forward pass could not do without a running maximum, done again with one.

They are marked by a NaN in their log-sum-exp. There are none unless logits exceed about 70 in absolute value, so the
kernel reads the log-sum-exp and returns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.flash_bias.terms import BiasTerms
from pairformer_fast.kernels.flash_bias.triton_common import (
    LN2,
    LOG2E,
    Bias,
    Matrix,
    Rows,
    Tokens,
    bias_operand,
    bias_tile,
    load_factors,
    load_tokens,
    load_vector,
    rank_of,
    row_pointer,
    rows,
    store_tokens,
    tokens,
)
from pairformer_fast.kernels.flash_bias.triton_forward import online_softmax_update
from pairformer_fast.kernels.launching import on_device, padded

BLOCK = 64
TILES_PER_PROGRAM = 64


@triton.jit
def redo_tile(
    streams,
    bias,
    mask,
    targets,
    scale,
    place,
    N,
    M,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attention of one block of queries of one row, with a running maximum."""
    q, k, v = streams
    gate, out, lse = targets
    i_b, i_i, i_h, start_m = place
    b_q = load_tokens(q, i_b, i_i, i_h, start_m, N, D, BLOCK, BLOCK_D)
    b_phi_q = load_factors(bias.phi_q, i_b, i_h, start_m, N, R, BLOCK, BLOCK_R)
    o_m = start_m + tl.arange(0, BLOCK)[:, None]
    b_acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for start_n in range(0, M, BLOCK):
        o_n = start_n + tl.arange(0, BLOCK)[None, :]
        b_phi_k = load_factors(bias.phi_k, i_b, i_h, start_n, M, R, BLOCK, BLOCK_R)
        b_bias = bias_tile(bias, b_phi_q, b_phi_k, i_b, i_h, o_m, o_n, start_m, start_n, N, M, BLOCK, BLOCK, "ieee")
        b_k = load_tokens(k, i_b, i_i, i_h, start_n, M, D, BLOCK, BLOCK_D)
        b_v = load_tokens(v, i_b, i_i, i_h, start_n, M, D, BLOCK, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k)) * (scale * LOG2E) + b_bias  # [BLOCK, BLOCK]
        if mask.pointer is not None:
            b_keep = load_vector(mask, i_b, i_i, 0, start_n, M, 0, BLOCK)
            b_s = tl.where((b_keep != 0)[None, :], b_s, float("-inf"))
        b_p, b_shrink, b_max, b_sum = online_softmax_update(b_s, b_max, b_sum)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_shrink[:, None])
    b_out = b_acc / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    if gate.pointer is not None:
        b_out *= tl.sigmoid(load_tokens(gate, i_b, i_i, i_h, start_m, N, D, BLOCK, BLOCK_D).to(tl.float32))
    store_tokens(out, b_out, i_b, i_i, i_h, start_m, N, D, BLOCK, BLOCK_D)
    o_x = start_m + tl.arange(0, BLOCK)
    tl.store(row_pointer(lse, i_b, i_i, i_h) + o_x, (b_max + tl.log2(b_sum)) * LN2, mask=o_x < N)


@triton.jit
def redo_kernel(
    q,
    k,
    v,
    bias,
    mask,
    gate,
    out,
    lse,
    scale,
    ROWS,
    N,
    M,
    H,
    tiles,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Look through the log-sum-exp of ``TILES`` blocks of queries, and redo the blocks with a NaN."""
    q, k, v, gate, out = Tokens(*q), Tokens(*k), Tokens(*v), Tokens(*gate), Tokens(*out)
    mask, lse = Rows(*mask), Rows(*lse)
    phi_q, phi_k, table = Matrix(*bias.phi_q), Matrix(*bias.phi_k), Matrix(*bias.table)
    dense, dense_tiles, pair_mask = Matrix(*bias.dense), Matrix(*bias.dense_tiles), Matrix(*bias.pair_mask)
    bias = Bias(phi_q, phi_k, table, dense, dense_tiles, pair_mask, bias.band)
    blocks = tl.cdiv(N, BLOCK)
    first = tl.program_id(0) * TILES
    o_tile = first + tl.arange(0, TILES)[:, None]
    o_x = (o_tile % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    p_lse = lse.pointer + tl.cast(o_tile // blocks, tl.int64) * N + o_x
    b_lse = tl.load(p_lse, mask=(o_tile < tiles) & (o_x < N), other=0.0)  # [TILES, BLOCK]
    b_marked = tl.max((b_lse != b_lse).to(tl.int32), 1)  # [TILES]
    if tl.max(b_marked, 0) > 0:
        for t in range(TILES):
            if tl.sum(tl.where(tl.arange(0, TILES) == t, b_marked, 0), 0) > 0:
                row, start_m = (first + t) // blocks, (first + t) % blocks * BLOCK
                i_b, i_i, i_h = row // H // ROWS, row // H % ROWS, row % H
                streams, targets, place = (q, k, v), (gate, out, lse), (i_b, i_i, i_h, start_m)
                redo_tile(streams, bias, mask, targets, scale, place, N, M, D, R, BLOCK_D, BLOCK_R, BLOCK)


def redo(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: BiasTerms,
    mask: Tensor | None,
    gate: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Replace output and log-sum-exp of marked queries in place; arguments as in the forward pass."""
    batch, count, queries, heads, dim = q.shape
    tiles = -(-queries // BLOCK) * batch * count * heads
    with on_device(q):
        redo_kernel[(-(-tiles // TILES_PER_PROGRAM),)](
            tokens(q),
            tokens(k),
            tokens(v),
            bias_operand(terms, None),
            rows(mask),
            tokens(gate),
            tokens(out),
            rows(lse),
            dim**-0.5,
            count,
            queries,
            k.shape[2],
            heads,
            tiles,
            D=dim,
            R=rank_of(terms),
            BLOCK_D=padded(dim),
            BLOCK_R=padded(rank_of(terms)),
            BLOCK=BLOCK,
            TILES=TILES_PER_PROGRAM,
            num_warps=4,
            num_stages=1,
        )
