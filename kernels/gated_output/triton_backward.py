"""Backward pass: Triton kernels compute the forward pass again and the gradients of tokens, cuBLAS those of weights."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.gated_output.triton_common import (
    COMPUTE,
    SIZES,
    Tiles,
    Tokens,
    grid_of,
    in_order,
    load_tokens,
    load_weight,
    locate,
    programs,
    store_tokens,
    tokens,
)
from pairformer_fast.kernels.launching import on_device, padded, precision, tf32
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm.triton_rows import normalised_rows, unit_rows
from pairformer_fast.kernels.weight_gradient import WeightGradient

CHUNK = 262_144
"""Tokens whose operands of the weight gradients are held at a time."""

SPLITS = 64
"""Parts of a chunk that are summed apart, so that a product as small as a weight fills the GPU."""


@triton.jit
def store_slots(x, b_x, o_slot, o_x, X: tl.constexpr, BLOCK_X: tl.constexpr):
    """Write a tile to rows ``o_slot`` of a contiguous ``[slots, X]``."""
    p_x = x + o_slot.to(tl.int64)[:, None] * X + o_x[None, :]
    if X % BLOCK_X == 0:
        tl.store(p_x, b_x.to(x.dtype.element_ty))
    else:
        tl.store(p_x, b_x.to(x.dtype.element_ty), mask=(o_x < X)[None, :])


@triton.jit
def load_slots(x, o_slot, o_x, X: tl.constexpr, BLOCK_X: tl.constexpr):
    """Inverse of ``store_slots``."""
    p_x = x + o_slot.to(tl.int64)[:, None] * X + o_x[None, :]
    if X % BLOCK_X == 0:
        return tl.load(p_x)
    else:
        return tl.load(p_x, mask=(o_x < X)[None, :], other=0.0)


@triton.jit
def load_row(x, o_x, X: tl.constexpr):
    """Parameter of a norm in fp32, ``[1, BX]``, zero beyond ``X``."""
    return tl.load(x + o_x, mask=o_x < X, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=SIZES)
def gate_kernel(
    dout,
    z,
    attended,
    dropout,
    dattended,
    normed,
    dupdate,
    gated,
    dgate,
    norm_weight,
    norm_bias,
    gate_weight,
    out_weight,
    B,
    I,  # noqa: E741 -- as in [B, I, J, C]
    J,
    first,
    tiles,
    C: tl.constexpr,
    HD: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradient of ``attended`` at ``tiles`` tiles from ``first`` on, and what the other gradients need.

    ``normed`` and ``dupdate`` ``[slots, C]`` are LN(z) and the gradient of the update before dropout; ``gated`` and
    ``dgate`` ``[slots, HD]`` are the input of the projection and the gradient of the gate before its sigmoid. Slots
    without a token hold zero gradients.
    """
    # Made again here: Triton 3.6 forgets in loops what is constant in a tuple that was passed.
    dout, z, attended, dropout = Tokens(*dout), Tokens(*z), Tokens(*attended), Tokens(*dropout)
    dattended = Tokens(*dattended)
    BLOCK_T: tl.constexpr = BLOCK_I * BLOCK_J
    o_c, o_h = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_H)
    if HD <= BLOCK_H:
        b_gate_weight = load_weight(gate_weight, o_h, o_c, HD, C, DTYPE)  # [BH, BC]
        b_out_weight = load_weight(out_weight, o_c, o_h, C, HD, DTYPE)  # [BC, BH]
    for i_tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        i_b, o_i, o_j, m_t = locate(first + i_tile, B, I, J, BLOCK_I, BLOCK_J)
        o_slot = i_tile * BLOCK_T + tl.arange(0, BLOCK_T)
        b_z = load_tokens(z, i_b, o_i, o_j, m_t, o_c, C, BLOCK_C).to(tl.float32)  # [BT, BC]
        b_dupdate = load_tokens(dout, i_b, o_i, o_j, m_t, o_c, C, BLOCK_C)  # [BT, BC]
        if HD <= BLOCK_H:
            b_attended = load_tokens(attended, i_b, o_i, o_j, m_t, o_h, HD, BLOCK_H)  # [BT, BH]
        if dropout.pointer is not None:
            b_dropout = load_tokens(dropout, i_b, o_i, o_j, m_t, o_c, C, BLOCK_C)
            b_dupdate = b_dupdate.to(tl.float32) * b_dropout.to(tl.float32)
        b_dupdate = b_dupdate.to(DTYPE)
        b_x = normalised_rows(b_z, norm_weight, norm_bias, o_c, C, EPS, norm_bias is not None).to(DTYPE)
        store_slots(normed, b_x, o_slot, o_c, C, BLOCK_C)
        store_slots(dupdate, b_dupdate, o_slot, o_c, C, BLOCK_C)
        for start in range(0, HD, BLOCK_H):
            if HD > BLOCK_H:
                b_attended = load_tokens(attended, i_b, o_i, o_j, m_t, start + o_h, HD, BLOCK_H)
                b_gate_weight = load_weight(gate_weight, start + o_h, o_c, HD, C, DTYPE)
                b_out_weight = load_weight(out_weight, o_c, start + o_h, C, HD, DTYPE)
            b_gate = tl.sigmoid(tl.dot(b_x, tl.trans(b_gate_weight), input_precision=PRECISION))  # [BT, BH]
            b_dgated = tl.dot(b_dupdate, b_out_weight, input_precision=PRECISION)  # [BT, BH]
            b_gated = b_gate * b_attended.to(tl.float32)
            store_tokens(dattended, b_dgated * b_gate, i_b, o_i, o_j, m_t, start + o_h, HD, BLOCK_H)
            store_slots(gated, b_gated, o_slot, start + o_h, HD, BLOCK_H)
            store_slots(dgate, b_dgated * b_gated * (1.0 - b_gate), o_slot, start + o_h, HD, BLOCK_H)


@triton.jit(do_not_specialize=SIZES)
def norm_kernel(
    dout,
    z,
    dz,
    dgate,
    norm_sums,
    norm_weight,
    gate_weight,
    B,
    I,  # noqa: E741 -- as in [B, I, J, C]
    J,
    first,
    tiles,
    C: tl.constexpr,
    HD: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradient of ``z`` from that of the gate before its sigmoid: product, backward pass of the norm, residual.

    ``norm_sums`` ``[programs, 2, C]`` are the gradients of weight and offset of the norm, summed over the tokens of a
    program.
    """
    dout, z, dz = Tokens(*dout), Tokens(*z), Tokens(*dz)
    BLOCK_T: tl.constexpr = BLOCK_I * BLOCK_J
    o_c, o_h = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_H)
    b_weight = load_row(norm_weight, o_c, C)
    if HD <= BLOCK_H:
        b_gate_weight = load_weight(gate_weight, o_h, o_c, HD, C, DTYPE)  # [BH, BC]
    b_dweight = tl.zeros([BLOCK_C], tl.float32)
    b_dbias = tl.zeros([BLOCK_C], tl.float32)
    for i_tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        i_b, o_i, o_j, m_t = locate(first + i_tile, B, I, J, BLOCK_I, BLOCK_J)
        o_slot = i_tile * BLOCK_T + tl.arange(0, BLOCK_T)
        b_z = load_tokens(z, i_b, o_i, o_j, m_t, o_c, C, BLOCK_C).to(tl.float32)  # [BT, BC]
        b_dout = load_tokens(dout, i_b, o_i, o_j, m_t, o_c, C, BLOCK_C)  # [BT, BC]
        b_dx = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for start in range(0, HD, BLOCK_H):
            if HD > BLOCK_H:
                b_gate_weight = load_weight(gate_weight, start + o_h, o_c, HD, C, DTYPE)
            b_dgate = load_slots(dgate, o_slot, start + o_h, HD, BLOCK_H)  # [BT, BH]
            b_dx = tl.dot(b_dgate, b_gate_weight, b_dx, input_precision=PRECISION)
        b_unit, b_inverse = unit_rows(b_z, o_c, C, EPS)
        b_dweight += tl.sum(b_dx * b_unit, 0)
        b_dbias += tl.sum(b_dx, 0)
        b_dunit = b_dx * b_weight
        b_mean = tl.sum(b_dunit, 1) / C
        b_slope = tl.sum(b_dunit * b_unit, 1) / C
        b_dnormed = (b_dunit - b_mean[:, None] - b_unit * b_slope[:, None]) * b_inverse[:, None]
        store_tokens(dz, b_dout.to(tl.float32) + b_dnormed, i_b, o_i, o_j, m_t, o_c, C, BLOCK_C)
    p_sums = norm_sums + tl.program_id(0) * 2 * C + o_c
    tl.store(p_sums, b_dweight, mask=o_c < C)
    tl.store(p_sums + C, b_dbias, mask=o_c < C)


def choose_tiles(channels: int, width: int, compute: torch.dtype) -> Tiles:
    """Tiles for ``C`` channels and ``width`` channels of ``attended``, with products in ``compute``."""
    if tf32(compute) and max(channels, width) <= 128:
        return Tiles(32, 4, 128, 1, 8, 1)
    if compute == torch.float32:
        return Tiles(32, 4, 32, 2, 8, 1)
    if max(channels, width) <= 128:
        return Tiles(64, 8, 128, 1, 8, 2)
    return Tiles(32, 4, 64, 1, 8, 2) if channels <= 256 else Tiles(16, 4, 32, 1, 8, 2)


def backward(
    dout: Tensor,
    z: Tensor,
    attended: Tensor,
    norm: NormParameters,
    gate_weight: Tensor,
    out_weight: Tensor,
    dropout: Tensor | None,
    compute: torch.dtype,
    *,
    tiles: Tiles | None = None,
    chunk: int = CHUNK,
) -> list[Tensor]:
    """Launch the kernels and the products of the weight gradients, chunk by chunk.

    Parameters
    ----------
    dout : Tensor
        ``[B, I, J, C]``, gradient of the output, any strides.
    z, attended, norm, gate_weight, out_weight, dropout, compute, tiles
        As in the forward pass.
    chunk : int
        Tokens whose ``2 (C + HD)`` temporary entries are held at a time.

    Returns
    -------
    list of Tensor
        Gradients of ``z``, ``attended``, ``norm.weight``, ``norm.bias`` (if there is one), ``gate_weight`` and
        ``out_weight``, each of the dtype of its tensor.
    """
    gradients = dz, dattended = torch.empty_like(z), torch.empty_like(attended)
    z, attended, dropout, dout, dz, dattended = in_order(z, attended, dropout, dout, dz, dattended)
    batch, count_i, count_j, channels = z.shape
    width = attended.shape[-1]
    tiles = tiles or choose_tiles(channels, width, compute)
    grid = grid_of(z, attended, tiles)
    # As few chunks as fit, of one size, which divides into equal splits.
    chunks = triton.cdiv(grid.tiles * tiles.tokens, chunk)
    chunk = triton.cdiv(grid.tiles, chunks)
    splits = min(SPLITS, chunk)
    chunk = triton.cdiv(chunk, splits) * splits
    slots, count = chunk * tiles.tokens, programs(chunk, tiles, z.device)
    operands = [torch.empty(slots, x, dtype=compute, device=z.device) for x in (channels, channels, width, width)]
    normed, dupdate, gated, dgate = operands
    starts = range(0, grid.tiles, chunk)
    norm_sums = torch.empty(len(starts), count, 2, channels, dtype=torch.float32, device=z.device)
    dgate_weight = WeightGradient(width, channels, splits, z.device)
    dout_weight = WeightGradient(channels, width, splits, z.device)
    gate_weight, out_weight = gate_weight.contiguous(), out_weight.contiguous()
    constants = {
        "C": channels,
        "HD": width,
        "EPS": norm.eps,
        "DTYPE": COMPUTE[compute],
        "PRECISION": precision(compute),
        "BLOCK_I": grid.block_i,
        "BLOCK_J": grid.block_j,
        "BLOCK_C": padded(channels),
        "BLOCK_H": min(tiles.width, padded(width)),
        "STAGES": tiles.stages,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    with on_device(z), torch.autocast(z.device.type, enabled=False):
        for i_chunk, start in enumerate(starts):
            gate_kernel[(count,)](
                tokens(dout),
                tokens(z),
                tokens(attended),
                tokens(dropout),
                tokens(dattended),
                normed,
                dupdate,
                gated,
                dgate,
                norm.weight,
                norm.bias,
                gate_weight,
                out_weight,
                batch,
                count_i,
                count_j,
                start,
                chunk,
                **constants,
            )
            norm_kernel[(count,)](
                tokens(dout),
                tokens(z),
                tokens(dz),
                dgate,
                norm_sums[i_chunk],
                norm.weight,
                gate_weight,
                batch,
                count_i,
                count_j,
                start,
                chunk,
                **constants,
            )
            dgate_weight.add(dgate, normed)
            dout_weight.add(dupdate, gated)
        parameters = [(x, norm_sums[:, :, i].sum((0, 1))) for i, x in enumerate((norm.weight, norm.bias))]
        parameters += [(gate_weight, dgate_weight.total()), (out_weight, dout_weight.total())]
    return [*gradients, *(gradient.to(x.dtype) for x, gradient in parameters if x is not None)]
