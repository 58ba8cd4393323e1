"""Kernels of the backward pass: elementwise parts and the small products around them."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from pairformer_fast.kernels.layer_norm.triton_rows import normalised_rows, unit_rows
from pairformer_fast.kernels.triangle_multiplication.triton_common import load_offset, load_weight, locate_tokens


@triton.jit
def store_rows(rows, b_x, o_t, TOKENS, start, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_O: tl.constexpr):
    """Columns from ``start`` of ``b_x [T, O]``, up to ``COLUMNS``, into contiguous rows of ``WIDTH``."""
    o_o = tl.arange(0, BLOCK_O)[None, :]
    p_x = rows + o_t.to(tl.int64)[:, None] * WIDTH + start + o_o
    tl.store(p_x, b_x.to(rows.dtype.element_ty), mask=(o_t < TOKENS)[:, None] & (start + o_o < COLUMNS))


@triton.jit
def update_backward_kernel(
    dy,
    dy_i,
    dy_j,
    z,
    z_i,
    z_j,
    product,
    plane,
    dropout,
    dropout_i,
    dropout_j,
    dropout_c,
    dgate,
    dupdate,
    normalised,
    shares,
    norm_in_weight,
    norm_in_bias,
    norm_out_weight,
    norm_out_bias,
    w_out,
    w_gate,
    offsets,
    ROWS,
    N,
    P,
    TOKENS,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EPS_IN: tl.constexpr,
    EPS_OUT: tl.constexpr,
    HAS_BIAS_IN: tl.constexpr,
    HAS_BIAS_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Through gate, output projection and the layer norm before it; the product becomes its gradient."""
    o_t, o_i, o_j, m_t = locate_tokens(tl.program_id(0) * BLOCK_T, ROWS, N, P, BLOCK_T)
    columns, o_h = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_H)
    p_z = z + (o_i * z_i + o_j * z_j)[:, None] + columns[None, :]
    b_z = tl.load(p_z, mask=m_t[:, None] & (columns < C)[None, :], other=0.0).to(tl.float32)
    b_x = normalised_rows(b_z, norm_in_weight, norm_in_bias, columns, C, EPS_IN, HAS_BIAS_IN)
    b_x = b_x.to(w_gate.dtype.element_ty)  # [T, C]

    p_product = product + o_h[:, None].to(tl.int64) * plane + o_t[None, :]
    m_product = (o_h < H)[:, None] & (o_t < TOKENS)[None, :]
    b_product = tl.load(p_product, mask=m_product, other=0.0).to(tl.float32)
    b_unit, b_inverse = unit_rows(tl.trans(b_product), o_h, H, EPS_OUT)
    b_scale = tl.load(norm_out_weight + o_h, mask=o_h < H, other=0.0).to(tl.float32)[None, :]
    b_normalised = b_unit * b_scale
    if HAS_BIAS_OUT:
        b_normalised += tl.load(norm_out_bias + o_h, mask=o_h < H, other=0.0).to(tl.float32)[None, :]
    b_normalised = b_normalised.to(w_out.dtype.element_ty)  # [T, H]
    store_rows(normalised, b_normalised, o_t, TOKENS, 0, H, H, BLOCK_H)

    b_dnormalised = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for start in tl.range(0, C, BLOCK_O, num_stages=STAGES):
        b_w = load_weight(w_out, start, C, H, BLOCK_O, BLOCK_H)
        b_w_gate = load_weight(w_gate, start, C, C, BLOCK_O, BLOCK_C)
        b_value = tl.dot(b_normalised, tl.trans(b_w), input_precision=PRECISION)  # [T, O]
        b_gate = tl.dot(b_x, tl.trans(b_w_gate), input_precision=PRECISION)
        if offsets is not None:
            b_value += load_offset(offsets + 4 * H + C, start, C, BLOCK_O)[None, :]
            b_gate += load_offset(offsets + 4 * H, start, C, BLOCK_O)[None, :]
        b_gate = tl.sigmoid(b_gate)
        o_o = start + tl.arange(0, BLOCK_O)
        m_o = m_t[:, None] & (o_o < C)[None, :]
        b_dy = tl.load(dy + (o_i * dy_i + o_j * dy_j)[:, None] + o_o[None, :], mask=m_o, other=0.0).to(tl.float32)
        if dropout is not None:
            p_dropout = dropout + (o_i * dropout_i + o_j * dropout_j)[:, None] + (o_o * dropout_c)[None, :]
            b_dy *= tl.load(p_dropout, mask=m_o, other=0.0).to(tl.float32)
        b_dvalue = b_dy * b_gate
        store_rows(dgate, b_dvalue * b_value * (1 - b_gate), o_t, TOKENS, start, C, C, BLOCK_O)
        b_dvalue = b_dvalue.to(w_out.dtype.element_ty)
        store_rows(dupdate, b_dvalue, o_t, TOKENS, start, C, C, BLOCK_O)
        b_dnormalised = tl.dot(b_dvalue, b_w, b_dnormalised, input_precision=PRECISION)

    p_share = shares + tl.program_id(0) * H + o_h
    tl.store(p_share, tl.sum(b_dnormalised * b_unit, 0), mask=o_h < H)
    tl.store(p_share + tl.num_programs(0) * H, tl.sum(b_dnormalised, 0), mask=o_h < H)
    b_dnormalised *= b_scale
    b_mean = tl.sum(b_dnormalised, 1) / H
    b_slope = tl.sum(b_dnormalised * b_unit, 1) / H
    b_dproduct = (b_dnormalised - b_mean[:, None] - b_unit * b_slope[:, None]) * b_inverse[:, None]
    tl.store(p_product, tl.trans(b_dproduct).to(product.dtype.element_ty), mask=m_product)


@triton.jit
def edge_backward(
    dedge,
    plane,
    b_x,
    keep,
    w,
    w_gate,
    offsets,
    rows,
    o_t,
    TOKENS,
    start,
    FIRST: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients before mask, gate and product of one edge, into columns from ``FIRST`` on."""
    b_value = tl.dot(load_weight(w, start, H, C, BLOCK_O, BLOCK_C), b_x, input_precision=PRECISION)  # [O, T]
    b_gate = tl.dot(load_weight(w_gate, start, H, C, BLOCK_O, BLOCK_C), b_x, input_precision=PRECISION)
    if offsets is not None:
        b_value += load_offset(offsets + FIRST, start, H, BLOCK_O)[:, None]
        b_gate += load_offset(offsets + FIRST + H, start, H, BLOCK_O)[:, None]
    b_gate = tl.sigmoid(b_gate)
    o_h = start + tl.arange(0, BLOCK_O)
    p_dedge = dedge + o_h[:, None].to(tl.int64) * plane + o_t[None, :]
    b_dedge = tl.load(p_dedge, mask=(o_h < H)[:, None] & keep[None, :], other=0.0).to(tl.float32)
    b_dvalue = b_dedge * b_gate
    b_dgate = b_dvalue * b_value * (1 - b_gate)
    WIDTH: tl.constexpr = 4 * H + C
    store_rows(rows + FIRST, tl.trans(b_dvalue), o_t, TOKENS, start, WIDTH, H, BLOCK_O)
    store_rows(rows + FIRST + H, tl.trans(b_dgate), o_t, TOKENS, start, WIDTH, H, BLOCK_O)


@triton.jit
def edges_backward_kernel(
    z,
    z_i,
    z_j,
    mask,
    mask_i,
    mask_j,
    norm_weight,
    norm_bias,
    w_a,
    w_a_gate,
    w_b,
    w_b_gate,
    offsets,
    da,
    db,
    plane,
    dgate,
    x,
    rows,
    ROWS,
    N,
    P,
    TOKENS,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Normalised z, and the gradients of all five of its projections side by side, ``[TOKENS, 4 H + C]``."""
    o_t, o_i, o_j, m_t = locate_tokens(tl.program_id(0) * BLOCK_T, ROWS, N, P, BLOCK_T)
    columns = tl.arange(0, BLOCK_C)
    p_z = z + (o_i * z_i + o_j * z_j)[:, None] + columns[None, :]
    b_z = tl.load(p_z, mask=m_t[:, None] & (columns < C)[None, :], other=0.0).to(tl.float32)
    keep = tl.load(mask + o_i * mask_i + o_j * mask_j, mask=m_t, other=0) != 0
    b_x = normalised_rows(b_z, norm_weight, norm_bias, columns, C, EPS, HAS_BIAS).to(w_a.dtype.element_ty)
    store_rows(x, b_x, o_t, TOKENS, 0, C, C, BLOCK_C)
    b_x = tl.trans(b_x)  # [C, T]
    for start in tl.range(0, H, BLOCK_O, num_stages=STAGES):
        edge_backward(
            da, plane, b_x, keep, w_a, w_a_gate, offsets, rows, o_t, TOKENS, start, 0, C, H, BLOCK_C, BLOCK_O, PRECISION
        )
        edge_backward(
            db,
            plane,
            b_x,
            keep,
            w_b,
            w_b_gate,
            offsets,
            rows,
            o_t,
            TOKENS,
            start,
            2 * H,
            C,
            H,
            BLOCK_C,
            BLOCK_O,
            PRECISION,
        )
    p_dgate = dgate + o_t.to(tl.int64)[:, None] * C + columns[None, :]
    b_dgate = tl.load(p_dgate, mask=(o_t < TOKENS)[:, None] & (columns < C)[None, :], other=0.0)
    store_rows(rows + 4 * H, b_dgate, o_t, TOKENS, 0, 4 * H + C, C, BLOCK_C)
