"""The Triton kernels as operators of PyTorch: gradients, ``torch.compile``, activation checkpointing.

Triton is imported when a kernel runs, never before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pairformer_fast.kernels.flash_bias.terms import BiasTerms

DIFFERENTIABLE = ("q", "k", "v", "dense", "phi_q", "phi_k", "table", "gate")
"""Inputs that may have a gradient, in the order in which the backward operator returns them."""

MAX_RANK = 128
"""Widest factors that the kernels hold on chip. Wider ones cost more than the table that they stand for."""

_INPUTS = ("q", "k", "v", "dense", "phi_q", "phi_k", "table", "dense_tiles", "mask", "pair_mask", "gate")


def attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    terms: BiasTerms,
    mask: Tensor | None,
    pair_mask: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and logarithm of the softmax denominators; arguments in the triangle layout of the api.

    Without k and v, q holds all three: ``[B, I, N, 3, H, D]``. So does its gradient, which saves a copy of each.
    """
    if terms.phi_q is not None and terms.phi_q.shape[-1] > MAX_RANK:
        with torch.autocast(q.device.type, enabled=False):
            table = terms.additive(torch.float32)
        terms = BiasTerms(dense=None if table is None else table.to(q.dtype))
    return flash_bias_forward(q, k, v, *terms, mask, pair_mask, gate)


@torch.library.custom_op("pairformer_fast::flash_bias_forward", mutates_args=())
def flash_bias_forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    dense: Tensor | None,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    table: Tensor | None,
    dense_tiles: Tensor | None,
    mask: Tensor | None,
    pair_mask: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Contiguous output ``[B, I, N, H, D]`` and fp32 log-sum-exp ``[B, I, H, N]``."""
    from pairformer_fast.kernels.flash_bias import launch

    terms = BiasTerms(dense, phi_q, phi_k, table, dense_tiles)
    return launch.forward(*_parts(q, k, v), terms, mask, pair_mask, gate)


@flash_bias_forward.register_fake
def _(q: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    *size, heads, dim = q.shape
    batch, rows, queries = size[:3]
    out = q.new_empty((batch, rows, queries, heads, dim))
    return out, q.new_empty((batch, rows, heads, queries), dtype=torch.float32)


def _parts(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if k is None or v is None:
        q, k, v = q.unbind(3)
    return q, k, v


@torch.library.custom_op("pairformer_fast::flash_bias_backward", mutates_args=())
def flash_bias_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    dense: Tensor | None,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    table: Tensor | None,
    dense_tiles: Tensor | None,
    mask: Tensor | None,
    pair_mask: Tensor | None,
    gate: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Contiguous gradients of those of ``DIFFERENTIABLE`` that ``needs`` flags, in that order."""
    from pairformer_fast.kernels.flash_bias import launch

    terms = BiasTerms(dense, phi_q, phi_k, table, dense_tiles)
    names = [name for name, needed in zip(DIFFERENTIABLE, needs, strict=True) if needed]
    packed = q.new_empty(q.shape) if k is None and "q" in names else None
    wanted = frozenset(names if packed is None else [*names, "k", "v"])
    parts = _parts(q, k, v)
    gradients = launch.backward(dout, dlse, *parts, out, lse, terms, mask, pair_mask, gate, wanted, packed)
    return [packed if packed is not None and name == "q" else getattr(gradients, name) for name in names]


@flash_bias_backward.register_fake
def _(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *inputs_and_needs: Any) -> list[Tensor]:
    *inputs, needs = inputs_and_needs
    by_name = dict(zip(_INPUTS, inputs, strict=True))
    flagged = zip(DIFFERENTIABLE, needs, strict=True)
    return [by_name[name].new_empty(by_name[name].shape) for name, needed in flagged if needed]


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    needed = dict(zip(_INPUTS, ctx.needs_input_grad, strict=False))
    needs = [needed[name] for name in DIFFERENTIABLE]
    dout = torch.zeros_like(out) if dout is None else dout
    gradients = iter(flash_bias_backward(dout, dlse, out, lse, *inputs, needs))
    return tuple(next(gradients) if needed[name] else None for name in _INPUTS)


flash_bias_forward.register_autograd(_backward, setup_context=_setup_context)
