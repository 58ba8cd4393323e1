"""Forward pass in Triton: one program takes a block of queries of a few rows i, which share each tile of the bias."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
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
    append,
    bias_operand,
    bias_tile,
    choose_tiles,
    load_factors,
    load_tokens,
    load_vector,
    locate,
    rank_of,
    row_pointer,
    rows,
    store_tokens,
    tokens,
)
from pairformer_fast.kernels.flash_bias.triton_tiles import Tiles
from pairformer_fast.kernels.launching import on_device, padded, precision


@triton.jit
def online_softmax_update(b_s, b_max, b_sum):
    """Weights of a tile of scores, and the factor by which what was summed so far shrinks."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1))  # [BM]
    # A query that has met no key yet keeps a finite maximum, or -inf - -inf would make it NaN.
    b_finite = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_finite[:, None])  # [BM, BN]
    b_shrink = tl.exp2(b_max - b_finite)
    return b_p, b_shrink, b_new, b_sum * b_shrink + tl.sum(b_p, 1)


@triton.jit
def forward_kernel(
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
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of ``BLOCK_M`` queries of ``GROUP`` rows with all keys, one tile of the bias for all of them."""
    # Triton 3.6 forgets in loops and branches that a stride passed in a tuple is 1, unless the tuple was made here.
    q, k, v, gate, out = Tokens(*q), Tokens(*k), Tokens(*v), Tokens(*gate), Tokens(*out)
    mask, lse = Rows(*mask), Rows(*lse)
    phi_q, phi_k, table = Matrix(*bias.phi_q), Matrix(*bias.phi_k), Matrix(*bias.table)
    dense, dense_tiles, pair_mask = Matrix(*bias.dense), Matrix(*bias.dense_tiles), Matrix(*bias.pair_mask)
    bias = Bias(phi_q, phi_k, table, dense, dense_tiles, pair_mask, bias.band)

    start_m, i_h, i_rest = locate(tl.program_id(0), tl.cdiv(N, BLOCK_M), H, BLOCK_M)
    groups = tl.cdiv(ROWS, GROUP)
    i_b = i_rest // groups
    i_first = (i_rest % groups) * GROUP
    o_m = start_m + tl.arange(0, BLOCK_M)[:, None]

    qs, accs, maxima, sums = (), (), (), ()
    for g in tl.static_range(GROUP):
        i_i = tl.minimum(i_first + g, ROWS - 1)
        qs = append(qs, load_tokens(q, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D))
        accs = append(accs, tl.zeros([BLOCK_M, BLOCK_D], tl.float32))
        maxima = append(maxima, tl.full([BLOCK_M], float("-inf"), tl.float32))
        sums = append(sums, tl.zeros([BLOCK_M], tl.float32))
    b_phi_q = load_factors(bias.phi_q, i_b, i_h, start_m, N, R, BLOCK_M, BLOCK_R)

    for start_n in range(0, M, BLOCK_N):
        o_n = start_n + tl.arange(0, BLOCK_N)[None, :]
        b_phi_k = load_factors(bias.phi_k, i_b, i_h, start_n, M, R, BLOCK_N, BLOCK_R)
        b_bias = bias_tile(
            bias, b_phi_q, b_phi_k, i_b, i_h, o_m, o_n, start_m, start_n, N, M, BLOCK_M, BLOCK_N, PRECISION
        )  # [BM, BN]
        next_accs, next_maxima, next_sums = (), (), ()
        for g in tl.static_range(GROUP):
            i_i = tl.minimum(i_first + g, ROWS - 1)
            b_k = load_tokens(k, i_b, i_i, i_h, start_n, M, D, BLOCK_N, BLOCK_D)
            b_v = load_tokens(v, i_b, i_i, i_h, start_n, M, D, BLOCK_N, BLOCK_D)
            b_s = tl.dot(qs[g], tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E) + b_bias
            if mask.pointer is not None:
                b_keep = load_vector(mask, i_b, i_i, 0, start_n, M, 0, BLOCK_N)
                b_s = tl.where((b_keep != 0)[None, :], b_s, float("-inf"))
            b_p, b_shrink, b_max, b_sum = online_softmax_update(b_s, maxima[g], sums[g])
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, accs[g] * b_shrink[:, None], input_precision=PRECISION)
            next_accs = append(next_accs, b_acc)
            next_maxima = append(next_maxima, b_max)
            next_sums = append(next_sums, b_sum)
        accs, maxima, sums = next_accs, next_maxima, next_sums

    for g in tl.static_range(GROUP):
        i_i = tl.minimum(i_first + g, ROWS - 1)
        stored = tl.where(i_first + g < ROWS, N, 0)
        b_out = accs[g] / tl.where(sums[g] == 0, 1.0, sums[g])[:, None]
        if gate.pointer is not None:
            b_gate = load_tokens(gate, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D)
            b_out *= tl.sigmoid(b_gate.to(tl.float32))
        store_tokens(out, b_out, i_b, i_i, i_h, start_m, stored, D, BLOCK_M, BLOCK_D)
        o_x = start_m + tl.arange(0, BLOCK_M)
        p_lse = row_pointer(lse, i_b, i_i, i_h) + o_x * lse.n
        tl.store(p_lse, (maxima[g] + tl.log2(sums[g])) * LN2, mask=o_x < stored)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: BiasTerms,
    mask: Tensor | None,
    pair_mask: Tensor | None,
    gate: Tensor | None,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments in the triangle layout.

    Parameters
    ----------
    q, k, v, gate : Tensor
        ``[B, I, N, H, D]`` (``M`` for ``N`` in k and v), bf16, fp16 or fp32, any strides.
    terms : BiasTerms
    mask, pair_mask : Tensor, optional
        Bool, ``[B, I, M]`` and ``[B, N, M]``, True = keep.
    tiles : Tiles, optional
        In place of those of the table.

    Returns
    -------
    tuple of Tensor
        Output like q, contiguous, and the natural logarithm of the softmax denominator, fp32 ``[B, I, H, N]``.
    """
    batch, count, tokens_q, heads, dim = q.shape
    tiles = tiles or choose_tiles("forward", q, terms)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, count, heads, tokens_q, dtype=torch.float32, device=q.device)
    blocks = triton.cdiv(tokens_q, tiles.block_m) * heads * triton.cdiv(count, tiles.group) * batch
    with on_device(q):
        forward_kernel[(blocks,)](
            tokens(q),
            tokens(k),
            tokens(v),
            bias_operand(terms, pair_mask),
            rows(mask),
            tokens(gate),
            tokens(out),
            rows(lse),
            dim**-0.5,
            count,
            tokens_q,
            k.shape[2],
            heads,
            D=dim,
            R=rank_of(terms),
            BLOCK_D=padded(dim),
            BLOCK_R=padded(rank_of(terms)),
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            GROUP=tiles.group,
            PRECISION=precision(q.dtype),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return out, lse
