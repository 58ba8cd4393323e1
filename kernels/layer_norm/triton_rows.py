"""Layer norm of tokens that are on chip, for use inside kernels."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unit_rows(x, columns, C: tl.constexpr, EPS: tl.constexpr):
    """Rows of mean 0 and variance 1, zero beyond ``C``, and what they were divided by, as an inverse."""
    mean = tl.sum(x, 1) / C  # [T]
    b_x = tl.where((columns < C)[None, :], x - mean[:, None], 0.0)  # [T, BLOCK_C]
    inverse = tl.rsqrt(tl.sum(b_x * b_x, 1) / C + EPS)
    return b_x * inverse[:, None], inverse


@triton.jit
def normalised_rows(x, weight, bias, columns, C: tl.constexpr, EPS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Layer norm of fp32 ``x [T, BLOCK_C]``, which is zero in columns from ``C`` on; so is the fp32 result.

    ``weight`` and ``bias`` are pointers to ``[C]``, ``columns`` is ``tl.arange(0, BLOCK_C)``.
    """
    b_unit, _ = unit_rows(x, columns, C, EPS)
    b_weight = tl.load(weight + columns, mask=columns < C, other=0.0).to(tl.float32)
    b_y = b_unit * b_weight[None, :]
    if HAS_BIAS:
        b_y += tl.load(bias + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    return b_y
