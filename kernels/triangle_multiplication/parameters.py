"""Parameters of a triangle multiplication."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pairformer_fast.kernels.layer_norm import NormParameters

LAYERS = {
    "a": "linear_a_p",
    "a_gate": "linear_a_g",
    "b": "linear_b_p",
    "b_gate": "linear_b_g",
    "gate": "linear_g",
    "out": "linear_z",
}
"""The linear layer of a module that holds each weight."""


@dataclass(frozen=True, eq=False)
class TriangleWeights:
    """Layer norms and linear layers of AF3 Algorithm 12 or 13; weights are ``[outputs, inputs]`` without offsets.

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
    """

    norm_in: NormParameters
    norm_out: NormParameters
    a: Tensor
    a_gate: Tensor
    b: Tensor
    b_gate: Tensor
    gate: Tensor
    out: Tensor

    @classmethod
    def of(cls, module: Any) -> TriangleWeights:
        """Those of a module with the parameter names of OpenFold3.

        Raises
        ------
        ValueError
            If a linear layer has an offset.
        """
        layers = {name: getattr(module, layer) for name, layer in LAYERS.items()}
        for name, layer in layers.items():
            if layer.bias is not None:
                raise ValueError(f"{LAYERS[name]} has an offset, which the kernels leave out: make it with bias=False")
        norms = NormParameters.of(module.layer_norm_in), NormParameters.of(module.layer_norm_out)
        return cls(*norms, **{name: layer.weight for name, layer in layers.items()})
