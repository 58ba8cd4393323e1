"""Which kernels run: those for Hopper where they take the problem, the general ones elsewhere."""

from __future__ import annotations

import re

import torch
import triton
from torch import Tensor

from pairformer_fast.kernels.flash_bias.terms import BiasTerms, Gradients

HOPPER = (9, 0)
HOPPER_WIDEST_HEAD = 64
GLUON_TRITONS = ((3, 6),)
"""Triton versions whose Gluon dialect, still experimental, the Hopper kernels were run with."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: BiasTerms,
    mask: Tensor | None,
    pair_mask: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Contiguous output ``[B, I, N, H, D]`` and log-sum-exp ``[B, I, H, N]``; arguments in the triangle layout."""
    if hopper_takes(q, k, v, terms, pair_mask):
        from pairformer_fast.kernels.flash_bias import hopper_forward, triton_redo

        out, lse = hopper_forward.forward(q, k, v, terms, mask, gate)
        triton_redo.redo(q, k, v, terms, mask, gate, out, lse)
        return out, lse
    from pairformer_fast.kernels.flash_bias import triton_forward

    return triton_forward.forward(q, k, v, terms, mask, pair_mask, gate)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    terms: BiasTerms,
    mask: Tensor | None,
    pair_mask: Tensor | None,
    gate: Tensor | None,
    needs: frozenset[str],
    packed: Tensor | None = None,
) -> Gradients:
    """Gradients of the inputs named in ``needs``; those of q, k and v in ``packed [B, I, N, 3, H, D]`` if given."""
    if hopper_takes(q, k, v, terms, pair_mask):
        from pairformer_fast.kernels.flash_bias import hopper_backward

        return hopper_backward.backward(dout, dlse, q, k, v, out, lse, terms, mask, gate, needs, packed)
    from pairformer_fast.kernels.flash_bias import triton_backward

    return triton_backward.backward(dout, dlse, q, k, v, out, lse, terms, mask, pair_mask, gate, needs, packed)


def hopper_takes(q: Tensor, k: Tensor, v: Tensor, terms: BiasTerms, pair_mask: Tensor | None) -> bool:
    """Whether the Hopper kernels take a problem: bf16 on an H100 or H200, no table, no pair mask, aligned rows."""
    if not q.is_cuda or q.dtype != torch.bfloat16 or terms.table is not None or pair_mask is not None:
        return False
    if q.shape[-1] > HOPPER_WIDEST_HEAD or q.shape[-1] % 8 or not _gluon_known():
        return False
    if torch.cuda.get_device_capability(q.device) != HOPPER:
        return False
    from pairformer_fast.kernels.flash_bias.hopper_common import copyable

    return all(copyable(x) for x in (q, k, v))


def _gluon_known() -> bool:
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    return found is not None and (int(found[1]), int(found[2])) in GLUON_TRITONS
