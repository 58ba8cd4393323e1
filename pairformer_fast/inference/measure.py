"""Time and peak memory of a stretch of code."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pairformer_fast.inference.heap import return_free_memory

_STATM = Path("/proc/self/statm")
_SAMPLE_SECONDS = 0.005


@dataclass
class Usage:
    """Filled in when the measured code ends.

    Attributes
    ----------
    seconds : float
        Wall time.
    peak_bytes : int or None
        Peak above what was in use at the start. On CUDA what torch allocated; on a CPU the resident memory of the
        process, sampled every 5 ms; None where the system does not tell.
    """

    seconds: float = 0.0
    peak_bytes: int | None = None


@contextmanager
def measure(device: torch.device) -> Iterator[Usage]:
    """Measure the body of a ``with`` statement that works on ``device``."""
    usage = Usage()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        yield usage
        torch.cuda.synchronize(device)
        usage.seconds = time.perf_counter() - start
        usage.peak_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    return_free_memory()
    with _ResidentMemory() as memory:
        start = time.perf_counter()
        yield usage
        usage.seconds = time.perf_counter() - start
    usage.peak_bytes = memory.increase


class _ResidentMemory:
    """Watches the resident memory of the process from a thread."""

    def __enter__(self) -> _ResidentMemory:
        self._start = self._peak = self._read()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    @property
    def increase(self) -> int | None:
        return (self._peak - self._start) if _STATM.is_file() else None

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, self._read())

    def _read(self) -> int:
        if not _STATM.is_file():
            return 0
        return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
