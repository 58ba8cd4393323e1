"""What glibc's malloc does with memory that tensors on a CPU leave behind; elsewhere nothing happens."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MIB = 2**20
LARGEST_KEPT = 128 * MIB
"""Larger blocks, such as the logits of the reference's triangle attention, still come from the system."""
LARGEST_OLD_GLIBC = 32 * MIB
"""More than this glibc before 2.35 refuses as a threshold."""
KEPT_AT_MOST = 1024 * MIB
"""Free memory at the end of the heap beyond this goes back to the system."""


def keep_freed_memory() -> None:
    """Let the process reuse freed blocks of the size of a pair representation.

    By default every one of more than 32 MiB comes from the system anew, which clears its pages first. What is kept does
    not always fit what is wanted next, so that the process may grow by more than it needs.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    if not mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT):
        mallopt(M_MMAP_THRESHOLD, LARGEST_OLD_GLIBC)
    mallopt(M_TRIM_THRESHOLD, KEPT_AT_MOST)


def return_free_memory() -> None:
    """Hand freed memory back to the system: pages that malloc keeps would hide what measured code needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
