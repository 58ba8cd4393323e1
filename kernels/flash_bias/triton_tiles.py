"""Tile sizes of the Triton kernels: a table per architecture and shape class, no tuning at first use."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import torch

from pairformer_fast.kernels.launching import tf32

KINDS = ("forward", "backward_dq", "backward_dkv", "backward_pairs")


class Tiles(NamedTuple):
    """How one kernel cuts its work.

    Attributes
    ----------
    block_m, block_n : int
        Queries and keys of one tile, powers of two >= 16; at most 128 and 64 where tiles are flagged as dense.
    group : int
        Rows i that use one bias tile, 1, 2 or 4.
    warps, stages : int
        Warps of a program and depth of the software pipeline.
    """

    block_m: int
    block_n: int
    group: int
    warps: int
    stages: int


def tile_sizes(kind: str, dtype: torch.dtype, dim: int, rank: int, n: int, capability: tuple[int, int] | None) -> Tiles:
    """First entry of the table that covers the shape, which names the largest values of what it is for.

    Beside the parameters these are ``bytes`` of the dtype and ``exact``, 1 for fp32 unless its products are in TF32.

    Parameters
    ----------
    kind : str
        One of ``KINDS``.
    dtype : torch.dtype
        Of q, k and v.
    dim, rank, n : int
        Width of a head, rank of the factors (0 without), queries.
    capability : tuple of int, optional
        Compute capability of the GPU; None in the interpreter.

    Returns
    -------
    Tiles
    """
    table = _table()
    architecture = "interpreter" if capability is None else f"sm_{capability[0]}{capability[1]}"
    entries = table.get(architecture, table["default"])[kind]
    exact = dtype == torch.float32 and not tf32(dtype)
    shape = {"bytes": dtype.itemsize, "exact": exact, "dim": dim, "rank": rank, "n": n}
    for entry in entries:
        if all(shape[limit] <= entry[limit] for limit in shape.keys() & entry.keys()):
            return Tiles(*entry["tiles"])
    raise LookupError(f"no tile sizes of {architecture}, {kind} cover {shape}")


@cache
def _table() -> dict[str, dict[str, list[dict[str, Any]]]]:
    return json.loads(files(__package__).joinpath("tiles.json").read_text(encoding="utf-8"))
