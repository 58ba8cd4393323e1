"""What the steps of one run of OpenFold3's sampler have in common, bounded by the free memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor

from pairformer_fast.inference.validate import available_bytes

logger = logging.getLogger(__name__)

SHARE = 0.5
"""Of the free memory, what a run of the sampler may keep."""


def free_bytes(device: torch.device) -> int:
    """Memory that is left, with what PyTorch holds unused on a GPU."""
    free = available_bytes(device)
    if device.type == "cuda":
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free


class Inputs:
    """Features, representations and a setting of a run of the sampler, to be told from any others."""

    def __init__(self, batch: dict[str, Any], trunk: tuple[Tensor, ...], setting: Any) -> None:
        self._tensors = (*trunk, *(x for _, x in sorted(batch.items()) if isinstance(x, Tensor)))
        self._state = (setting, *(0 if x.is_inference() else x._version for x in self._tensors))

    def same(self, other: Self) -> bool:
        """Whether both are of the same tensors, not written to in between."""
        if self._state != other._state or len(self._tensors) != len(other._tensors):
            return False
        return all(a is b for a, b in zip(self._tensors, other._tensors, strict=True))


class Kept:
    """What the steps of one run of the sampler have in common.

    Parameters
    ----------
    device : torch.device
        Whose free memory bounds what is kept.
    parts : sequence of Keeps
        Modules that take part.
    readers : sequence of Keeps
        Those of them that read the conditioned pair representation.

    Attributes
    ----------
    readers : set of Keeps
        Those of them that still do: others have kept what they need of it.
    """

    def __init__(self, device: torch.device, parts: Sequence[Keeps], readers: Sequence[Keeps]) -> None:
        self._left = int(SHARE * free_bytes(device))
        self._parts = frozenset(parts)
        self._all_readers = frozenset(readers)
        self._values: dict[Keeps, Any] = {}
        self._sizes: dict[Keeps, int] = {}
        self._refused: set[Keeps] = set()
        self.readers = set(readers)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The run of the sampler: within it, and in this thread alone, the parts know what is kept."""
        token = _RUNNING.set(self)
        try:
            yield
        finally:
            _RUNNING.reset(token)
            self.clear()

    def __contains__(self, part: Keeps) -> bool:
        return part in self._parts

    def of(self, owner: Keeps) -> Any:
        """What a module has kept; None if nothing."""
        return self._values.get(owner)

    @property
    def complete(self) -> bool:
        """Whether everybody keeps all that the steps share."""
        return not self.readers and not self._refused

    def has_room(self, owner: Keeps) -> bool:
        """Whether nothing of a module has been refused yet."""
        return owner not in self._refused

    def keep(self, owner: Keeps, value: Any, size: int) -> bool:
        """Keep ``value``, of ``size`` bytes, for a module, if there is room; the log says so if there is not."""
        more = size - self._sizes.get(owner, 0)
        if more > self._left:
            self.refuse(owner)
            logger.warning(
                "diffusion: %s computes in every step what would take %.0f MB to keep, where %.0f MB may be taken",
                *(type(owner).__name__, more / 1e6, self._left / 1e6),
            )
            return False
        self._left -= more
        self._values[owner] = value
        self._sizes[owner] = size
        return True

    def refuse(self, owner: Keeps) -> None:
        """Let a module do all of its work in every step."""
        self._refused.add(owner)

    def clear(self) -> None:
        """Forget everything."""
        self._left += sum(self._sizes.values())
        self._values.clear()
        self._sizes.clear()
        self._refused.clear()
        self.readers = set(self._all_readers)


_RUNNING: ContextVar[Kept | None] = ContextVar("_RUNNING", default=None)
"""Not an attribute of the modules: several threads may sample with one model at a time."""


class Keeps:
    """A part of the diffusion module that takes part in a run of the sampler."""

    @property
    def kept(self) -> Kept | None:
        """What this run of the sampler has in common; None if no sampler runs that the module is a part of."""
        kept = _RUNNING.get()
        return kept if kept is not None and self in kept else None
