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
SHARE_OF_FREE = 0.5
"""Temporaries of a slab, relative to the memory that is free."""
STEP = 2**26
"""Free memory is counted in these, so that small changes of it do not change slabs."""
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
    allowed = max(int(SHARE * z.nbytes), SMALLEST_BYTES)
    free = free_bytes(z.device) if allowed > SMALLEST_BYTES else None
    if free is not None:
        allowed = min(allowed, max(STEP, int(SHARE_OF_FREE * free) // STEP * STEP))
    return _rows(batch, rows, columns, channels * z.element_size(), allowed)


def free_bytes(device: torch.device) -> int | None:
    """Memory that a CUDA device could still give, what PyTorch keeps of it included; None where nobody can say."""
    if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


@cache
def _rows(batch: int, rows: int, columns: int, bytes_of_pair: int, allowed: int) -> int | None:
    fitting = allowed // (batch * columns * bytes_of_pair) // MULTIPLE * MULTIPLE
    slab = max(MULTIPLE, fitting)
    if slab >= rows:
        return None
    count = -(-rows // slab)
    slab = -(-rows // count // MULTIPLE) * MULTIPLE
    _log.info("pair representation of %d x %d tokens: slabs of %d rows, %d MiB", rows, columns, slab, allowed >> 20)
    return slab
