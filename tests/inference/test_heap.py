"""Freed memory of tensors, in processes of their own: what malloc is told holds for the rest of a process."""

import ctypes
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from pairformer_fast.inference.heap import keep_freed_memory

if {keep}:
    keep_freed_memory()
torch.ones(10 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(60):
    torch.ones(10 * 2**20)  # 40 MiB, a pair representation of 286 tokens
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


def bytes_cleared(keep: bool) -> int:
    """Memory that sixty tensors of 40 MiB, one after the other, had from the system."""
    run = subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told anything: run on Linux with glibc")
def test_tensors_take_the_place_of_those_before() -> None:
    assert bytes_cleared(keep=False) > 2000 * 2**20
    old = tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 35)
    assert old or bytes_cleared(keep=True) < 700 * 2**20


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from pairformer_fast.inference import heap

    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    heap.keep_freed_memory()
    heap.return_free_memory()
