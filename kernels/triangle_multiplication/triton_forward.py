"""Forward pass in Triton and cuBLAS: two edges in planes of one channel each, their product, and the update.

Planes are ``[B, C_hidden, P, P]``, where P is the number of tokens rounded up to ``ALIGNMENT``; what is beyond the
tokens is zero, and so contributes nothing to the product.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.launching import on_device, padded, precision, tf32
from pairformer_fast.kernels.layer_norm.triton_rows import normalised_rows
from pairformer_fast.kernels.triangle_multiplication.parameters import TriangleWeights
from pairformer_fast.kernels.triangle_multiplication.triton_common import (
    Tiles,
    aligned,
    load_offset,
    load_weight,
    locate_tokens,
    programs_of,
)


def project_tiles(channels: int, hidden: int, dtype: torch.dtype) -> Tiles:
    """Tiles of ``project_kernel``."""
    if tf32(dtype) and max(channels, hidden) <= 128:
        return Tiles(64, 64, 4, 1)
    if dtype == torch.float32:
        return Tiles(32, 16, 8, 1)
    return Tiles(64, min(64, padded(hidden)), 4 if max(channels, hidden) <= 128 else 8, 1)


def output_tiles(channels: int, dtype: torch.dtype) -> Tiles:
    """Tiles of ``output_kernel``."""
    if tf32(dtype) and channels <= 128:
        return Tiles(64, 32, 4, 1)
    if dtype == torch.float32:
        return Tiles(32, 16, 8, 1)
    if channels <= 128:
        return Tiles(64, 32, 4, 1)
    return Tiles(64, min(64, padded(channels)), 8, 1)


@triton.jit
def gated_edge(
    b_w,
    b_w_gate,
    b_x,
    keep,
    offsets,
    FIRST: tl.constexpr,
    start,
    H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Channels from ``start`` of tokens ``b_x [C, T]`` that are kept: ``[R, T]`` in fp32.

    Offsets of the edge, and then those of its gate, begin at ``FIRST``.
    """
    b_value = tl.dot(b_w, b_x, input_precision=PRECISION)
    b_gate = tl.dot(b_w_gate, b_x, input_precision=PRECISION)
    if offsets is not None:
        b_value += load_offset(offsets + FIRST, start, H, BLOCK_R)[:, None]
        b_gate += load_offset(offsets + FIRST + H, start, H, BLOCK_R)[:, None]
    return tl.where(keep[None, :], b_value * tl.sigmoid(b_gate), 0.0)


@triton.jit
def store_planes(planes, plane, b_edge, start, o_t, TOKENS, H: tl.constexpr, BLOCK_R: tl.constexpr):
    """Channels from ``start`` of tokens ``o_t``, into planes ``plane`` elements apart."""
    o_h = start + tl.arange(0, BLOCK_R)[:, None]
    p_edge = planes + o_h.to(tl.int64) * plane + o_t[None, :]
    tl.store(p_edge, b_edge.to(planes.dtype.element_ty), mask=(o_h < H) & (o_t < TOKENS)[None, :])


@triton.jit
def project_kernel(
    z,
    z_b,
    z_i,
    z_j,
    mask,
    mask_b,
    mask_i,
    mask_j,
    norm_weight,
    norm_bias,
    w_a,
    w_a_gate,
    w_b,
    w_b_gate,
    offsets,
    a,
    b,
    N,
    P,
    TOKENS,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Planes of both edges; z is read once."""
    i_b = tl.program_id(1).to(tl.int64)
    z += i_b * z_b
    mask += i_b * mask_b
    a += i_b * H * TOKENS
    b += i_b * H * TOKENS
    columns = tl.arange(0, BLOCK_C)
    if RESIDENT:
        b_a = load_weight(w_a, 0, H, C, BLOCK_R, BLOCK_C)
        b_a_gate = load_weight(w_a_gate, 0, H, C, BLOCK_R, BLOCK_C)
        b_b = load_weight(w_b, 0, H, C, BLOCK_R, BLOCK_C)
        b_b_gate = load_weight(w_b_gate, 0, H, C, BLOCK_R, BLOCK_C)
    blocks = tl.cdiv(TOKENS, BLOCK_T)
    for i_t in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES if RESIDENT else 1):
        o_t, o_i, o_j, m_t = locate_tokens(i_t * BLOCK_T, N, N, P, BLOCK_T)
        p_z = z + (o_i * z_i + o_j * z_j)[:, None] + columns[None, :]
        b_z = tl.load(p_z, mask=m_t[:, None] & (columns < C)[None, :], other=0.0).to(tl.float32)  # [T, C]
        keep = tl.load(mask + o_i * mask_i + o_j * mask_j, mask=m_t, other=0) != 0
        b_x = normalised_rows(b_z, norm_weight, norm_bias, columns, C, EPS, HAS_BIAS)
        b_x = tl.trans(b_x.to(w_a.dtype.element_ty))  # [C, T]
        if RESIDENT:
            b_edge = gated_edge(b_a, b_a_gate, b_x, keep, offsets, 0, 0, H, BLOCK_R, PRECISION)
            store_planes(a, TOKENS, b_edge, 0, o_t, TOKENS, H, BLOCK_R)
            b_edge = gated_edge(b_b, b_b_gate, b_x, keep, offsets, 2 * H, 0, H, BLOCK_R, PRECISION)
            store_planes(b, TOKENS, b_edge, 0, o_t, TOKENS, H, BLOCK_R)
        else:
            for start in tl.range(0, H, BLOCK_R, num_stages=STAGES):
                b_a = load_weight(w_a, start, H, C, BLOCK_R, BLOCK_C)
                b_a_gate = load_weight(w_a_gate, start, H, C, BLOCK_R, BLOCK_C)
                b_edge = gated_edge(b_a, b_a_gate, b_x, keep, offsets, 0, start, H, BLOCK_R, PRECISION)
                store_planes(a, TOKENS, b_edge, start, o_t, TOKENS, H, BLOCK_R)
                b_b = load_weight(w_b, start, H, C, BLOCK_R, BLOCK_C)
                b_b_gate = load_weight(w_b_gate, start, H, C, BLOCK_R, BLOCK_C)
                b_edge = gated_edge(b_b, b_b_gate, b_x, keep, offsets, 2 * H, start, H, BLOCK_R, PRECISION)
                store_planes(b, TOKENS, b_edge, start, o_t, TOKENS, H, BLOCK_R)


@triton.jit
def output_channels(
    z,
    dropout,
    out,
    o_z,
    o_dropout,
    o_out,
    b_product,
    b_x,
    b_w,
    b_w_gate,
    offsets,
    start,
    columns,
    m_o,
    C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Update of channels ``columns``, from ``start`` on, of a tile of tokens from its normalised product and z.

    ``offsets`` are those of the gate, followed by those of the output.
    """
    b_update = tl.dot(b_product, tl.trans(b_w), input_precision=PRECISION)  # [T, O]
    b_gate = tl.dot(b_x, tl.trans(b_w_gate), input_precision=PRECISION)
    if offsets is not None:
        b_update += load_offset(offsets + C, start, C, BLOCK_O)[None, :]
        b_gate += load_offset(offsets, start, C, BLOCK_O)[None, :]
    b_update *= tl.sigmoid(b_gate)
    if dropout is not None:
        b_update *= tl.load(dropout + o_dropout, mask=m_o, other=0.0).to(tl.float32)
    if RESIDUAL:
        b_update = tl.load(z + o_z[:, None] + columns[None, :], mask=m_o, other=0.0).to(tl.float32) + b_update
    tl.store(out + o_out[:, None] + columns[None, :], b_update.to(out.dtype.element_ty), mask=m_o)


@triton.jit
def output_kernel(
    z,
    z_b,
    z_i,
    z_j,
    product,
    dropout,
    dropout_b,
    dropout_i,
    dropout_j,
    dropout_c,
    out,
    out_b,
    out_i,
    out_j,
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
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Update of a slab of ``ROWS`` rows, with or without the residual; ``out`` may be ``z``."""
    i_b = tl.program_id(1).to(tl.int64)
    z += i_b * z_b
    out += i_b * out_b
    product += i_b * H * TOKENS
    if dropout is not None:
        dropout += i_b * dropout_b
    if offsets is not None:
        offsets += 4 * H
    columns, o_h = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_H)
    if RESIDENT:
        b_w = load_weight(w_out, 0, C, H, BLOCK_O, BLOCK_H)
        b_w_gate = load_weight(w_gate, 0, C, C, BLOCK_O, BLOCK_C)
    blocks = tl.cdiv(TOKENS, BLOCK_T)
    for i_t in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES if RESIDENT else 1):
        o_t, o_i, o_j, m_t = locate_tokens(i_t * BLOCK_T, ROWS, N, P, BLOCK_T)
        o_z, o_out = o_i * z_i + o_j * z_j, o_i * out_i + o_j * out_j
        b_z = tl.load(z + o_z[:, None] + columns[None, :], mask=m_t[:, None] & (columns < C)[None, :], other=0.0)
        b_x = normalised_rows(b_z.to(tl.float32), norm_in_weight, norm_in_bias, columns, C, EPS_IN, HAS_BIAS_IN)
        b_x = b_x.to(w_gate.dtype.element_ty)  # [T, C]
        p_product = product + o_h[:, None].to(tl.int64) * TOKENS + o_t[None, :]
        b_product = tl.load(p_product, mask=(o_h < H)[:, None] & (o_t < TOKENS)[None, :], other=0.0)
        b_product = tl.trans(b_product.to(tl.float32))
        b_product = normalised_rows(b_product, norm_out_weight, norm_out_bias, o_h, H, EPS_OUT, HAS_BIAS_OUT)
        b_product = b_product.to(w_out.dtype.element_ty)  # [T, H]
        for start in tl.range(0, C, BLOCK_O, num_stages=1 if RESIDENT else STAGES):
            o_c = start + tl.arange(0, BLOCK_O)
            if not RESIDENT:
                b_w = load_weight(w_out, start, C, H, BLOCK_O, BLOCK_H)
                b_w_gate = load_weight(w_gate, start, C, C, BLOCK_O, BLOCK_C)
            o_dropout = (o_i * dropout_i + o_j * dropout_j)[:, None] + (o_c * dropout_c)[None, :]
            m_o = m_t[:, None] & (o_c < C)[None, :]
            output_channels(
                z,
                dropout,
                out,
                o_z,
                o_dropout,
                o_out,
                b_product,
                b_x,
                b_w,
                b_w_gate,
                offsets,
                start,
                o_c,
                m_o,
                C,
                BLOCK_O,
                RESIDUAL,
                PRECISION,
            )


def project(
    z: Tensor, mask: Tensor, weights: TriangleWeights, a: Tensor, b: Tensor, tiles: Tiles | None = None
) -> None:
    """Fill the planes ``a`` and ``b [B, C_hidden, P, P]``, contiguous, in the dtype of the products."""
    batch, tokens, _, channels = z.shape
    hidden, size = a.shape[1], a.shape[-1]
    tiles = tiles or project_tiles(channels, hidden, a.dtype)
    flags, norm = mask.view(torch.uint8), weights.norm_in
    matrices = [x.to(a.dtype).contiguous() for x in (weights.a, weights.a_gate, weights.b, weights.b_gate)]
    blocks = triton.cdiv(size * size, tiles.tokens)
    with on_device(z):
        project_kernel[(programs_of(tiles, blocks, z.device), batch)](
            z,
            *z.stride()[:3],
            flags,
            *flags.stride(),
            norm.weight,
            norm.bias,
            *matrices,
            weights.offsets,
            a,
            b,
            tokens,
            size,
            size * size,
            C=channels,
            H=hidden,
            BLOCK_C=padded(channels),
            BLOCK_R=padded(hidden) if tiles.programs else tiles.channels,
            BLOCK_T=tiles.tokens,
            EPS=norm.eps,
            HAS_BIAS=norm.bias is not None,
            PRECISION=precision(a.dtype),
            RESIDENT=tiles.programs > 0,
            STAGES=tiles.stages,
            num_warps=tiles.warps,
        )


def write_output(
    z: Tensor,
    product: Tensor,
    weights: TriangleWeights,
    dropout: Tensor | None,
    out: Tensor,
    residual: bool,
    tiles: Tiles | None = None,
) -> None:
    """Update of rows ``z [B, R, N, C]`` into ``out``, from their product ``[B, C_hidden, >= R, P]``."""
    batch, rows, tokens, channels = z.shape
    hidden, size = product.shape[1], product.shape[-1]
    tiles = tiles or output_tiles(channels, product.dtype)
    norm_in, norm_out = weights.norm_in, weights.norm_out
    count = product.shape[2] * size
    with on_device(z):
        output_kernel[(programs_of(tiles, triton.cdiv(count, tiles.tokens), z.device), batch)](
            z,
            *z.stride()[:3],
            product,
            dropout,
            *((0, 0, 0, 0) if dropout is None else dropout.stride()),
            out,
            *out.stride()[:3],
            norm_in.weight,
            norm_in.bias,
            norm_out.weight,
            norm_out.bias,
            weights.out.to(product.dtype).contiguous(),
            weights.gate.to(product.dtype).contiguous(),
            weights.offsets,
            rows,
            tokens,
            size,
            count,
            C=channels,
            H=hidden,
            BLOCK_C=padded(channels),
            BLOCK_H=padded(hidden),
            BLOCK_O=padded(channels) if tiles.programs else tiles.channels,
            BLOCK_T=tiles.tokens,
            EPS_IN=norm_in.eps,
            EPS_OUT=norm_out.eps,
            HAS_BIAS_IN=norm_in.bias is not None,
            HAS_BIAS_OUT=norm_out.bias is not None,
            RESIDUAL=residual,
            PRECISION=precision(product.dtype),
            RESIDENT=tiles.programs > 0,
            STAGES=tiles.stages,
            num_warps=tiles.warps,
        )


def multiply(a: Tensor, b: Tensor, incoming: bool, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of the product of planes ``[B, C_hidden, P, P]``."""
    batch, hidden, size, _ = a.shape
    left, right = a.view(-1, size, size), b.view(-1, size, size)
    left, right = (left[:, :, start:stop].mT, right) if incoming else (left[:, start:stop], right.mT)
    return torch.bmm(left, right).view(batch, hidden, stop - start, size)


def forward(
    z: Tensor,
    mask: Tensor,
    weights: TriangleWeights,
    dropout: Tensor | None,
    out: Tensor,
    incoming: bool,
    residual: bool,
    slab_rows: int | None,
    compute: torch.dtype,
) -> None:
    """Write the update into ``out``, which may be ``z``: edges are made before the first row is written."""
    batch, tokens, _, _ = z.shape
    size = aligned(tokens)
    a, b = torch.empty(2, batch, weights.a.shape[0], size, size, dtype=compute, device=z.device)
    step = size if slab_rows is None else min(size, aligned(slab_rows))
    dropout = None if dropout is None else dropout.expand(z.shape)
    with torch.autocast(z.device.type, enabled=False):
        project(z, mask, weights, a, b)
        for start in range(0, size, step):
            rows = slice(start, start + step)
            scale = None if dropout is None else dropout[:, rows]
            # No name for the product, which would keep it in memory while the next one is made.
            write_output(
                z[:, rows],
                multiply(a, b, incoming, start, min(size, start + step)),
                weights,
                scale,
                out[:, rows],
                residual,
            )
