"""Compile the kernels of a run before it measures, in parallel: compilation takes far longer than the measurements.

Compiled kernels stay in the caches of Triton and Inductor. What a peer tunes meanwhile, on a GPU that it shares, is
thrown away.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import torch
from benchmark_problem import Problem
from benchmark_selection import Selection

COMPILED = ("pairformer_fast *", "FlexAttention*", "TurboPairFormer", "trifast")
SECONDS = 120
LARGEST_N = 2048
"""The GPU holds several problems of this size at once."""


def compile_ahead(selection: Selection, jobs: int) -> None:
    """Run every chosen implementation that compiles kernels once, ``jobs`` of them at a time, each in a process."""
    tasks = {}
    for case in selection.cases():
        for implementation in selection.implementations(case) if case.n <= LARGEST_N else ():
            if any(fnmatch(implementation.name, pattern) for pattern in COMPILED):
                directions = selection.directions[0] if selection.directions else ""
                # A comma separates patterns.
                pattern = implementation.name.replace(",", "?")
                tasks[(case.section, str(case.n), pattern, directions)] = None
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as settings, ThreadPoolExecutor(jobs) as pool:
        tuned_nowhere = {"XDG_CONFIG_HOME": settings, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
        # The largest and the slowest to compile come last in the cases.
        words = pool.map(lambda task: _process(task, os.environ | tuned_nowhere), reversed(tasks))
        failed = [name for name in words if name]
    print(f"compiled ahead for {len(tasks)} of ours and peers in {time.monotonic() - began:.0f} s", flush=True)
    for name in failed:
        print(f"not compiled ahead: {name}", flush=True)


def run_once(selection: Selection) -> None:
    """Call what is chosen once."""
    for case in selection.cases():
        problem = Problem(case, torch.device("cuda"))
        for implementation in selection.implementations(case):
            try:
                implementation.prepare(problem).run()
                torch.cuda.synchronize()
            except ImportError as error:
                print(f"{implementation.name}: {error}")


def _process(task: tuple[str, ...], environment: dict[str, str]) -> str:
    """Name and last words of a process that failed."""
    command = [sys.executable, str(Path(__file__)), *task]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"{' '.join(task)}: more than {SECONDS} s"
    return f"{' '.join(task)}: {done.stderr.strip().splitlines()[-1:]}" if done.returncode else ""


if __name__ == "__main__":
    run_once(Selection.parse(*sys.argv[1:]))
