"""How many rows of the pair representation an operation works on at a time."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

SHARE = 0.5
"""Temporaries of a slab, relative to the pair representation."""
SMALLEST_BYTES = 2**28
"""What is not worth cutting."""
MULTIPLE = 64

_log = logging.getLogger(__name__)


def rows_at_a_time(z: Tensor, channels: int) -> int | None:
    """Rows of a slab such that its temporaries are small beside the pair representation; None for all at once.

    In training nothing is cut: the backward pass needs whole tensors.

    Parameters
    ----------
    z : Tensor
        ``[B, I, J, C_z]`` pair representation.
    channels : int
        Channels of all temporaries of a token pair, in the dtype of z.
    """
    if torch.is_grad_enabled():
        return None
    batch, rows, columns, _ = z.shape
    return _rows(batch, rows, columns, channels * z.element_size(), int(SHARE * z.nbytes))


@cache
def _rows(batch: int, rows: int, columns: int, bytes_of_pair: int, share: int) -> int | None:
    allowed = max(share, SMALLEST_BYTES)
    fitting = allowed // (batch * columns * bytes_of_pair) // MULTIPLE * MULTIPLE
    slab = max(MULTIPLE, fitting)
    if slab >= rows:
        return None
    count = -(-rows // slab)
    slab = -(-rows // count // MULTIPLE) * MULTIPLE
    _log.info("pair representation of %d x %d tokens: slabs of %d rows, %d MiB", rows, columns, slab, allowed >> 20)
    return slab
