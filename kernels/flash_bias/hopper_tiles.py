"""Tile sizes of the Hopper kernels: a measured table, and what of it fits a shape and the shared memory."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

OWN = 64
"""Queries, or keys, that one consumer owns: the height of the tensor cores' instruction."""

SHARED_BYTES = 227 * 1024 - 2048
"""What one block may take of a multiprocessor's shared memory, less barriers and what the compiler needs."""

KINDS = ("forward", "backward_dq", "backward_dkv", "backward_pairs")


class HopperTiles(NamedTuple):
    """How one kernel cuts its work.

    Attributes
    ----------
    consumers : int
        Groups of four warps, each with 64 queries (or keys) of its own, 2 to 4.
    group : int
        Rows i that use one bias tile.
    block : int
        Keys (or queries) of a streamed tile, 32 or 64.
    stages : int
        Depth of the pipeline.
    """

    consumers: int
    group: int
    block: int
    stages: int


class Widths(NamedTuple):
    """Padded widths that decide how much shared memory a tile takes; 0 where the bias has no such part."""

    head: int
    rank: int
    dense: bool


@cache
def choose(kind: str, length: int, rows: int, widths: Widths) -> HopperTiles:
    """Cheapest entry of the table for ``length`` owned tokens, in as many of its stages as fit.

    Entries for wide factors are apart: their tiles need more registers. An entry's cost is its time at a length that
    all numbers of consumers divide, relative to the cheapest.

    Parameters
    ----------
    kind : str
        One of ``KINDS``.
    length, rows : int
        Owned tokens, and rows i.
    widths : Widths

    Returns
    -------
    HopperTiles

    Raises
    ------
    LookupError
        If nothing fits, which :func:`launch.hopper_takes` excludes.
    """
    dim = max(32, widths.head)
    entries = [entry for entry in _table()["kernels"][kind] if entry["dim"] == dim and entry["rank"] >= widths.rank]
    narrowest = min((entry["rank"] for entry in entries), default=0)
    entries = [entry for entry in entries if entry["rank"] == narrowest]
    entries.sort(key=lambda entry: -(-length // (entry["tiles"][0] * OWN)) * entry["tiles"][0] * entry["cost"])
    for entry in entries:
        tiles = HopperTiles(*entry["tiles"])
        for candidate in (tiles, tiles._replace(group=1), tiles._replace(consumers=2, group=1)):
            fitting = fit(kind, candidate, widths)
            if fitting is not None:
                return fitting if rows > 1 else fitting._replace(group=1)
    raise LookupError(f"no tiles of {kind} fit {widths}")


def fit(kind: str, tiles: HopperTiles, widths: Widths) -> HopperTiles | None:
    """The tiles in as many of their stages as fit; None if there is no room for two, or no such kernel."""
    stages = min(_stages(kind, tiles, widths), tiles.stages)
    if stages < 2 or (kind == "backward_pairs" and tiles.consumers != 3):
        return None
    return tiles._replace(stages=stages)


def _stages(kind: str, tiles: HopperTiles, widths: Widths) -> int:
    """Stages of the pipeline that fit beside what is held for the whole work item."""
    token, factor = 2 * widths.head, 2 * widths.rank
    table = 2 * OWN * tiles.block * tiles.consumers if widths.dense else 0
    if kind == "forward":
        places = 2 if tiles.consumers == 4 or tiles.block == widths.head else 1
        held = places * tiles.consumers * OWN * (tiles.group * token + factor)
        stage = tiles.block * (2 * tiles.group * token + factor) + table
    elif kind == "backward_pairs":
        held = 2 * OWN * OWN * tiles.consumers
        stage = 2 * OWN * token * (1 + tiles.consumers) + 8 * OWN * tiles.consumers
    else:
        held = tiles.consumers * OWN * (4 * tiles.group * token + factor)
        statistics = 8 * tiles.group * tiles.block if kind == "backward_dkv" else 0
        stage = tiles.block * (2 * tiles.group * token + factor) + table + statistics
    return (SHARED_BYTES - held) // stage


@cache
def _table() -> dict[str, Any]:
    return json.loads(files(__package__).joinpath("hopper_tiles.json").read_text(encoding="utf-8"))
