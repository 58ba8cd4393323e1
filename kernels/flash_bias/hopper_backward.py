"""Backward pass for Hopper GPUs: which kernels run, over which rows, and how their shares are summed."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pairformer_fast.kernels.flash_bias.hopper_backward_kernels import backward_kernel
from pairformer_fast.kernels.flash_bias.hopper_common import (
    LOG2E,
    OWN,
    REGISTERS,
    bias_operands,
    ceil_div,
    mask_operands,
    padded,
    processors,
    readable,
    token_descriptor,
    vector_descriptor,
    widths,
)
from pairformer_fast.kernels.flash_bias.hopper_pairs import pairs_kernel
from pairformer_fast.kernels.flash_bias.hopper_tiles import HopperTiles, choose
from pairformer_fast.kernels.flash_bias.terms import BiasTerms, Gradients, room
from pairformer_fast.kernels.flash_bias.triton_common import (
    load_tokens,
    load_vector,
    locate,
    row_pointer,
    store_tokens,
)
from pairformer_fast.kernels.flash_bias.triton_common import rows as row_operand
from pairformer_fast.kernels.flash_bias.triton_common import tokens as token_operand

WORK_PER_PROCESSOR = 6
"""Work items that each multiprocessor should get, so that the last round is a small part of all."""


class _Problem(NamedTuple):
    """What all passes read; statistics are padded to rows of a multiple of 16 bytes."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    lse: Tensor
    delta: Tensor
    terms: BiasTerms
    mask: Tensor | None


@triton.jit
def prepare_kernel(
    dout,
    out,
    gate,
    lse,
    dlse,
    do,
    scaled,
    delta,
    dgate,
    ROWS,
    N,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``delta = rowsum(dout out) - dlse`` and the log-sum-exp in units of log2, +inf for queries without keys."""
    start_m, i_h, i_rest = locate(tl.program_id(0), tl.cdiv(N, BLOCK_M), H, BLOCK_M)
    i_b, i_i = i_rest // ROWS, i_rest % ROWS
    o_x = start_m + tl.arange(0, BLOCK_M)
    b_dout = load_tokens(dout, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D).to(tl.float32)  # [BM, BD]
    b_product = b_dout * load_tokens(out, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D).to(tl.float32)
    b_delta = tl.sum(b_product, 1)
    if dlse.pointer is not None:
        b_delta -= load_vector(dlse, i_b, i_i, i_h, start_m, N, 0.0, BLOCK_M)
    b_lse = load_vector(lse, i_b, i_i, i_h, start_m, N, 0.0, BLOCK_M)
    m_empty = b_lse == float("-inf")
    # The gradient that reaches the lse of a query without keys may be anything; its weights are zero.
    tl.store(row_pointer(delta, i_b, i_i, i_h) + o_x, tl.where(m_empty, 0.0, b_delta), mask=o_x < N)
    b_scaled = tl.where(m_empty, float("inf"), b_lse * 1.4426950408889634)
    tl.store(row_pointer(scaled, i_b, i_i, i_h) + o_x, b_scaled, mask=o_x < N)
    if gate.pointer is not None:
        b_open = tl.sigmoid(load_tokens(gate, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D).to(tl.float32))
        store_tokens(do, b_dout * b_open, i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D)
        store_tokens(dgate, b_product * (1.0 - b_open), i_b, i_i, i_h, start_m, N, D, BLOCK_M, BLOCK_D)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    terms: BiasTerms,
    mask: Tensor | None,
    gate: Tensor | None,
    needs: frozenset[str],
    packed: Tensor | None = None,
    *,
    tiles: dict[str, HopperTiles] | None = None,
) -> Gradients:
    """Launch the kernels that ``needs`` calls for; arguments in the triangle layout.

    Parameters
    ----------
    dout, dlse : Tensor
        Gradients of the output ``[B, I, N, H, D]`` and, if any, of the log-sum-exp ``[B, I, H, N]``.
    q, k, v, terms, mask, gate
        As in the forward pass.
    out, lse : Tensor
        What the forward pass returned.
    needs : frozenset of str
        Fields of ``Gradients``.
    packed : Tensor, optional
        ``[B, I, N, 3, H, D]``, where the gradients of q, k and v go.
    tiles : dict of str to HopperTiles, optional
        By kind, in place of those of the table.

    Returns
    -------
    Gradients
    """
    tiles = tiles or {}
    grads: dict[str, Tensor | None] = {}
    with torch.cuda.device(q.device):
        do, scaled, delta, grads["gate"] = _prepare(dout, dlse, out, lse, gate)
        problem = _Problem(q, k, v, do, scaled, delta, terms, mask)
        if needs & {"q", "phi_q"}:
            grads["q"] = dq = room(q, packed, 0)
            grads["phi_q"] = _own(problem, tiles.get("backward_dq"), dq)
        if needs & {"k", "v", "phi_k"}:
            grads["k"], grads["v"] = dk, dv = room(k, packed, 1), room(v, packed, 2)
            grads["phi_k"] = _own(problem, tiles.get("backward_dkv"), dk, dv)
        if "dense" in needs:
            grads["dense"] = _pairs(problem, tiles.get("backward_pairs"))
    return Gradients(*(grads.get(name) if name in needs else None for name in Gradients._fields))


def _prepare(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradient of the output before the gate, statistics of the queries, and the gradient of the gate."""
    batch, count, queries, heads, dim = out.shape
    size = batch, count, heads, queries + -queries % 4
    scaled, delta = (torch.empty(size, dtype=torch.float32, device=out.device)[..., :queries] for _ in range(2))
    do = readable(dout) if gate is None else torch.empty_like(out)
    dgate = None if gate is None else torch.empty_like(out)
    prepare_kernel[(ceil_div(queries, 128) * heads * count * batch,)](
        token_operand(dout),
        token_operand(out),
        token_operand(gate),
        row_operand(lse),
        row_operand(dlse),
        token_operand(do),
        row_operand(scaled),
        row_operand(delta),
        token_operand(dgate),
        count,
        queries,
        heads,
        D=dim,
        BLOCK_D=padded(dim),
        BLOCK_M=128,
    )
    return do, scaled, delta, dgate


def _chunks(work: int, items: int, device: torch.device) -> tuple[int, int]:
    """Number of chunks and items of each, as few as give every multiprocessor its share of the work."""
    wanted = ceil_div(WORK_PER_PROCESSOR * processors(device), work)
    each = ceil_div(items, min(wanted, items))
    return ceil_div(items, each), each


def _own(problem: _Problem, tiles: HopperTiles | None, grad0: Tensor, grad1: Tensor | None = None) -> Tensor | None:
    """Fill gradients on the side of the keys (of k and v) or of the queries (of q); returns that of phi_k or phi_q."""
    q, k, v, do, lse, delta, terms, mask = problem
    keys = grad1 is not None
    own0, own1, other0, other1 = (k, v, q, do) if keys else (q, do, k, v)
    batch, count, own_length, heads, dim = own0.shape
    other_length = other0.shape[2]
    tiles = tiles or choose("backward_dkv" if keys else "backward_dq", own_length, count, widths(terms, q))
    blocks, groups = ceil_div(own_length, tiles.consumers * OWN.value), ceil_div(count, tiles.group)
    chunks, chunk = _chunks(batch * heads * blocks, groups, q.device)
    total = batch * chunks * heads * blocks
    own0_desc = token_descriptor(own0, OWN.value)
    bias = bias_operands(terms, own0_desc, tiles.block, transposed=keys)
    phi = terms.phi_k if keys else terms.phi_q
    rank = 16 if phi is None else phi.shape[-1]
    shares = grad0
    if phi is not None:
        shares = torch.empty(batch, chunks, heads, own_length, rank, dtype=torch.float32, device=q.device)
    backward_kernel[(min(total, processors(q.device)),)](
        own0_desc,
        token_descriptor(own1, OWN.value),
        bias.own,
        token_descriptor(other0, tiles.block),
        token_descriptor(other1, tiles.block),
        bias.streamed,
        bias.dense,
        vector_descriptor(lse, tiles.block),
        vector_descriptor(delta, tiles.block),
        bias.flags,
        *mask_operands(mask, q),
        (lse, delta, lse.stride(2)),
        (grad0, grad0 if grad1 is None else grad1, shares, grad0.stride(2)),
        (
            total,
            blocks,
            heads,
            chunks,
            groups,
            chunk,
            ceil_div(other_length, tiles.block),
            *bias.flag_shape,
        ),
        (count, own_length, other_length),
        dim**-0.5 * LOG2E.value,
        CONSUMERS=tiles.consumers,
        GROUP=tiles.group,
        BLOCK=tiles.block,
        STAGES=tiles.stages,
        D=dim,
        BLOCK_D=padded(dim),
        R=rank,
        BLOCK_R=bias.width,
        BIAS=bias.kind,
        MASKED=mask is not None,
        KEYS=keys,
        REGISTERS_EACH=REGISTERS[tiles.consumers],
        num_warps=4,
    )
    return None if phi is None else shares.sum(1).to(phi.dtype)


def _pairs(problem: _Problem, tiles: HopperTiles | None) -> Tensor:
    """Gradient of the dense bias, zero in tiles that are not flagged in the mixed form."""
    q, k, v, do, lse, delta, terms, mask = problem
    assert terms.dense is not None
    batch, count, queries, heads, dim = q.shape
    keys = k.shape[2]
    tiles = tiles or choose("backward_pairs", queries, count, widths(terms, q))
    blocks, key_blocks = ceil_div(queries, tiles.consumers * OWN.value), ceil_div(keys, OWN.value)
    chunks, chunk = _chunks(batch * heads * blocks * key_blocks, count, q.device)
    total = batch * chunks * heads * blocks * key_blocks
    q_desc = token_descriptor(q, OWN.value)
    bias = bias_operands(terms, q_desc, OWN.value)
    shares = torch.empty(batch, chunks, heads, queries, keys, dtype=torch.float32, device=q.device)
    pairs_kernel[(min(total, processors(q.device)),)](
        q_desc,
        *(token_descriptor(x, OWN.value) for x in (do, k, v)),
        vector_descriptor(lse, OWN.value),
        vector_descriptor(delta, OWN.value),
        (terms.dense, *terms.dense.stride()),
        bias.flags,
        *mask_operands(mask, q),
        shares,
        (total, blocks, key_blocks, heads, chunks, chunk, count, *bias.flag_shape),
        (queries, keys),
        dim**-0.5 * LOG2E.value,
        CONSUMERS=tiles.consumers,
        STAGES=tiles.stages,
        BLOCK_D=padded(dim),
        BIAS=bias.kind,
        MASKED=mask is not None,
        REGISTERS_EACH=REGISTERS[tiles.consumers],
        num_warps=4,
    )
    return shares.sum(1).to(terms.dense.dtype)
