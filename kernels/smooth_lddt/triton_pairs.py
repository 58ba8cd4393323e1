"""The operation in Triton: a program takes some atoms of a sample and passes over all of their pairs."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.launching import on_device

ROWS, COLUMNS, WARPS = 8, 128, 2
"""Atoms of a program, and of a step of its loop."""


@triton.jit
def load_atoms(x, o_a, A):
    """Positions of atoms ``[BLOCK]`` each, zero beyond the last."""
    m_a = o_a < A
    b_x = tl.load(x + o_a * 3, mask=m_a, other=0.0)
    b_y = tl.load(x + o_a * 3 + 1, mask=m_a, other=0.0)
    b_z = tl.load(x + o_a * 3 + 2, mask=m_a, other=0.0)
    return b_x, b_y, b_z


@triton.jit
def pairs_kernel(
    x,
    target,
    mask,
    radius,
    hits,
    included,
    gradient,
    S,
    A,
    EPS: tl.constexpr,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over the pairs of ``ROWS`` atoms of a sample."""
    i_s = tl.program_id(1).to(tl.int64)
    i_b = i_s // S
    x += i_s * A * 3
    target += i_b * A * 3
    mask += i_b * A
    radius += i_b * A
    o_i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_i = o_i < A
    x_i, y_i, z_i = load_atoms(x, o_i, A)
    u_i, v_i, w_i = load_atoms(target, o_i, A)
    keep_i = tl.load(mask + o_i, mask=m_i, other=0) != 0
    radius_i = tl.load(radius + o_i, mask=m_i, other=0.0)
    b_hits = tl.zeros([ROWS], tl.float32)
    b_included = tl.zeros([ROWS], tl.float32)
    b_dx = tl.zeros([ROWS], tl.float32)
    b_dy = tl.zeros([ROWS], tl.float32)
    b_dz = tl.zeros([ROWS], tl.float32)
    for start in range(0, A, COLUMNS):
        o_j = start + tl.arange(0, COLUMNS)
        m_j = o_j < A
        x_j, y_j, z_j = load_atoms(x, o_j, A)
        u_j, v_j, w_j = load_atoms(target, o_j, A)
        keep_j = tl.load(mask + o_j, mask=m_j, other=0) != 0
        radius_j = tl.load(radius + o_j, mask=m_j, other=0.0)
        dx = x_i[:, None] - x_j[None, :]
        dy = y_i[:, None] - y_j[None, :]
        dz = z_i[:, None] - z_j[None, :]
        du = u_i[:, None] - u_j[None, :]
        dv = v_i[:, None] - v_j[None, :]
        dw = w_i[:, None] - w_j[None, :]
        distance = tl.sqrt(dx * dx + dy * dy + dz * dz + EPS)
        true = tl.sqrt(du * du + dv * dv + dw * dw + EPS)
        change = distance - true
        # sigmoid(t - |change|) = 1 / (1 + e^|change| e^-t) for t = 0.5, 1, 2, 4
        grown = tl.exp(tl.abs(change))
        s_1 = 1.0 / (1.0 + grown * 0.6065306597126334)
        s_2 = 1.0 / (1.0 + grown * 0.36787944117144233)
        s_3 = 1.0 / (1.0 + grown * 0.1353352832366127)
        s_4 = 1.0 / (1.0 + grown * 0.01831563888873418)
        pair = keep_i[:, None] & keep_j[None, :] & (o_i[:, None] != o_j[None, :])
        counts = (pair & (true < radius_i[:, None])).to(tl.float32)
        b_included += tl.sum(counts, 1)
        b_hits += tl.sum(counts * (s_1 + s_2 + s_3 + s_4), 1)
        if GRADIENT:
            both = counts + (pair & (true < radius_j[None, :])).to(tl.float32)
            slope = s_1 * (1.0 - s_1) + s_2 * (1.0 - s_2) + s_3 * (1.0 - s_3) + s_4 * (1.0 - s_4)
            sign = tl.where(change > 0.0, -0.25, tl.where(change < 0.0, 0.25, 0.0))
            pull = both * slope * sign / distance
            b_dx += tl.sum(pull * dx, 1)
            b_dy += tl.sum(pull * dy, 1)
            b_dz += tl.sum(pull * dz, 1)
    tl.store(hits + i_s * A + o_i, 0.25 * b_hits, mask=m_i)
    if i_s % S == 0:
        tl.store(included + i_b * A + o_i, b_included, mask=m_i)
    if GRADIENT:
        gradient += i_s * A * 3
        tl.store(gradient + o_i * 3, b_dx, mask=m_i)
        tl.store(gradient + o_i * 3 + 1, b_dy, mask=m_i)
        tl.store(gradient + o_i * 3 + 2, b_dz, mask=m_i)


def pairs(
    x: Tensor, target: Tensor, mask: Tensor, radius: Tensor, eps: float, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`pairformer_fast.kernels.smooth_lddt.reference.pairs`, fp32, ``x`` contiguous."""
    batch, samples, atoms, _ = x.shape
    hits, included = x.new_empty(batch, samples, atoms), x.new_zeros(batch, atoms)
    gradient = torch.empty_like(x) if differentiate else None
    grid = (triton.cdiv(atoms, ROWS), batch * samples)
    if x.numel():
        with on_device(x):
            pairs_kernel[grid](
                x, target.contiguous(), mask.contiguous(), radius.contiguous(),
                hits, included, gradient, samples, atoms,
                EPS=eps, GRADIENT=differentiate, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
            )  # fmt: skip
    return hits, included, gradient
