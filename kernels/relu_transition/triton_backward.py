"""Backward pass in Triton: gradients of the tokens, then of the weights; each makes the hidden layer once more."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.launching import on_device, padded, precision
from pairformer_fast.kernels.layer_norm import NormParameters, layer_norm_backward
from pairformer_fast.kernels.relu_transition.triton_forward import load_offset
from pairformer_fast.kernels.transition.triton_backward import (
    choose_token_tiles,
    choose_weight_tiles,
    prepare,
    split_tokens,
    store_flat,
)
from pairformer_fast.kernels.transition.triton_common import Tiles, Tokens, descriptor, programs, tokens, with_rows


@triton.jit(do_not_specialize=["TOKENS", "ROWS", "COLUMNS", "HIDDEN"])
def tokens_kernel(
    x,
    dout,
    mask,
    y,
    dy,
    dnormalised,
    norm_weight,
    norm_bias,
    desc_1,
    offset_1,
    desc_2,
    TOKENS,
    ROWS,
    COLUMNS,
    HIDDEN,
    C: tl.constexpr,
    EPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the normalised tokens, and what the gradients of the weights are made from, by tiles of tokens."""
    x, dout, mask = Tokens(*x), Tokens(*dout), Tokens(*mask)
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    stride = tl.num_programs(0) * BLOCK_T
    # Carried from tile to tile as in the forward pass.
    b_y, b_dy = prepare(
        x, dout, mask, y, dy, norm_weight, norm_bias, o_t, TOKENS, ROWS, COLUMNS, C, EPS, HAS_BIAS, BLOCK_C
    )  # [T, BLOCK_C]
    for _ in range(tl.program_id(0) * BLOCK_T, TOKENS, stride):
        b_dnormalised = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for start in range(0, HIDDEN, BLOCK_H):
            b_1 = desc_1.load([start, 0])  # [BLOCK_H, BLOCK_C]
            b_p = tl.dot(b_y, b_1.T, input_precision=PRECISION)  # [T, BLOCK_H]
            b_p += load_offset(offset_1, start + tl.arange(0, BLOCK_H), HIDDEN)[None, :]
            b_dh = tl.dot(b_dy, desc_2.load([0, start]), input_precision=PRECISION)
            b_dp = tl.where(b_p > 0, b_dh, 0.0).to(b_1.dtype)
            b_dnormalised = tl.dot(b_dp, b_1, b_dnormalised, input_precision=PRECISION)
        store_flat(dnormalised, b_dnormalised, o_t, TOKENS, C, BLOCK_C)
        o_t += stride
        b_y, b_dy = prepare(
            x, dout, mask, y, dy, norm_weight, norm_bias, o_t, TOKENS, ROWS, COLUMNS, C, EPS, HAS_BIAS, BLOCK_C
        )


@triton.jit(do_not_specialize=["TOKENS", "HIDDEN", "SPAN"])
def weights_kernel(
    y_desc,
    dy_desc,
    desc_1,
    offset_1,
    desc_2,
    partial,
    partial_offset,
    TOKENS,
    HIDDEN,
    SPAN,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Share of ``SPAN`` tokens in the gradients of weight 1, weight 2 transposed and offset 1, for a hidden block."""
    start_h = tl.program_id(0) * BLOCK_H
    i_span = tl.program_id(1)
    o_h, o_c = start_h + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C)
    b_1 = desc_1.load([start_h, 0])  # [BLOCK_H, BLOCK_C]
    b_2 = desc_2.load([0, start_h])  # [BLOCK_C, BLOCK_H]
    b_offset = load_offset(offset_1, o_h, HIDDEN)
    b_d1 = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    b_d2 = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    b_doffset = tl.zeros([BLOCK_H], tl.float32)
    for start in range(i_span * SPAN, tl.minimum((i_span + 1) * SPAN, TOKENS), BLOCK_T):
        b_y, b_dy = y_desc.load([start, 0]), dy_desc.load([start, 0])  # [T, BLOCK_C]
        b_p = tl.dot(b_1, b_y.T, input_precision=PRECISION) + b_offset[:, None]  # [BLOCK_H, T]
        b_dh = tl.dot(b_2.T, b_dy.T, input_precision=PRECISION)
        b_dp = tl.where(b_p > 0, b_dh, 0.0)
        b_doffset += tl.sum(b_dp, 1)
        b_d1 = tl.dot(b_dp.to(b_y.dtype), b_y, b_d1, input_precision=PRECISION)
        b_d2 = tl.dot(tl.where(b_p < 0, 0.0, b_p).to(b_y.dtype), b_dy, b_d2, input_precision=PRECISION)
    inside = (o_h < HIDDEN)[:, None] & (o_c < C)[None, :]
    size = HIDDEN * C
    pointers = partial + i_span.to(tl.int64) * 2 * size + o_h[:, None] * C + o_c[None, :]
    tl.store(pointers, b_d1, mask=inside)
    tl.store(pointers + size, b_d2, mask=inside)
    tl.store(partial_offset + i_span * HIDDEN + o_h, b_doffset, mask=o_h < HIDDEN)


def relu_transition(
    dout: Tensor,
    x: Tensor,
    norm: NormParameters,
    weight_1: Tensor,
    offset_1: Tensor,
    weight_2: Tensor,
    mask: Tensor | None,
    compute: torch.dtype,
    *,
    token_tiles: Tiles | None = None,
    weight_tiles: Tiles | None = None,
) -> tuple[Tensor, ...]:
    """Launch the kernels.

    Parameters
    ----------
    dout, x : Tensor
        ``[B, I, J, C]`` or ``[B, N, C]``: gradient of the update, and input of the forward pass.
    norm, weight_1, offset_1, weight_2, mask
        As in the api.
    compute : torch.dtype
        Of the products.
    token_tiles, weight_tiles : Tiles, optional
        In place of those of the table.

    Returns
    -------
    tuple of Tensor
        Gradients of x in its dtype, and of weight and bias of the layer norm, weight 1, offset 1, weight 2 and offset 2
        in fp32.
    """
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    flat = with_rows(x, dout, mask)
    _, rows, columns, channels = flat[0].shape
    count, width, hidden = x.numel() // channels, padded(channels), weight_1.shape[0]
    y, dy, dnormalised = torch.empty(3, count, channels, dtype=compute, device=x.device)
    constants = {"C": channels, "BLOCK_C": width, "PRECISION": precision(compute)}

    def layers(tiles: Tiles) -> tuple:
        first = descriptor(weight_1, compute, [tiles.block_h, width])
        return first, offset_1, descriptor(weight_2, compute, [width, tiles.block_h])

    with on_device(x):
        tiles = token_tiles or choose_token_tiles(width, compute)
        tokens_kernel[(programs(x, count, tiles),)](
            *map(tokens, flat),
            y,
            dy,
            dnormalised,
            norm.weight,
            norm.bias,
            *layers(tiles),
            count,
            rows,
            columns,
            hidden,
            EPS=norm.eps,
            HAS_BIAS=norm.bias is not None,
            **tiles.options(),
            **constants,
        )
        tiles = weight_tiles or choose_weight_tiles(width, compute)
        blocks = triton.cdiv(hidden, tiles.block_h)
        span, spans = split_tokens(count, blocks, tiles)
        partial = torch.empty(spans, 2, hidden, channels, dtype=torch.float32, device=x.device)
        partial_offset = torch.empty(spans, hidden, dtype=torch.float32, device=x.device)
        weights_kernel[(blocks, spans)](
            *(descriptor(tensor, compute, [tiles.block_t, width]) for tensor in (y, dy)),
            *layers(tiles),
            partial,
            partial_offset,
            count,
            hidden,
            span,
            **tiles.options(),
            **constants,
        )
    d1, d2_transposed = (share.sum(0) for share in partial.unbind(1))
    dx, dweight, dbias = layer_norm_backward(x, norm, dnormalised.view(x.shape))
    return dx, dweight, dbias, d1, partial_offset.sum(0), d2_transposed.T, dy.sum(0, dtype=torch.float32)
