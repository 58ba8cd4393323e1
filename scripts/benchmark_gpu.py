"""Timing on a GPU, what the device can do at most, and the times no attention kernel can beat."""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from benchmark_problem import Case, Kind
from torch import Tensor

WARMUP_MS, MEASURED_MS = 10, 40
MIN_RUNS, MAX_RUNS = 20, 100
SLOW_MS, SLOW_RUNS = 30.0, 5
WARM_CALLS = 3
FLUSHED_BYTES = 256 * 2**20
"""More than the L2 cache holds."""
EXP2_PER_CLOCK = 16
"""Exponentials per clock and multiprocessor of the special-function units (compute capability 9.0)."""
MAX_MESSAGE = 300


class Timing(NamedTuple):
    """Milliseconds of one call: median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


class NotCaptured(Exception):
    """The call cannot be timed as a CUDA graph; says why."""


class DeviceLost(RuntimeError):
    """The CUDA context is gone: no further kernel can run in this process."""


def release() -> None:
    """Free what the last implementation held; find out whether the device survived it."""
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLost(str(error)) from error


def describe(error: BaseException) -> str:
    """Class and message of an error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:MAX_MESSAGE]


class Stopwatch:
    """Time and peak memory of calls on the current GPU. Every timed call begins with a cold L2 cache."""

    def graph(self, call: Callable[[], Any], fault: Callable[[Any], str]) -> Timing:
        """Time the device's work in ``call``, whatever the host needs to launch it, by replays of a CUDA graph.

        ``call`` has run before: kernels are compiled and tuned. ``fault`` says what is wrong with its result, if
        anything: a kernel that the graph has missed (on another stream, say) leaves poison there.

        Raises
        ------
        NotCaptured
            If the call cannot be captured, or replays do not give its result.
        """
        try:
            graph, result = _capture(call)
            for tensor in _tensors(result):
                tensor.detach().fill_(torch.nan)
            self.restore()
            graph.replay()
            torch.cuda.synchronize()
            if found := fault(result):
                raise NotCaptured(f"a replay gives another result: {found}")
            return self._replays(graph)
        except NotCaptured:
            raise
        except Exception as error:
            # What broke the capture comes first; that the capture could not be ended follows from it.
            raise NotCaptured(describe(error.__context__ or error)) from error

    def eager(self, call: Callable[[], object]) -> Timing:
        """Time ``call`` as Python makes it, which is the time of the host where that is longer than the device's."""
        from triton.testing import do_bench

        once = _elapsed(call)
        if once < SLOW_MS:
            measured = max(MEASURED_MS, int(MIN_RUNS * once))
            return Timing(*do_bench(call, warmup=WARMUP_MS, rep=measured, quantiles=[0.5, 0.2, 0.8]))
        return _quantiles([_elapsed(call) for _ in range(SLOW_RUNS)])

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Memory of one call above what is allocated already, its outputs included."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def restore(self) -> None:
        """What is done before every timed replay, and is not timed."""

    def _replays(self, graph: torch.cuda.CUDAGraph) -> Timing:
        once = _elapsed(graph.replay)
        runs = SLOW_RUNS if once > SLOW_MS else min(MAX_RUNS, max(MIN_RUNS, int(MEASURED_MS / once)))
        for _ in range(int(WARMUP_MS / once)):
            graph.replay()
        cache = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int32, device="cuda")
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for start, end in events:
            self.restore()
            cache.zero_()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return _quantiles([start.elapsed_time(end) for start, end in events])


class RestoringStopwatch(Stopwatch):
    """A stopwatch for calls that write to their inputs.

    Parameters
    ----------
    restore : callable
        Puts the inputs back; runs before every call and is not timed.
    """

    def __init__(self, restore: Callable[[], None]) -> None:
        self.restore = restore

    def eager(self, call: Callable[[], object]) -> Timing:
        """Time ``call`` as Python makes it; the device is idle when it begins, so that the host's time shows."""
        once = self._once(call)
        runs = SLOW_RUNS if once > SLOW_MS else min(MAX_RUNS, max(MIN_RUNS, int(MEASURED_MS / once)))
        return _quantiles([self._once(call) for _ in range(runs)])

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """As in the base class, after the inputs are put back."""
        self.restore()
        return super().peak_bytes(call)

    def _once(self, call: Callable[[], object]) -> float:
        self.restore()
        torch.empty(FLUSHED_BYTES // 4, dtype=torch.int32, device="cuda").zero_()
        torch.cuda.synchronize()
        return _elapsed(call)


def _capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Graph of ``call`` and the result that replays write to."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_CALLS):
            call()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = call()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own stream behind
    return graph, result


def _tensors(result: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples and dictionaries."""
    if isinstance(result, Tensor):
        yield result
    else:
        for part in result.values() if isinstance(result, dict) else result:
            yield from _tensors(part)


def _elapsed(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _quantiles(times: list[float]) -> Timing:
    return Timing(*torch.tensor(times).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist())


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
        copied = stopwatch.eager(_copy_of_2_gib()).median * 1e-3
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        product = stopwatch.eager(lambda: a @ b).median * 1e-3
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
