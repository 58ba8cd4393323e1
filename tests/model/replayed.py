"""Stands in for CUDA graphs where there is no GPU: a replay runs the function again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pairformer_fast.model import replay


class Repeated:
    """A graph that computes anew, and writes where the first run's results are."""

    count = 0

    def __init__(self, run: Callable[[], Any], result: Any) -> None:
        self._run, self._result = run, result

    def replay(self) -> None:
        Repeated.count += 1
        for held, new in zip(self._result, self._run(), strict=True):
            if isinstance(held, Tensor):
                held.copy_(new)


def repeat(run: Callable[[], Any], device: torch.device, memory: Any, known: bool) -> tuple[Repeated, Any]:
    """As :func:`pairformer_fast.model.replay.capture`."""
    noise = torch.get_rng_state()
    if not known:
        run()
    result = run()
    torch.set_rng_state(noise)
    return Repeated(run, result), result


@pytest.fixture
def repeats(monkeypatch: pytest.MonkeyPatch) -> type[Repeated]:
    """Blocks are replayed on a CPU, too; counts the replays."""
    monkeypatch.setattr(replay, "capture", repeat)
    monkeypatch.setattr(Repeated, "count", 0)
    return Repeated
