"""Timing on a GPU, what the device can do at most, and the times no attention kernel can beat."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from benchmark_problem import Case, Kind

WARMUP_MS, MEASURED_MS = 25, 100
SLOW_MS, SLOW_RUNS = 50.0, 3
EXP2_PER_CLOCK = 16
"""Exponentials per clock and multiprocessor of the special-function units (compute capability 9.0)."""


class Timing(NamedTuple):
    """Milliseconds of one call: median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


class Stopwatch:
    """Time and peak memory of calls on the current GPU."""

    def time(self, call: Callable[[], object]) -> Timing:
        """Time calls that begin with a cold L2 cache; ``call`` has run before and is compiled."""
        from triton.testing import do_bench

        once = self._events(call)
        if once < SLOW_MS:
            return Timing(*do_bench(call, warmup=WARMUP_MS, rep=MEASURED_MS, quantiles=[0.5, 0.2, 0.8]))
        runs = sorted(self._events(call) for _ in range(SLOW_RUNS))
        return Timing(statistics.median(runs), runs[0], runs[-1])

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Memory of one call above what is allocated already, its outputs included."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _events(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches, per second: bytes copied, bf16 operations, clocks under load, exponentials."""

    copy: float
    matmul: float
    clock: float
    exp2: float

    @classmethod
    def measure(cls, stopwatch: Stopwatch) -> Ceilings:
        """Measure once, with about 5 GB of device memory."""
        copied = stopwatch.time(_copy_of_2_gib()).median * 1e-3
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        product = stopwatch.time(lambda: a @ b).median * 1e-3
        clock = _clock_under_attention()
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        return cls(2 * 2**31 / copied, 2 * 8192**3 / product, clock, processors * EXP2_PER_CLOCK * clock)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each ceiling."""
        values = {
            "device copy": (self.copy / 1e12, "TB/s, bytes read and written"),
            "bf16 matmul 8192^3": (self.matmul / 1e12, "TFLOP/s"),
            "SM clock under attention": (self.clock / 1e6, "MHz"),
            "exp2": (self.exp2 / 1e12, "10^12/s, special-function units at that clock"),
        }
        return [{"op": "ceiling", "impl": name, "value": v, "unit": unit} for name, (v, unit) in values.items()]

    def floor(self, case: Case, kind: Kind) -> dict[str, Any]:
        """Least time of ``case``: exponentials, matrix products and bytes, each as if the others were free.

        The backward computes the scores again, which takes one exponential and one product, and four products more.
        """
        rows, size = case.rows or 1, case.dtype.itemsize
        scores = rows * case.heads * case.n**2
        tokens = rows * case.heads * case.n * case.dim
        inner = case.rank if kind is Kind.FACTORS else 0
        table = case.heads * case.n**2 if kind is Kind.DENSE else 2 * case.heads * case.n * inner
        passes = 2 if case.backward else 1
        products = (7 if case.backward else 2) * case.dim + passes * inner
        moved = (12 if case.backward else 4) * tokens + (3 if case.backward else 1) * table
        floors = {
            "exp2_ms": 1e3 * passes * scores / self.exp2,
            "tensor_ms": 1e3 * 2 * scores * products / self.matmul,
            "bytes_ms": 1e3 * size * moved / self.copy,
        }
        return floors | {"ms_median": max(floors.values())}


def _copy_of_2_gib() -> Callable[[], object]:
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _clock_under_attention() -> float:
    """SM clock in Hz while attention runs."""
    q = torch.randn(512, 4, 512, 32, device="cuda", dtype=torch.bfloat16)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        for _ in range(200):
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
        torch.cuda.synchronize()
    for _ in range(2000):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--id=0"]
    clock = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    torch.cuda.synchronize()
    return float(clock.strip()) * 1e6
