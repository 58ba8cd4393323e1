"""Blocks of OpenFold3's diffusion transformers without gradients: updates in one pass.

A block adds attention and a transition to ``a``, each between an adaptive layer norm and a gate that are made of the
single conditioning ``s`` (AF3 Algorithms 23 to 26). Its linear layers are the model's own: no weights are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-5
"""Of all layer norms."""


class Condition(NamedTuple):
    """What ``s`` gives to a block, ``[B, 1, N, C]`` each.

    Attributes
    ----------
    scales, shifts : tuple of Tensor
        Of the adaptive layer norms: those of attention, and that of the transition as the last.
    attention_gate, transition_gate : Tensor
        Factors of the two updates.
    """

    scales: tuple[Tensor, ...]
    shifts: tuple[Tensor, ...]
    attention_gate: Tensor
    transition_gate: Tensor

    @classmethod
    def of(cls, block: Any, norms: Sequence[Any], s: Tensor, mask: Tensor | None) -> Condition:
        """Of a block of OpenFold3.

        Parameters
        ----------
        block : DiffusionTransformerBlock
        norms : sequence of AdaLN
            Those of its attention.
        s : Tensor
            ``[B, 1, N, C_s]``.
        mask : Tensor, optional
            ``[B, 1, N]``, multiplies the update of the transition.
        """
        transition = block.conditioned_transition
        inputs = [(norm, norm.layer_norm_s(s)) for norm in (*norms, transition.layer_norm)]
        scales = tuple(norm.linear_g(y).sigmoid_() for norm, y in inputs)
        shifts = tuple(norm.linear_s(y) for norm, y in inputs)
        attention_gate = block.attention_pair_bias.linear_ada_out(s).sigmoid_()
        transition_gate = transition.linear_g(s).sigmoid_()
        if mask is not None:
            transition_gate.mul_(mask[..., None])
        return cls(scales, shifts, attention_gate, transition_gate)


def with_transition(a: Tensor, module: Any, condition: Condition) -> Tensor:
    """``a [B, S, N, C]`` with the update of a ``ConditionedTransitionBlock`` (AF3 Algorithm 25)."""
    update = module.linear_out(module.swiglu(adapted(normalised(a), condition, -1)))
    return updated(a, condition.transition_gate, update)


def normalised(a: Tensor) -> Tensor:
    """Layer norm without scale or offset, in the dtype of ``a``."""
    return functional.layer_norm(a, a.shape[-1:], eps=EPS).to(a.dtype)


def adapted(normed: Tensor, condition: Condition, which: int) -> Tensor:
    """Normalised ``a`` with a scale and a shift of a condition (AF3 Algorithm 26)."""
    return torch.addcmul(condition.shifts[which], condition.scales[which], normed)


def updated(a: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """``a + gate * update``."""
    return torch.addcmul(a, gate, update)
