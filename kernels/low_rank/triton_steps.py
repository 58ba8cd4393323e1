"""The steps in Triton, one launch each."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.launching import on_device
from pairformer_fast.kernels.low_rank.reference import least_length

ROWS, COLUMNS = 1024, 4
"""Tokens and columns of a tile: many programs, each with whole columns."""
TINY = tl.constexpr(torch.finfo(torch.float64).tiny)
SERIAL_WARPS = 4


@triton.jit
def inverse_cholesky_kernel(gram, inverse, ROUNDING: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr):
    """Eliminate column after column, in the Gram matrix and in the identity, which becomes the inverse."""
    o = tl.arange(0, BLOCK)
    rows, columns = o[:, None], o[None, :]
    inside = (rows < L) & (columns < L)
    start = tl.program_id(0).to(tl.int64) * L * L
    b_gram = tl.load(gram + start + rows * L + columns, mask=inside, other=0.0)  # [BLOCK, BLOCK]
    b_gram = tl.where(rows == columns, b_gram + (b_gram * ROUNDING + tl.full([], TINY, tl.float64)), b_gram)
    b_inverse = (rows == columns).to(tl.float64)
    for j in range(L):
        b_row = tl.sum(tl.where(rows == j, b_gram, 0.0), 0)
        b_column = tl.sum(tl.where(columns == j, b_gram, 0.0), 1)
        unit = 1.0 / tl.sqrt(tl.sum(tl.where(o == j, b_row, 0.0), 0))
        b_done = tl.sum(tl.where(rows == j, b_inverse, 0.0), 0) * unit
        b_factor = b_column * unit
        b_gram -= b_factor[:, None] * (b_row * unit)[None, :]
        b_below = tl.where(o > j, b_factor, 0.0)
        b_inverse = tl.where(rows == j, b_done[None, :], b_inverse - b_below[:, None] * b_done[None, :])
    tl.store(inverse + start + rows * L + columns, b_inverse, mask=inside)


@triton.jit
def column_means(thin, N, L: tl.constexpr, o_l, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Means of columns of ``thin [N, L]``, ``[COLUMNS]``."""
    b_sum = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, N, ROWS):
        o_n = start + tl.arange(0, ROWS)
        m_x = (o_n < N)[:, None] & (o_l < L)[None, :]
        b_sum += tl.sum(tl.load(thin + o_n[:, None] * L + o_l[None, :], mask=m_x, other=0.0), 0)
    return b_sum / N


@triton.jit
def centre_kernel(thin, scale, out, N, L: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``out = (thin - mean) * scale`` of some columns."""
    i_b = tl.program_id(1).to(tl.int64)
    o_l = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    thin += i_b * N * L
    out += i_b * N * L
    b_mean = column_means(thin, N, L, o_l, ROWS, COLUMNS)
    factor = tl.load(scale + i_b)
    for start in range(0, N, ROWS):
        o_n = start + tl.arange(0, ROWS)
        m_x = (o_n < N)[:, None] & (o_l < L)[None, :]
        o_x = o_n[:, None] * L + o_l[None, :]
        b_x = tl.load(thin + o_x, mask=m_x, other=0.0) - b_mean[None, :]
        tl.store(out + o_x, b_x * factor, mask=m_x)


@triton.jit
def balance_kernel(
    basis,
    projected,
    unit,
    phi_q,
    phi_k,
    used,
    N,
    L: tl.constexpr,
    FLOOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Centre some columns of ``projected`` and share their lengths with those of ``basis``."""
    i_b = tl.program_id(1).to(tl.int64)
    o_l = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start_b = i_b * N * L
    b_mean = column_means(projected + start_b, N, L, o_l, ROWS, COLUMNS)
    b_square = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, N, ROWS):
        o_n = start + tl.arange(0, ROWS)
        m_x = (o_n < N)[:, None] & (o_l < L)[None, :]
        b_x = tl.load(projected + start_b + o_n[:, None] * L + o_l[None, :], mask=m_x, other=0.0)
        b_x = tl.where(m_x, b_x - b_mean[None, :], 0.0)
        b_square += tl.sum(b_x * b_x, 0)
    b_length = tl.sqrt(b_square)
    b_root = tl.sqrt(tl.maximum(b_length, FLOOR))
    half = 1.0 / tl.sqrt(tl.load(unit + i_b))
    b_of_q = tl.where(b_length > FLOOR, b_root * half, 0.0)
    b_of_k = half / b_root
    tl.store(used + i_b * L + o_l, b_length > FLOOR, mask=o_l < L)
    for start in range(0, N, ROWS):
        o_n = start + tl.arange(0, ROWS)
        m_x = (o_n < N)[:, None] & (o_l < L)[None, :]
        o_x = start_b + o_n[:, None] * L + o_l[None, :]
        b_basis = tl.load(basis + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_x = tl.load(projected + o_x, mask=m_x, other=0.0) - b_mean[None, :]
        tl.store(phi_q + o_x, b_basis * b_of_q[None, :], mask=m_x)
        tl.store(phi_k + o_x, b_x * b_of_k[None, :], mask=m_x)


def inverse_cholesky(gram: Tensor, rounding: float) -> Tensor:
    gram, inverse = gram.contiguous(), torch.empty_like(gram, memory_format=torch.contiguous_format)
    width = gram.shape[-1]
    with on_device(gram):
        inverse_cholesky_kernel[(len(gram),)](
            gram, inverse, rounding, width, max(16, triton.next_power_of_2(width)), num_warps=SERIAL_WARPS
        )
    return inverse


def centred(thin: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    thin = thin.contiguous()
    (batch, tokens, width), out = thin.shape, torch.empty_like(thin, dtype=dtype)
    with on_device(thin):
        centre_kernel[(triton.cdiv(width, COLUMNS), batch)](thin, scale, out, tokens, width, ROWS, COLUMNS)
    return out


def balanced(basis: Tensor, projected: Tensor, unit: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    basis, projected = basis.contiguous(), projected.contiguous()
    batch, tokens, width = projected.shape
    phi_q, phi_k = (torch.empty_like(projected, dtype=dtype) for _ in range(2))
    used = torch.empty(batch, width, dtype=torch.bool, device=projected.device)
    with on_device(projected):
        balance_kernel[(triton.cdiv(width, COLUMNS), batch)](
            basis, projected, unit, phi_q, phi_k, used, tokens, width, least_length(projected.dtype), ROWS, COLUMNS
        )
    return phi_q, phi_k, used
