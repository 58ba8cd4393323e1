"""What attention costs by the form of its bias, and making factors, as measured (``data/attention_costs.json``)."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from itertools import pairwise
from math import log

import torch
from torch import Tensor

from pairformer_fast.config import Backend, BiasMethod, Frozen

FORMS = {5: "triangle", 4: "single"}
"""By the number of dimensions of q."""


class ByKind(Frozen):
    """Milliseconds of one attention by N, for each form of the bias.

    Attributes
    ----------
    dense, factors, mixed : dict of int to float
        ``factors`` at the table's rank; ``mixed`` with the table's share of dense tiles beside them.
    making : dict of int to float
        What it takes to make factors of one rank and to judge them. A search by tolerance makes those of several.
    """

    dense: dict[int, float]
    factors: dict[int, float]
    mixed: dict[int, float]
    making: dict[int, float]


class AttentionCosts(Frozen):
    """Forward pass on one device, made by ``scripts/make_attention_costs.py``.

    Attributes
    ----------
    sources : list of str
    device, torch, triton, commit : str
        Where the times come from: bf16 on a GPU with Triton and Gluon kernels, fp32 on one thread of a CPU with
        PyTorch's fused attention. Those of making factors may be of another commit.
    method : BiasMethod
        What makes the factors.
    rank, share : int, float
        At which ``triangle`` and ``single`` are measured at every N.
    triangle, single : ByKind
        4 heads of 32 channels in N rows; 16 heads of 24 channels, of which the GPU's ``making`` has 4.
    by_rank, by_share : dict of float to float
        Milliseconds of triangle attention at one N by rank, and by share of dense tiles.
    """

    sources: list[str]
    device: str
    torch: str
    triton: str | None
    commit: str
    method: BiasMethod
    rank: int
    share: float
    triangle: ByKind
    single: ByKind
    by_rank: dict[float, float]
    by_share: dict[float, float]

    def factors(self, form: str, tokens: int, rank: int) -> float | None:
        """Time of attention with factors relative to that with the dense bias; making them is not in it.

        Interpolated in log N, beyond the sizes measured as at the nearest; None above the ranks measured.
        """
        if rank > max(self.by_rank):
            return None
        times = getattr(self, form)
        of_rank = _between(self.by_rank, rank) / self.by_rank[self.rank]
        return _ratio(times.factors, times.dense, tokens) * of_rank

    def mixed(self, form: str, tokens: int, rank: int, share: float) -> float | None:
        """The same with a share of the tiles dense, 0 to 1; the kernel reads both, so none is no cheaper than some."""
        if rank > max(self.by_rank):
            return None
        times = getattr(self, form)
        of_rank = _between(self.by_rank, rank) / self.by_rank[self.rank]
        of_share = _between(self.by_share, share) / self.by_share[self.share]
        return _ratio(times.mixed, times.dense, tokens) * of_rank * of_share

    def making(self, form: str, tokens: int) -> float:
        """Time of making and judging factors relative to that of attention with the dense bias."""
        times = getattr(self, form)
        return _ratio(times.making, times.dense, tokens)


@cache
def shipped() -> dict[str, AttentionCosts]:
    """The tables of the package: ``gpu`` and ``cpu``."""
    file = resources.files("pairformer_fast.data") / "attention_costs.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    return {device: AttentionCosts.model_validate(table) for device, table in content.items()}


def measured_costs(backend: Backend, device: str) -> AttentionCosts | None:
    """The table for attention on a device of this type (``cuda``, ``cpu``); None where no times were measured."""
    if backend is Backend.TRITON:
        return shipped()["gpu"]
    return shipped()["cpu"] if (backend, device) == (Backend.TORCH, "cpu") else None


def predicted_cost(backend: Backend, q: Tensor, rank: int, dense_share: float = 0.0) -> float | None:
    """Predicted time of attention with factors relative to the dense bias; None where no such time was measured.

    Parameters
    ----------
    backend : Backend
        What computes attention.
    q : Tensor
        ``[B, I, N, H, D]`` or ``[B, N, H, D]``.
    rank : int
        Columns of the factors.
    dense_share : float
        Share of the tiles that are dense beside them.
    """
    return _predicted(backend, q.device.type, FORMS[q.ndim], q.shape[-3], rank, dense_share)


@torch.compiler.assume_constant_result
def _predicted(backend: Backend, device: str, form: str, tokens: int, rank: int, dense_share: float) -> float | None:
    costs = measured_costs(backend, device)
    if costs is None:
        return None
    return costs.mixed(form, tokens, rank, dense_share) if dense_share else costs.factors(form, tokens, rank)


def _ratio(times: dict[int, float], dense: dict[int, float], tokens: int) -> float:
    return _between({log(n): times[n] / dense[n] for n in times}, log(max(tokens, 1)))


def _between(table: dict[float, float], at: float) -> float:
    """Linear interpolation, constant beyond the ends."""
    places = sorted(table)
    at = min(max(at, places[0]), places[-1])
    for low, high in pairwise(places):
        if at <= high:
            return table[low] + (table[high] - table[low]) * (at - low) / (high - low)
    return table[places[-1]]
