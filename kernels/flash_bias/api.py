"""Public function of the operation: dispatch. The arguments are checked in ``validate.py``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal, overload

import torch
from torch import Tensor

from pairformer_fast.config import Backend
from pairformer_fast.kernels.backend import HAS_TRITON, TRITON_DTYPES
from pairformer_fast.kernels.flash_bias.terms import BiasTerms
from pairformer_fast.kernels.flash_bias.validate import check_gate, check_masks, check_qkv, check_terms

TRITON_HEAD_DIM = 128
"""Largest head dimension D of the Triton kernel."""


@dataclass(frozen=True, eq=False)
class Factors:
    """Thin factors of a pair bias, ``bias = phi_q @ phi_k.mT``, and what they leave out.

    Attributes
    ----------
    phi_q, phi_k : Tensor
        ``[B, H, N, R]`` of the queries and ``[B, H, M, R]`` of the keys, dtype of ``q``. Heads of a lower rank than R
        have zero columns at the end.
    table : Tensor, optional
        ``[H, 2 W + 1]``, fp32 or dtype of ``q``: adds ``table[h, clip(i - j, -W, W) + W]`` for query token i and key
        token j.
    dense : Tensor, optional
        ``[B, H, N, M]``, dtype of ``q``: the bias, instead of factors and table, in the tiles flagged by
        ``dense_tiles``.
    dense_tiles : Tensor, optional
        Bool ``[B, H, ceil(N / 64), ceil(M / 64)]``, one flag for 64 x 64 entries; given together with ``dense``.
    """

    phi_q: Tensor
    phi_k: Tensor
    table: Tensor | None = field(default=None, kw_only=True)
    dense: Tensor | None = field(default=None, kw_only=True)
    dense_tiles: Tensor | None = field(default=None, kw_only=True)


@overload
def flash_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | Factors | None = None,
    mask: Tensor | None = None,
    backend: Backend = Backend.AUTO,
    *,
    pair_mask: Tensor | None = None,
    gate: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def flash_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | Factors | None = None,
    mask: Tensor | None = None,
    backend: Backend = Backend.AUTO,
    *,
    pair_mask: Tensor | None = None,
    gate: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def flash_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | Factors | None = None,
    mask: Tensor | None = None,
    backend: Backend = Backend.AUTO,
    *,
    pair_mask: Tensor | None = None,
    gate: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention ``softmax(q k^T / sqrt(D) + bias) v`` with one bias for all rows.

    Differentiable in ``q``, ``k``, ``v``, ``gate`` and the floating parts of the bias. Computes in the dtype of its
    inputs, whatever autocast says.

    Parameters
    ----------
    q : Tensor
        ``[B, I, N, H, D]`` (triangle attention, the I rows share the bias) or ``[B, N, H, D]``, floating point, any
        strides. ``q`` is not scaled beforehand. ``[*, I, N, H, D]`` with several leading dimensions is a batch of them
        all, and bias and masks have the same leading dimensions.
    k, v : Tensor
        ``[B, I, M, H, D]`` or ``[B, M, H, D]``, dtype of ``q``.
    bias : Tensor or Factors, optional
        Additive logits ``[B, H, N, M]`` (query, key) of the dtype of ``q``, or their factors.
    mask : Tensor, optional
        Bool, ``[B, I, M]`` per row and key (``[B, M]`` in the single form), True = keep.
    backend : Backend
        ``auto`` takes ``triton`` for CUDA tensors it supports (bf16, fp16, fp32; D up to 128) if Triton is installed,
        else ``torch``, or ``reference`` with ``return_lse``.
    pair_mask : Tensor, optional
        Bool ``[B, N, M]`` per query and key, the same for all rows and heads, True = keep. A query that the masks leave
        without any key gives zeros and zero gradients.
    gate : Tensor, optional
        Shape and dtype of ``q``; the output is multiplied by its sigmoid.
    return_lse : bool
        Also return the natural logarithm of the softmax denominators, differentiable.

    Returns
    -------
    out : Tensor
        Shape and dtype of ``q``.
    lse : Tensor
        Only with ``return_lse``: fp32 (fp64 for fp64 inputs) ``[B, I, H, N]`` or ``[B, H, N]``, -inf for queries
        without any key.

    Raises
    ------
    TypeError, ValueError
        If dtypes, devices or shapes do not fit together, or ``backend`` is unknown or cannot compute what is asked.
    RuntimeError
        If ``backend`` is ``triton`` without Triton or off CUDA (``TRITON_INTERPRET=1`` runs it on a CPU, slowly).

    Notes
    -----
    Source: FlashBias (Wu et al., NeurIPS 2025, arXiv 2505.12044); AF3 Algorithms 14, 15 and 24.
    """
    terms = _bias_terms(bias)
    check_qkv(q, k, v)
    check_terms(terms, q, k)
    check_masks(mask, pair_mask, q, k)
    check_gate(gate, q)
    backend = chosen_backend(Backend(backend), q, return_lse)

    shape = q.shape
    if q.ndim == 4:
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        mask, gate = (None if x is None else x.unsqueeze(1) for x in (mask, gate))
    elif q.ndim > 5:
        last = q.ndim - 5
        q, k, v = q.flatten(0, last), k.flatten(0, last), v.flatten(0, last)
        mask, pair_mask, gate = (None if x is None else x.flatten(0, last) for x in (mask, pair_mask, gate))
        terms = terms.flatten(last)

    out, lse = _attend(backend, q, k, v, terms, mask, pair_mask, gate, return_lse)
    out = out.reshape(shape)
    if lse is None:
        return out
    return out, lse.reshape(*shape[:-3], shape[-2], shape[-3])


def packed_flash_bias_attention(
    qkv: Tensor,
    bias: Tensor | Factors | None = None,
    mask: Tensor | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """The same for q, k and v side by side, whose gradients are written side by side.

    Parameters
    ----------
    qkv : Tensor
        ``[B, I, N, 3, H, D]``, floating point, any strides.
    bias, mask, backend
        As in :func:`flash_bias_attention`.

    Returns
    -------
    Tensor
        ``[B, I, N, H, D]``.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`flash_bias_attention`.
    """
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be [B, I, N, 3, H, D], but got {list(qkv.shape)}")
    q, k, v = qkv.unbind(3)
    if chosen_backend(Backend(backend), q) is not Backend.TRITON:
        return flash_bias_attention(q, k, v, bias, mask, backend)
    terms = _bias_terms(bias)
    check_qkv(q, k, v)
    check_terms(terms, q, k)
    check_masks(mask, None, q, k)
    from pairformer_fast.kernels.flash_bias import operator

    return operator.attention(qkv, None, None, terms, mask, None, None)[0]


def _bias_terms(bias: Tensor | Factors | None) -> BiasTerms:
    match bias:
        case None:
            return BiasTerms()
        case Factors():
            return BiasTerms(bias.dense, bias.phi_q, bias.phi_k, bias.table, bias.dense_tiles)
        case Tensor():
            return BiasTerms(dense=bias)
    raise TypeError(f"bias must be None, a Tensor or Factors, but got {type(bias).__name__}")


def chosen_backend(backend: Backend, q: Tensor, return_lse: bool = False) -> Backend:
    """What computes attention of ``q``: ``backend`` itself, or what ``auto`` takes.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        If ``backend`` is asked for and cannot compute it.
    """
    match backend:
        case Backend.AUTO:
            if HAS_TRITON and q.is_cuda and q.dtype in TRITON_DTYPES and q.shape[-1] <= TRITON_HEAD_DIM:
                return Backend.TRITON
            return Backend.REFERENCE if return_lse else Backend.TORCH
        case Backend.TORCH if return_lse:
            raise ValueError(
                "backend 'torch' cannot return_lse, since PyTorch's attention keeps it; choose backend 'reference' or "
                "'triton'"
            )
        case Backend.TRITON:
            _check_triton(q)
    return backend


def _check_triton(q: Tensor) -> None:
    if not HAS_TRITON:
        raise RuntimeError(
            "backend 'triton' needs Triton: pip install 'pairformer_fast[gpu]', or choose backend 'auto' or 'torch'"
        )
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"backend 'triton' needs q on a CUDA device, but got {q.device}; move the tensors to a GPU, or choose "
            "backend 'auto' or 'torch'"
        )
    if q.dtype not in TRITON_DTYPES:
        raise TypeError(f"backend 'triton' takes q in bf16, fp16 or fp32, but got {q.dtype}; choose backend 'torch'")
    if q.shape[-1] > TRITON_HEAD_DIM:
        raise ValueError(
            f"backend 'triton' takes head dimensions up to {TRITON_HEAD_DIM}, but q has {q.shape[-1]}; choose backend "
            "'torch'"
        )


def _attend(
    backend: Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: BiasTerms,
    mask: Tensor | None,
    pair_mask: Tensor | None,
    gate: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if backend is Backend.TRITON:
        from pairformer_fast.kernels.flash_bias import operator

        out, lse = operator.attention(q, k, v, terms, mask, pair_mask, gate)
        return out, lse if return_lse else None
    with torch.autocast(q.device.type, enabled=False):
        if backend is Backend.TORCH:
            from pairformer_fast.kernels.flash_bias import torch_sdpa

            return torch_sdpa.attention(q, k, v, terms, mask, pair_mask, gate), None
        from pairformer_fast.kernels.flash_bias import reference

        out = reference.attention(q, k, v, terms, mask, pair_mask, gate)
        return out, reference.log_sum_exp(q, k, terms, mask, pair_mask) if return_lse else None
