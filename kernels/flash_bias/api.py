"""Public function of the operation: validation and dispatch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pairformer_fast.config import Backend


@dataclass(frozen=True, eq=False)
class Factors:
    """Thin factors of a pair bias, ``bias = phi_q @ phi_k.mT``.

    Attributes
    ----------
    phi_q, phi_k : Tensor
        ``[B, H, N, R]``, floating point. Heads of a lower rank than R have zero columns at the end.
    """

    phi_q: Tensor
    phi_k: Tensor


def flash_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | Factors | None = None,
    mask: Tensor | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """Softmax attention ``softmax(q k^T / sqrt(D) + bias) v`` with one bias for all rows.

    Differentiable in ``q``, ``k``, ``v`` and the bias or its factors. Computes in the dtype of its inputs, whatever
    autocast says.

    Parameters
    ----------
    q, k, v : Tensor
        ``[B, I, N, H, D]`` (triangle attention, the I rows share the bias) or ``[B, N, H, D]``, one floating dtype,
        any strides. ``q`` is not scaled beforehand.
    bias : Tensor or Factors, optional
        Additive logits ``[B, H, N, N]`` (query, key), or their factors; dtype of ``q``.
    mask : Tensor, optional
        Bool, ``[B, I, N]`` per row and key (``[B, N]`` in the single form), True = keep. A row without any key gives
        zeros and zero gradients.
    backend : Backend
        ``auto`` takes ``torch``.

    Returns
    -------
    Tensor
        Shape and dtype of ``q``.

    Raises
    ------
    TypeError, ValueError
        If dtypes, devices or shapes do not fit together, or ``backend`` is unknown.

    Notes
    -----
    Source: FlashBias (Wu et al., NeurIPS 2025, arXiv 2505.12044); AF3 Algorithms 14, 15 and 24.
    """
    backend = Backend(backend)
    _check_qkv(q, k, v)
    tables = _bias_tensors(bias)
    for name, table in tables.items():
        _check_like_q(name, table, q)
    _check_bias_shape(tables, q)
    _check_mask(mask, q)

    single = q.ndim == 4
    if single:
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        mask = None if mask is None else mask.unsqueeze(1)
    factors = (bias.phi_q, bias.phi_k) if isinstance(bias, Factors) else None
    dense = bias if isinstance(bias, Tensor) else None

    match backend:
        case Backend.REFERENCE:
            from pairformer_fast.kernels.flash_bias.reference import attention
        case Backend.AUTO | Backend.TORCH:
            from pairformer_fast.kernels.flash_bias.torch_sdpa import attention

    with torch.autocast(q.device.type, enabled=False):
        out = attention(q, k, v, dense, factors, mask)
    return out.squeeze(1) if single else out


def _bias_tensors(bias: Tensor | Factors | None) -> dict[str, Tensor]:
    if bias is None:
        return {}
    if isinstance(bias, Factors):
        return {"phi_q": bias.phi_q, "phi_k": bias.phi_k}
    if isinstance(bias, Tensor):
        return {"bias": bias}
    raise TypeError(f"bias must be None, a Tensor or Factors, but got {type(bias).__name__}")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim not in (4, 5):
        raise ValueError(f"q must be [B, I, N, H, D] or [B, N, H, D], but got shape {list(q.shape)}")
    if not q.is_floating_point():
        raise TypeError(f"q must be floating point, but got {q.dtype}")
    if 0 in q.shape:
        raise ValueError(f"q must have no empty dimension, but got shape {list(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} must have the shape of q, {list(q.shape)}, but got {list(x.shape)}")
        _check_like_q(name, x, q)


def _check_like_q(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise TypeError(f"{name} must have the dtype of q, {q.dtype}, but got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, but got {x.device}")


def _check_bias_shape(tables: dict[str, Tensor], q: Tensor) -> None:
    batch, tokens, heads = q.shape[0], q.shape[-3], q.shape[-2]
    for name, table in tables.items():
        if name == "bias":
            if table.shape != (batch, heads, tokens, tokens):
                square = [batch, heads, tokens, tokens]
                raise ValueError(f"bias must be [B, H, N, N] = {square} for this q, but got {list(table.shape)}")
        elif table.ndim != 4 or table.shape[:3] != (batch, heads, tokens) or table.shape[3] == 0:
            want = f"[{batch}, {heads}, {tokens}, R >= 1]"
            raise ValueError(f"{name} must be [B, H, N, R] = {want} for this q, but got {list(table.shape)}")
    if "phi_q" in tables and tables["phi_q"].shape != tables["phi_k"].shape:
        ranks = tables["phi_q"].shape[3], tables["phi_k"].shape[3]
        raise ValueError(f"phi_q and phi_k must have the same rank, but got {ranks[0]} and {ranks[1]}")


def _check_mask(mask: Tensor | None, q: Tensor) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be torch.bool with True = keep, but got {mask.dtype}; convert 0/1 masks by mask > 0.5"
        )
    if mask.shape != q.shape[:-2]:
        layout = "[B, I, N]" if q.ndim == 5 else "[B, N]"
        raise ValueError(f"mask must be {layout} = {list(q.shape[:-2])} for this q, but got {list(mask.shape)}")
    if mask.device != q.device:
        raise ValueError(f"mask must be on the device of q, {q.device}, but got {mask.device}")
