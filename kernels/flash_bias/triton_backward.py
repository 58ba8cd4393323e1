"""Backward pass in Triton: which kernels run, over which rows, and how their shares are summed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from pairformer_fast.kernels.flash_bias.terms import BiasTerms, Gradients, room
from pairformer_fast.kernels.flash_bias.triton_backward_kernels import (
    dkv_kernel,
    dq_kernel,
    pairs_kernel,
    prepare_kernel,
)
from pairformer_fast.kernels.flash_bias.triton_common import bias_operand, choose_tiles, matrix, rank_of, rows, tokens
from pairformer_fast.kernels.flash_bias.triton_tiles import Tiles
from pairformer_fast.kernels.launching import on_device, padded, precision

PREPARE_BLOCK = 64
MAX_CHUNKS = 16
"""Shares of the rows whose gradients of the factors are held apart until they are summed."""

PROGRAMS_PER_PROCESSOR = 8


class _Chunks(NamedTuple):
    """Consecutive rows that one program works through."""

    shares: int
    rows_each: int


@dataclass(frozen=True)
class _Problem:
    """What all passes read."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    lse: Tensor
    delta: Tensor
    terms: BiasTerms
    mask: Tensor | None
    pair_mask: Tensor | None

    @property
    def operands(self) -> tuple[Any, ...]:
        streams = tuple(tokens(x) for x in (self.q, self.k, self.v, self.do))
        bias = bias_operand(self.terms, self.pair_mask)
        return *streams, bias, rows(self.mask), rows(self.lse), rows(self.delta)

    @property
    def sizes(self) -> tuple[float | int, ...]:
        _, count, queries, heads, dim = self.q.shape
        return dim**-0.5, count, queries, self.k.shape[2], heads

    def options(self, tiles: Tiles) -> dict[str, Any]:
        dim, rank = self.q.shape[-1], rank_of(self.terms)
        return {
            "D": dim,
            "R": rank,
            "BLOCK_D": padded(dim),
            "BLOCK_R": padded(rank),
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "PRECISION": precision(self.q.dtype),
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }

    def chunks(self, programs: int, group: int) -> _Chunks:
        """As few shares of the rows as fill the device with ``programs`` programs each."""
        groups = triton.cdiv(self.q.shape[1], group)
        wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * _processors(self.q), programs)
        rows_each = group * triton.cdiv(groups, min(wanted, groups, MAX_CHUNKS))
        return _Chunks(triton.cdiv(self.q.shape[1], rows_each), rows_each)


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
    pair_mask: Tensor | None,
    gate: Tensor | None,
    needs: frozenset[str],
    packed: Tensor | None = None,
    *,
    tiles: Mapping[str, Tiles] | None = None,
) -> Gradients:
    """Launch the kernels that ``needs`` calls for; arguments in the triangle layout.

    Parameters
    ----------
    dout, dlse : Tensor
        Gradients of the output ``[B, I, N, H, D]`` and, if any, of the log-sum-exp ``[B, I, H, N]``.
    q, k, v, terms, mask, pair_mask, gate
        As in the forward pass.
    out, lse : Tensor
        What the forward pass returned.
    needs : frozenset of str
        Fields of ``Gradients``.
    packed : Tensor, optional
        ``[B, I, N, 3, H, D]``, where the gradients of q, k and v go.
    tiles : mapping of str to Tiles, optional
        By kind, in place of those of the table.

    Returns
    -------
    Gradients
    """
    tiles = tiles or {}
    chosen = {
        kind: tiles.get(kind) or choose_tiles(kind, q, terms)
        for kind in ("backward_dq", "backward_dkv", "backward_pairs")
    }
    band_tile = chosen["backward_pairs"].block_n
    grads: dict[str, Tensor | None] = {}
    with on_device(q):
        do, delta, grads["gate"] = _prepare(dout, dlse, out, lse, gate)
        problem = _Problem(q, k, v, do, lse, delta, terms, mask, pair_mask)
        ends = None
        if needs & {"q", "phi_q", "table"}:
            grads["q"] = dq = room(q, packed, 0)
            grads["phi_q"], ends = _dq(problem, dq, chosen["backward_dq"], needs, band_tile)
        if needs & {"k", "v", "phi_k"}:
            grads["k"], grads["v"] = dk, dv = room(k, packed, 1), room(v, packed, 2)
            grads["phi_k"] = _dkv(problem, dk, dv, chosen["backward_dkv"], needs)
        if "dense" in needs:
            grads["dense"] = _ddense(problem, chosen["backward_pairs"])
        if "table" in needs:
            grads["table"] = _dtable(problem, chosen["backward_pairs"], ends)
    return Gradients(*(grads.get(name) if name in needs else None for name in Gradients._fields))


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def _prepare(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient of the output before the gate, delta, and the gradient of the gate."""
    batch, count, queries, heads, dim = out.shape
    delta = torch.empty_like(lse)
    do = dout if gate is None else torch.empty_like(out)
    dgate = None if gate is None else torch.empty_like(out)
    prepare_kernel[(triton.cdiv(queries, PREPARE_BLOCK) * heads * count * batch,)](
        tokens(dout),
        tokens(out),
        tokens(gate),
        rows(lse),
        rows(dlse),
        tokens(do),
        rows(delta),
        tokens(dgate),
        count,
        queries,
        heads,
        D=dim,
        BLOCK_D=padded(dim),
        BLOCK_M=PREPARE_BLOCK,
    )
    return do, delta, dgate


def _dq(
    problem: _Problem, dq: Tensor, tiles: Tiles, needs: frozenset[str], band_tile: int
) -> tuple[Tensor | None, Tensor | None]:
    """Fill the gradient of q; returns that of phi_q, and sums of bias gradients on either side of the table's band."""
    q, phi_q = problem.q, problem.terms.phi_q
    batch, count, queries, heads, _ = q.shape
    programs = triton.cdiv(queries, tiles.block_m) * heads * batch
    chunks = _Chunks(triton.cdiv(count, tiles.group), tiles.group)
    if needs & {"phi_q", "table"}:
        chunks = problem.chunks(programs, tiles.group)
    shares = _shares(phi_q, chunks) if phi_q is not None and "phi_q" in needs else None
    ends = None
    if "table" in needs:
        ends = torch.empty(batch * chunks.shares, heads, 2, queries, dtype=torch.float32, device=q.device)
    dq_kernel[(programs * chunks.shares,)](
        *problem.operands,
        tokens(dq),
        matrix(shares),
        matrix(ends),
        *problem.sizes,
        *chunks,
        _band_tiles(problem.terms, band_tile),
        GROUP=tiles.group,
        BAND_TILE=band_tile,
        **problem.options(tiles),
    )
    return None if shares is None else _summed(shares, q), ends


def _dkv(problem: _Problem, dk: Tensor, dv: Tensor, tiles: Tiles, needs: frozenset[str]) -> Tensor | None:
    """Fill the gradients of k and v; returns that of phi_k."""
    k, phi_k = problem.k, problem.terms.phi_k
    batch, count, keys, heads, _ = k.shape
    programs = triton.cdiv(keys, tiles.block_n) * heads * batch
    chunks = _Chunks(triton.cdiv(count, tiles.group), tiles.group)
    if "phi_k" in needs:
        chunks = problem.chunks(programs, tiles.group)
    shares = _shares(phi_k, chunks) if phi_k is not None and "phi_k" in needs else None
    dkv_kernel[(programs * chunks.shares,)](
        *problem.operands,
        tokens(dk),
        tokens(dv),
        matrix(shares),
        *problem.sizes,
        *chunks,
        GROUP=tiles.group,
        **problem.options(tiles),
    )
    return None if shares is None else _summed(shares, k)


def _ddense(problem: _Problem, tiles: Tiles) -> Tensor:
    """Gradient of the dense bias, zero in tiles that are not flagged in the mixed form."""
    dense = problem.terms.dense
    assert dense is not None
    batch, heads, queries, keys = dense.shape
    programs = triton.cdiv(queries, tiles.block_m) * triton.cdiv(keys, tiles.block_n) * heads * batch
    chunks = problem.chunks(programs, 1)
    if chunks.shares == 1:
        shares = torch.empty(dense.shape, dtype=dense.dtype, device=dense.device)
    else:
        shares = _shares(dense, chunks)
    pairs_kernel[(programs * chunks.shares,)](
        *problem.operands,
        matrix(shares),
        matrix(None),
        *problem.sizes,
        *chunks,
        0,
        **problem.options(tiles),
    )
    return shares if chunks.shares == 1 else _summed(shares, dense)


def _dtable(problem: _Problem, tiles: Tiles, ends: Tensor | None) -> Tensor:
    """Gradient of the table: sums along the diagonals of the tiles around i = j, and of the rest of each query."""
    table, tile = problem.terms.table, tiles.block_n
    assert table is not None
    assert ends is not None
    batch, _, queries, heads, _ = problem.q.shape
    far, band = _band_tiles(problem.terms, tile), table.shape[-1] // 2
    row_blocks, slots = triton.cdiv(queries, tile), 2 * far + 1
    programs = row_blocks * slots * heads * batch
    chunks = problem.chunks(programs, 1)
    size = batch * chunks.shares * row_blocks, heads, slots, 2 * tile
    diagonals = torch.empty(size, dtype=torch.float32, device=table.device)
    pairs_kernel[(programs * chunks.shares,)](
        *problem.operands,
        matrix(None),
        matrix(diagonals),
        *problem.sizes,
        *chunks,
        far,
        **problem.options(tiles._replace(block_m=tile)),
    )
    strips = diagonals.sum(0).unflatten(-1, (2, tile))  # [H, slots, 2, tile]
    by_gap = F.pad(strips[:, :, 0], (0, 0, 1, 0)) + F.pad(strips[:, :, 1], (0, 0, 0, 1))
    by_gap = by_gap.flatten(1).flip(1)  # [H, (slots + 1) tile], ascending i - j
    zero = (far + 1) * tile - 1
    below, above = ends.sum((0, 3)).unbind(1)
    if band == 0:
        return (by_gap.sum(1) + below + above)[:, None].to(table.dtype)
    first = below + by_gap[:, : zero - band + 1].sum(1)
    last = above + by_gap[:, zero + band :].sum(1)
    inner = by_gap[:, zero - band + 1 : zero + band]
    return torch.cat([first[:, None], inner, last[:, None]], 1).to(table.dtype)


def _band_tiles(terms: BiasTerms, tile: int) -> int:
    """How many tiles away from the diagonal the table still has more than one value."""
    return 0 if terms.table is None else (terms.table.shape[-1] // 2 + tile - 2) // tile


def _shares(of: Tensor, chunks: _Chunks) -> Tensor:
    return torch.empty(of.shape[0] * chunks.shares, *of.shape[1:], dtype=torch.float32, device=of.device)


def _summed(shares: Tensor, like: Tensor) -> Tensor:
    """One gradient from the shares of all chunks, always added in the same order."""
    return shares.unflatten(0, (like.shape[0], -1)).sum(1).to(like.dtype)
