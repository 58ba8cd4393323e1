"""What the implementations are given as the bias."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE = 64
"""Queries and keys of one flag of ``dense_tiles``."""


class BiasTerms(NamedTuple):
    """Parts of a pair bias in the triangle layout, leading dimensions flattened into B; absent parts are None.

    The bias is ``phi_q @ phi_k.mT + table[h, clip(i - j, -W, W) + W]``, the table only where there is one. ``dense``
    takes its place in the tiles flagged by ``dense_tiles``; without flags ``dense`` is the whole bias and stands alone.

    Attributes
    ----------
    dense : Tensor, optional
        ``[B, H, N, M]``, dtype of q.
    phi_q, phi_k : Tensor, optional
        ``[B, H, N, R]`` and ``[B, H, M, R]``, dtype of q; both or neither.
    table : Tensor, optional
        ``[H, 2 W + 1]``, fp32 or dtype of q; only beside factors.
    dense_tiles : Tensor, optional
        Bool ``[B, H, ceil(N / TILE), ceil(M / TILE)]``; only beside factors and ``dense``.
    """

    dense: Tensor | None = None
    phi_q: Tensor | None = None
    phi_k: Tensor | None = None
    table: Tensor | None = None
    dense_tiles: Tensor | None = None

    def additive(self, dtype: torch.dtype) -> Tensor | None:
        """The bias as one table ``[B, H, N, M]`` of ``dtype``, None if there is none."""
        if self.phi_q is None or self.phi_k is None:
            return None if self.dense is None else self.dense.to(dtype)
        bias = self.phi_q.to(dtype) @ self.phi_k.to(dtype).mT
        queries, keys = bias.shape[-2:]
        if self.table is not None:
            width = self.table.shape[-1] // 2
            tokens = torch.arange(max(queries, keys), device=bias.device)
            offset = (tokens[:queries, None] - tokens[:keys]).clamp(-width, width)
            bias = bias + self.table.to(dtype)[:, offset + width]
        if self.dense is not None and self.dense_tiles is not None:
            flagged = self.dense_tiles.repeat_interleave(TILE, -2)[..., :queries, :]
            flagged = flagged.repeat_interleave(TILE, -1)[..., :keys]
            bias = torch.where(flagged, self.dense.to(dtype), bias)
        return bias

    def flatten(self, last: int) -> BiasTerms:
        """Leading dimensions 0 to ``last`` as one."""
        dense, phi_q, phi_k, dense_tiles = (
            None if x is None else x.flatten(0, last) for x in (self.dense, self.phi_q, self.phi_k, self.dense_tiles)
        )
        return BiasTerms(dense, phi_q, phi_k, self.table, dense_tiles)


def room(like: Tensor, packed: Tensor | None, part: int) -> Tensor:
    """Where the gradient of ``like`` goes: a new tensor, or a part of one for q, k and v."""
    return like.new_empty(like.shape) if packed is None else packed.select(3, part)


class Gradients(NamedTuple):
    """Gradients in the dtypes of the inputs, contiguous but for those in one tensor; None where none was asked for."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    dense: Tensor | None
    phi_q: Tensor | None
    phi_k: Tensor | None
    table: Tensor | None
    gate: Tensor | None
