"""What the public function accepts; errors name the argument, what it must be and what it is."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from pairformer_fast.kernels.backend import check_device
from pairformer_fast.kernels.flash_bias.terms import TILE, BiasTerms


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise TypeError or ValueError unless queries, keys and values fit together."""
    if q.ndim < 4:
        raise ValueError(f"q must be [B, I, N, H, D] or [B, N, H, D], but got shape {list(q.shape)}")
    if not q.is_floating_point():
        raise TypeError(f"q must be floating point, but got {q.dtype}")
    for name, x in (("q", q), ("k", k)):
        if 0 in x.shape:
            raise ValueError(f"{name} must have no empty dimension, but got shape {list(x.shape)}")
    _check_shape("k", k, "B I M H D", [*q.shape[:-3], None, *q.shape[-2:]], q)
    _check_shape("v", v, "B I M H D", [*k.shape], q)
    for name, x in (("k", k), ("v", v)):
        _check_like_q(name, x, q)


def check_terms(terms: BiasTerms, q: Tensor, k: Tensor) -> None:
    """Raise TypeError or ValueError unless the parts of the bias fit to queries and keys, and to one another."""
    leading, queries, heads, keys = _batch(q), q.shape[-3], q.shape[-2], k.shape[-3]
    dense, phi_q, phi_k, table, dense_tiles = terms
    if dense is not None:
        name = "bias" if phi_q is None else "dense"
        _check_like_q(name, dense, q)
        _check_shape(name, dense, "B H N M", [*leading, heads, queries, keys], q)
    if phi_q is None or phi_k is None:
        return
    _check_like_q("phi_q", phi_q, q)
    _check_like_q("phi_k", phi_k, q)
    _check_shape("phi_q", phi_q, "B H N R", [*leading, heads, queries, None], q)
    _check_shape("phi_k", phi_k, "B H M R", [*leading, heads, keys, None], q)
    if phi_q.shape[-1] != phi_k.shape[-1]:
        raise ValueError(f"phi_q and phi_k must have the same rank, but got {phi_q.shape[-1]} and {phi_k.shape[-1]}")
    if phi_q.shape[-1] == 0:
        raise ValueError(f"phi_q must have a rank R >= 1, but got shape {list(phi_q.shape)}")
    if table is not None:
        _check_table(table, q)
    if (dense is None) != (dense_tiles is None):
        given, missing = ("dense", "dense_tiles") if dense_tiles is None else ("dense_tiles", "dense")
        raise ValueError(f"dense and dense_tiles belong together, but got {given} and {missing} = None")
    if dense_tiles is not None:
        tiles = [*leading, heads, ceil(queries / TILE), ceil(keys / TILE)]
        _check_bool("dense_tiles", dense_tiles, f"B H N/{TILE} M/{TILE}", tiles, q)


def check_masks(mask: Tensor | None, pair_mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Raise TypeError or ValueError unless the masks are bool with an entry for every key, or query and key."""
    keys = k.shape[-3]
    if mask is not None:
        _check_bool("mask", mask, "B I M", [*q.shape[:-3], keys], q)
    if pair_mask is not None:
        _check_bool("pair_mask", pair_mask, "B N M", [*_batch(q), q.shape[-3], keys], q)


def check_gate(gate: Tensor | None, q: Tensor) -> None:
    """Raise TypeError or ValueError unless the gate is like the queries."""
    if gate is not None:
        _check_like_q("gate", gate, q)
        _check_shape("gate", gate, "B I N H D", [*q.shape], q)


def _batch(q: Tensor) -> tuple[int, ...]:
    return tuple(q.shape[: max(1, q.ndim - 4)])


def _check_shape(name: str, x: Tensor, layout: str, sizes: Sequence[int | None], q: Tensor) -> None:
    """``layout`` is of the triangle form, one letter for each of ``sizes``; None is any size."""
    if _fits(x.shape, sizes):
        return
    letters = layout.split()
    if q.ndim == 4 and "I" in letters:
        letters.remove("I")
    if q.ndim > 5:
        letters[0] = "*"
    want = ", ".join(letters[i - len(sizes)] if size is None else str(size) for i, size in enumerate(sizes))
    raise ValueError(f"{name} must be [{', '.join(letters)}] = [{want}] to fit q and k, but got {list(x.shape)}")


def _fits(shape: Sequence[int], sizes: Sequence[int | None]) -> bool:
    if len(shape) != len(sizes):
        return False
    for got, want in zip(shape, sizes, strict=True):  # noqa: SIM110 -- a generator would double the time of all checks
        if want is not None and got != want:
            return False
    return True


def _check_like_q(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise TypeError(f"{name} must have the dtype of q, {q.dtype}, but got {x.dtype}")
    check_device(name, x, "q", q)


def _check_bool(name: str, x: Tensor, layout: str, sizes: Sequence[int | None], q: Tensor) -> None:
    if x.dtype != torch.bool:
        raise TypeError(f"{name} must be torch.bool, but got {x.dtype}; convert 0/1 masks by {name} > 0.5")
    _check_shape(name, x, layout, sizes, q)
    check_device(name, x, "q", q)


def _check_table(table: Tensor, q: Tensor) -> None:
    if table.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"table must be torch.float32 or have the dtype of q, {q.dtype}, but got {table.dtype}")
    heads = q.shape[-2]
    if table.ndim != 2 or table.shape[0] != heads or table.shape[1] % 2 == 0:
        raise ValueError(f"table must be [H, 2 W + 1] = [{heads}, an odd number], but got {list(table.shape)}")
    check_device("table", table, "q", q)
