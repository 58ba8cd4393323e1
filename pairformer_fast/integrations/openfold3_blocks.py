"""Blocks of OpenFold3's diffusion transformers without gradients: fewer, larger products, and updates in one pass.

A block adds attention and a transition to ``a``, each between an adaptive layer norm and a gate that are made of the
single conditioning ``s`` (AF3 Algorithms 23 to 26). What depends on ``s`` alone is computed for many blocks at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

EPS = 1e-5
"""Of all layer norms."""

TOGETHER = 2**27
"""Bytes of what ``s`` gives, computed at once for as many blocks as fit."""


class Packed(NamedTuple):
    """Weights and offset of linear layers, one below the other."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, *layers: Any) -> Packed:
        """Of layers that read the same; an offset that one of them does not have is zero."""
        weight = torch.cat([layer.weight for layer in layers]) if len(layers) > 1 else layers[0].weight
        if all(layer.bias is None for layer in layers):
            return cls(weight, None)
        offsets = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
        return cls(weight, torch.cat(offsets))

    def __call__(self, x: Tensor) -> Tensor:
        """Project; in bfloat16 whatever autocast says if x has it, as OpenFold3's linear layers."""
        if x.dtype != torch.bfloat16:
            return functional.linear(x, self.weight, self.bias)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


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


class Conditioning:
    """Projections of ``s`` in all blocks, a sequence of which is computed at once.

    Parameters
    ----------
    norms : sequence of sequence of AdaLN
        Of each block, see :class:`Condition`.
    gates : sequence of tuple of nn.Linear
        Of each block, before the sigmoid: of attention and of the transition.
    """

    def __init__(self, norms: Sequence[Sequence[Any]], gates: Sequence[tuple[nn.Linear, nn.Linear]]) -> None:
        self._blocks, self._norms, self._channels = len(norms), len(norms[0]), gates[0][0].out_features
        in_order = [layer for some in norms for layer in (*_scaled(some, "linear_g"), *_scaled(some, "linear_s"))]
        self.inner = Packed.of(*in_order)
        self.outer = Packed.of(*(layer for pair in gates for layer in pair))

    def __call__(self, s: Tensor, mask: Tensor | None) -> Iterator[Condition]:
        """One block after the other.

        Parameters
        ----------
        s : Tensor
            ``[B, 1, N, C_s]``.
        mask : Tensor, optional
            ``[B, 1, N]``, multiplies the update of the transition.
        """
        size = (2 * self._norms + 2) * self._channels * s.element_size() * s[..., 0].numel()
        together = max(1, TOGETHER // size)
        normed = normalised(s)
        for start in range(0, self._blocks, together):
            count = min(together, self._blocks - start)
            inner = self._rows(self.inner, start, count)(normed).unflatten(-1, (count, 2, self._norms, self._channels))
            outer = self._rows(self.outer, start, count)(s).unflatten(-1, (count, 2, self._channels)).sigmoid_()
            inner[..., 0, :, :].sigmoid_()
            if mask is not None:
                outer[..., 1, :].mul_(mask[..., None, None])
            for index in range(count):
                scales, shifts = (x.unbind(-2) for x in inner[..., index, :, :, :].unbind(-3))
                yield Condition(scales, shifts, *outer[..., index, :, :].unbind(-2))

    def _rows(self, packed: Packed, start: int, count: int) -> Packed:
        rows = len(packed.weight) // self._blocks
        part = slice(start * rows, (start + count) * rows)
        return Packed(packed.weight[part], None if packed.bias is None else packed.bias[part])


class _Scaled(NamedTuple):
    """A linear layer after a scale."""

    weight: Tensor
    bias: Tensor | None


def _scaled(norms: Sequence[Any], name: str) -> list[_Scaled]:
    """Layers of adaptive layer norms that read the normalised ``s`` before its scale, which goes into their weights."""
    layers = [(getattr(norm, name), norm.layer_norm_s.weight) for norm in norms]
    wide = torch.promote_types(layers[0][1].dtype, torch.float32)
    return [_Scaled(layer.weight.to(wide) * scale, layer.bias) for layer, scale in layers]


class Transition:
    """Gated transition of a block (AF3 Algorithm 25); ``module`` is OpenFold3's ``ConditionedTransitionBlock``."""

    def __init__(self, module: Any) -> None:
        self.wide = Packed.of(module.swiglu.linear_a, module.swiglu.linear_b)
        self.narrow = Packed.of(module.linear_out)

    def __call__(self, a: Tensor, condition: Condition) -> Tensor:
        """``a [B, S, N, C]`` with its update."""
        gate, value = self.wide(adapted(normalised(a), condition, -1)).chunk(2, dim=-1)
        return updated(a, condition.transition_gate, self.narrow(functional.silu(gate).mul_(value)))


def normalised(a: Tensor) -> Tensor:
    """Layer norm without scale or offset, in the dtype of ``a``."""
    return functional.layer_norm(a, a.shape[-1:], eps=EPS).to(a.dtype)


def adapted(normed: Tensor, condition: Condition, which: int) -> Tensor:
    """Normalised ``a`` with a scale and a shift of a condition (AF3 Algorithm 26)."""
    return torch.addcmul(condition.shifts[which], condition.scales[which], normed)


def updated(a: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """``a + gate * update``."""
    return torch.addcmul(a, gate, update)


def nbytes(*packed: Packed) -> int:
    """Bytes of weights that were copied."""
    return sum(x.nbytes for some in packed for x in some if x is not None)
