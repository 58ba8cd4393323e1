"""Parameters of a triangle multiplication."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, cat

from pairformer_fast.kernels.layer_norm import NormParameters

LAYERS = {
    "a": "linear_a_p",
    "a_gate": "linear_a_g",
    "b": "linear_b_p",
    "b_gate": "linear_b_g",
    "gate": "linear_g",
    "out": "linear_z",
}
"""The linear layer of a module that holds each weight, in the order of the offsets."""


@dataclass(frozen=True, eq=False)
class TriangleWeights:
    """Layer norms and linear layers of AF3 Algorithm 12 or 13; weights are ``[outputs, inputs]``.

    Attributes
    ----------
    norm_in : NormParameters
        ``[C]``, of the pair representation.
    norm_out : NormParameters
        ``[C_hidden]``, of the product.
    a, a_gate, b, b_gate : Tensor
        ``[C_hidden, C]``: the two edges, and their gates before the sigmoid.
    gate : Tensor
        ``[C, C]``: gate of the update.
    out : Tensor
        ``[C, C_hidden]``.
    offsets : Tensor, optional
        ``[4 C_hidden + 2 C]``: those of a, a_gate, b, b_gate, gate and out, as in AlphaFold 2; none in AlphaFold 3.
    """

    norm_in: NormParameters
    norm_out: NormParameters
    a: Tensor
    a_gate: Tensor
    b: Tensor
    b_gate: Tensor
    gate: Tensor
    out: Tensor
    offsets: Tensor | None = None

    def split_offsets(self) -> dict[str, Tensor]:
        """Offsets by the names of their layers; empty without any."""
        if self.offsets is None:
            return {}
        sizes = [len(getattr(self, name)) for name in LAYERS]
        return dict(zip(LAYERS, self.offsets.split(sizes), strict=True))

    @classmethod
    def of(cls, module: Any) -> TriangleWeights:
        """Those of a module with the parameter names of OpenFold and OpenFold3."""
        layers = {name: getattr(module, layer) for name, layer in LAYERS.items()}
        norms = NormParameters.of(module.layer_norm_in), NormParameters.of(module.layer_norm_out)
        offsets = joined_offsets(layers.values())
        return cls(*norms, **{name: layer.weight for name, layer in layers.items()}, offsets=offsets)


def joined_offsets(layers: Collection[Any]) -> Tensor | None:
    """Offsets of linear layers side by side, zero for those that have none; None if no layer has one."""
    offsets = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
    return None if all(layer.bias is None for layer in layers) else cat(offsets)
