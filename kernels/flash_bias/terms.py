"""What the implementations are given as the bias."""

from __future__ import annotations

from typing import NamedTuple

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
