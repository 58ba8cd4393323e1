"""Backward pass in Triton: gradients of the tokens, then of the weights; each makes the hidden layer once more."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.launching import on_device, padded, precision, tf32
from pairformer_fast.kernels.layer_norm import NormParameters, layer_norm_backward
from pairformer_fast.kernels.layer_norm.triton_rows import normalised_rows
from pairformer_fast.kernels.transition.triton_common import (
    Tiles,
    Tokens,
    approximate,
    descriptor,
    keep_masked,
    load_rows,
    programs,
    sigmoid,
    tokens,
    with_rows,
)

WEIGHT_PROGRAMS = 264
"""Programs that share the gradients of the weights: two for each multiprocessor of an H100, the same everywhere."""


@triton.jit
def gate_backward(p, q, dh, APPROXIMATE: tl.constexpr):
    """Hidden layer ``silu(p) q``, and its gradients with respect to p and q."""
    b_sigmoid = sigmoid(p, APPROXIMATE)
    b_silu = p * b_sigmoid
    return b_silu * q, dh * q * (b_sigmoid + b_silu * (1 - b_sigmoid)), dh * b_silu


@triton.jit
def prepare(
    x,
    dout,
    mask,
    y,
    dy,
    norm_weight,
    norm_bias,
    o_t,
    TOKENS,
    ROWS,
    COLUMNS,
    C: tl.constexpr,
    EPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalised tokens and masked gradients of a tile, stored as well."""
    o_c = tl.arange(0, BLOCK_C)
    b_x = load_rows(x, o_t, o_c, TOKENS, ROWS, COLUMNS, C)
    b_y = normalised_rows(b_x, norm_weight, norm_bias, o_c, C, EPS, HAS_BIAS).to(y.dtype.element_ty)  # [T, BLOCK_C]
    b_dy = load_rows(dout, o_t, o_c, TOKENS, ROWS, COLUMNS, C)
    b_dy = keep_masked(b_dy, mask, o_t, TOKENS, ROWS, COLUMNS).to(b_y.dtype)
    store_flat(y, b_y, o_t, TOKENS, C, BLOCK_C)
    store_flat(dy, b_dy, o_t, TOKENS, C, BLOCK_C)
    return b_y, b_dy


@triton.jit
def store_flat(x, b_x, o_t, TOKENS, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store a tile to a contiguous ``[TOKENS, C]``."""
    o_c = tl.arange(0, BLOCK_C)
    pointers = x + o_t.to(tl.int64)[:, None] * C + o_c[None, :]
    tl.store(pointers, b_x.to(x.dtype.element_ty), mask=(o_t < TOKENS)[:, None] & (o_c < C)[None, :])


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
    a_desc,
    b_desc,
    out_desc,
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
    APPROXIMATE: tl.constexpr,
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
            b_a, b_b = a_desc.load([start, 0]), b_desc.load([start, 0])  # [BLOCK_H, BLOCK_C]
            b_p = tl.dot(b_y, b_a.T, input_precision=PRECISION)  # [T, BLOCK_H]
            b_q = tl.dot(b_y, b_b.T, input_precision=PRECISION)
            b_dh = tl.dot(b_dy, out_desc.load([0, start]), input_precision=PRECISION)
            _h, b_dp, b_dq = gate_backward(b_p, b_q, b_dh, APPROXIMATE)
            b_dnormalised = tl.dot(b_dp.to(b_a.dtype), b_a, b_dnormalised, input_precision=PRECISION)
            b_dnormalised = tl.dot(b_dq.to(b_a.dtype), b_b, b_dnormalised, input_precision=PRECISION)
        store_flat(dnormalised, b_dnormalised, o_t, TOKENS, C, BLOCK_C)
        o_t += stride
        b_y, b_dy = prepare(
            x, dout, mask, y, dy, norm_weight, norm_bias, o_t, TOKENS, ROWS, COLUMNS, C, EPS, HAS_BIAS, BLOCK_C
        )


@triton.jit(do_not_specialize=["TOKENS", "HIDDEN", "SPAN"])
def weights_kernel(
    y_desc,
    dy_desc,
    a_desc,
    b_desc,
    out_desc,
    partial,
    TOKENS,
    HIDDEN,
    SPAN,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Share of ``SPAN`` tokens in the gradients of a, b and out transposed, for a block of hidden channels."""
    start_h = tl.program_id(0) * BLOCK_H
    i_span = tl.program_id(1)
    b_a, b_b = a_desc.load([start_h, 0]), b_desc.load([start_h, 0])  # [BLOCK_H, BLOCK_C]
    b_out = out_desc.load([0, start_h])  # [BLOCK_C, BLOCK_H]
    b_da = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    b_db = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    b_dout = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    for start in range(i_span * SPAN, tl.minimum((i_span + 1) * SPAN, TOKENS), BLOCK_T):
        b_y, b_dy = y_desc.load([start, 0]), dy_desc.load([start, 0])  # [T, BLOCK_C]
        b_p = tl.dot(b_a, b_y.T, input_precision=PRECISION)  # [BLOCK_H, T]
        b_q = tl.dot(b_b, b_y.T, input_precision=PRECISION)
        b_dh = tl.dot(b_out.T, b_dy.T, input_precision=PRECISION)
        b_h, b_dp, b_dq = gate_backward(b_p, b_q, b_dh, APPROXIMATE)
        b_da = tl.dot(b_dp.to(b_y.dtype), b_y, b_da, input_precision=PRECISION)
        b_db = tl.dot(b_dq.to(b_y.dtype), b_y, b_db, input_precision=PRECISION)
        b_dout = tl.dot(b_h.to(b_y.dtype), b_dy, b_dout, input_precision=PRECISION)
    o_h, o_c = start_h + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C)
    inside = (o_h < HIDDEN)[:, None] & (o_c < C)[None, :]
    size = HIDDEN * C
    pointers = partial + i_span.to(tl.int64) * 3 * size + o_h[:, None] * C + o_c[None, :]
    tl.store(pointers, b_da, mask=inside)
    tl.store(pointers + size, b_db, mask=inside)
    tl.store(pointers + 2 * size, b_dout, mask=inside)


def transition(
    dout: Tensor,
    x: Tensor,
    norm: NormParameters,
    a_weight: Tensor,
    b_weight: Tensor,
    out_weight: Tensor,
    mask: Tensor | None,
    residual: bool,
    compute: torch.dtype,
    *,
    token_tiles: Tiles | None = None,
    weight_tiles: Tiles | None = None,
) -> tuple[Tensor, ...]:
    """Launch the kernels.

    Parameters
    ----------
    dout, x : Tensor
        ``[B, I, J, C]`` or ``[B, N, C]``: gradient of the output, and input of the forward pass.
    norm : NormParameters
    a_weight, b_weight, out_weight : Tensor
        ``[hidden, C]``, ``[hidden, C]`` and ``[C, hidden]``.
    mask : Tensor, optional
        Bool, ``x.shape[:-1]``.
    residual : bool
        Whether ``x`` is added to the update.
    compute : torch.dtype
        Of the products.
    token_tiles, weight_tiles : Tiles, optional
        In place of those of the table.

    Returns
    -------
    tuple of Tensor
        Gradients of x in its dtype, and of the weight and bias of the layer norm, a, b and out in fp32.
    """
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    flat = with_rows(x, dout, mask)
    _, rows, columns, channels = flat[0].shape
    count, width, hidden = x.numel() // channels, padded(channels), a_weight.shape[0]
    y, dy, dnormalised = torch.empty(3, count, channels, dtype=compute, device=x.device)
    constants = {"C": channels, "BLOCK_C": width, "PRECISION": precision(compute), "APPROXIMATE": approximate(compute)}
    with on_device(x):
        tiles = token_tiles or choose_token_tiles(width, compute)
        tokens_kernel[(programs(x, count, tiles),)](
            *map(tokens, flat),
            y,
            dy,
            dnormalised,
            norm.weight,
            norm.bias,
            *_weight_descriptors(a_weight, b_weight, out_weight, compute, width, tiles),
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
        partial = torch.empty(spans, 3, hidden, channels, dtype=torch.float32, device=x.device)
        weights_kernel[(blocks, spans)](
            *(descriptor(tensor, compute, [tiles.block_t, width]) for tensor in (y, dy)),
            *_weight_descriptors(a_weight, b_weight, out_weight, compute, width, tiles),
            partial,
            count,
            hidden,
            span,
            **tiles.options(),
            **constants,
        )
    da, db, dout_transposed = (share.sum(0) for share in partial.unbind(1))
    dx, dweight, dbias = layer_norm_backward(x, norm, dnormalised.view(x.shape), dout if residual else None)
    return dx, dweight, dbias, da, db, dout_transposed.T


def _weight_descriptors(
    a_weight: Tensor, b_weight: Tensor, out_weight: Tensor, compute: torch.dtype, width: int, tiles: Tiles
) -> tuple:
    return (
        descriptor(a_weight, compute, [tiles.block_h, width]),
        descriptor(b_weight, compute, [tiles.block_h, width]),
        descriptor(out_weight, compute, [width, tiles.block_h]),
    )


def split_tokens(count: int, blocks: int, tiles: Tiles) -> tuple[int, int]:
    """Tokens of a span, and how many spans share the gradients of ``blocks`` blocks of weights."""
    span = triton.cdiv(count, max(1, WEIGHT_PROGRAMS // blocks))
    span = max(4, triton.cdiv(span, tiles.block_t)) * tiles.block_t
    return span, triton.cdiv(count, span)


def choose_token_tiles(width: int, compute: torch.dtype) -> Tiles:
    """Tiles of ``tokens_kernel`` for a padded number of channels and a dtype of the products."""
    if tf32(compute) and width <= 128:
        return Tiles(32, 32, 8, 2, 1)
    if compute == torch.float32:
        return Tiles(32, 16, 8, 1, 1) if width <= 128 else Tiles(16, 16, 8, 1, 1)
    if width <= 128:
        return Tiles(64, 32, 4, 3, 2)
    return Tiles(128, 32, 8, 1, 1) if width <= 256 else Tiles(32, 16, 8, 2, 1)


def choose_weight_tiles(width: int, compute: torch.dtype) -> Tiles:
    """Tiles of ``weights_kernel`` for a padded number of channels and a dtype of the products."""
    if tf32(compute) and width <= 128:
        return Tiles(64, 32, 4, 1, 1)
    if compute == torch.float32:
        return Tiles(32, 16, 8, 1, 1) if width <= 128 else Tiles(16, 16, 8, 1, 1)
    if width <= 128:
        return Tiles(32, 128, 8, 3, 1)
    return Tiles(32, 32, 8, 2, 1) if width <= 256 else Tiles(16, 16, 8, 1, 1)
