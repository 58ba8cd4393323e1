import time

import pytest
import torch

from pairformer_fast.inference.measure import measure


def test_time_and_memory_of_the_body_only():
    kept = torch.ones(2**24)
    with measure(torch.device("cpu")) as usage:
        block = torch.ones(2**25)  # 128 MiB
        time.sleep(0.05)
        del block
    assert 0.05 <= usage.seconds < 2
    assert usage.peak_bytes == pytest.approx(2**27, rel=0.1)
    del kept


def test_memory_that_an_earlier_run_freed_is_counted_again():
    peaks = []
    for _ in range(2):
        with measure(torch.device("cpu")) as usage:
            blocks = [torch.ones(2**18) for _ in range(64)]  # 64 MiB in pieces that malloc likes to keep
            time.sleep(0.03)
            del blocks
        peaks.append(usage.peak_bytes)
    assert peaks[1] == pytest.approx(2**26, rel=0.2)
