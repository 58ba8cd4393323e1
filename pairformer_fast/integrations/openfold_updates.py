"""Triangle multiplication and transitions of OpenFold for AlphaFold 2, whose linear layers have offsets."""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from openfold.model import triangular_multiplicative_update as host
from openfold.model.evoformer import MSATransition
from openfold.model.pair_transition import PairTransition
from openfold.model.primitives import LayerNorm, Linear
from openfold.utils.precision_utils import is_fp16_enabled
from torch import Tensor, nn

from pairformer_fast.bias import Configured
from pairformer_fast.integrations.acceleration import foreign_part
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.relu_transition import relu_transition, runs_triton
from pairformer_fast.kernels.triangle_multiplication import TriangleWeights, triangle_multiplication
from pairformer_fast.model.slabs import rows_at_a_time


class FastTriangleMultiplication(Configured):
    """Triangle multiplication by the operation of :mod:`pairformer_fast.kernels.triangle_multiplication`."""

    _outgoing: bool

    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        inplace_safe: bool = False,
        _add_with_inplace: bool = False,
        *limits: Any,
        **chunks: Any,
    ) -> Tensor:
        """Update of the pair representation; where autocast is to fp16 this is the host's code.

        Parameters
        ----------
        z : Tensor
            ``[*, N, N, C_z]``.
        mask : Tensor, optional
            ``[*, N, N]``, 1 = keep.
        inplace_safe : bool
            Write to ``z``; without gradients only.
        _add_with_inplace : bool
            If so, add the update to it.

        Returns
        -------
        Tensor
            ``[*, N, N, C_z]``; ``z`` if ``inplace_safe``.
        """
        if is_fp16_enabled():
            # It takes the product in fp32 there, whose sums are beyond fp16.
            return super().forward(z, mask, inplace_safe, _add_with_inplace, *limits, **chunks)
        keep = z.new_ones(z.shape[:-1], dtype=torch.bool) if mask is None else (mask != 0).expand(z.shape[:-1])
        pair = z.reshape(-1, *z.shape[-3:])
        weights = self._weights()
        updated = triangle_multiplication(
            pair,
            keep.reshape(pair.shape[:-1]),
            weights,
            incoming=not self._outgoing,
            residual=inplace_safe and _add_with_inplace,
            out=pair if inplace_safe else None,
            slab_rows=rows_at_a_time(pair, weights.out.shape[1]),
            backend=self.config.backend,
        ).view(z.shape)
        if not inplace_safe:
            return updated
        return z if updated.data_ptr() == z.data_ptr() else z.copy_(updated)

    def _weights(self) -> TriangleWeights:
        return TriangleWeights.of(self)


class FastFusedTriangleMultiplication(FastTriangleMultiplication):
    """The same with the layers of both edges in one, as GitHub's 2.x has it beside the other."""

    def _weights(self) -> TriangleWeights:
        shared = ("layer_norm_in", "layer_norm_out", "linear_g", "linear_z")
        parts = {name: getattr(self, name) for name in shared}
        for kind in "pg":
            layer = getattr(self, f"linear_ab_{kind}")
            for edge, weight, bias in zip("ab", layer.weight.chunk(2), layer.bias.chunk(2), strict=True):
                parts[f"linear_{edge}_{kind}"] = SimpleNamespace(weight=weight, bias=bias)
        return TriangleWeights.of(SimpleNamespace(**parts))


class FastTriangleMultiplicationOutgoing(FastTriangleMultiplication, host.TriangleMultiplicationOutgoing):
    """Outgoing edges (AF2 Algorithm 11)."""


class FastTriangleMultiplicationIncoming(FastTriangleMultiplication, host.TriangleMultiplicationIncoming):
    """Incoming edges (AF2 Algorithm 12)."""


class FastTransition(Configured):
    """Transition without a hidden layer in memory where Triton runs; elsewhere OpenFold's, which works in chunks."""

    linear_1: nn.Linear
    linear_2: nn.Linear

    def forward(self, x: Tensor, mask: Tensor | None = None, *limits: Any, **chunks: Any) -> Tensor:
        """Update of a pair or MSA representation.

        Parameters
        ----------
        x : Tensor
            ``[*, I, J, C]``.
        mask : Tensor, optional
            ``[*, I, J]``, 1 = keep.

        Returns
        -------
        Tensor
            ``[*, I, J, C]``.
        """
        flat, first, last = x.reshape(-1, *x.shape[-3:]), self.linear_1, self.linear_2
        if not runs_triton(flat, first.weight, self.config.backend):
            return super().forward(x, mask, *limits, **chunks)
        keep = None if mask is None else (mask != 0).expand(x.shape[:-1]).reshape(flat.shape[:-1])
        norm, backend = NormParameters.of(self.layer_norm), self.config.backend
        layers = first.weight, first.bias, last.weight, last.bias
        return relu_transition(flat, norm, *layers, keep, backend=backend).view(x.shape)


class FastPairTransition(FastTransition, PairTransition):
    """Of the pair representation (AF2 Algorithm 15)."""


class FastMSATransition(FastTransition, MSATransition):
    """Of the MSA representation (AF2 Algorithm 9)."""


NEW_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    PairTransition: FastPairTransition,
    MSATransition: FastMSATransition,
    host.TriangleMultiplicationOutgoing: FastTriangleMultiplicationOutgoing,
    host.TriangleMultiplicationIncoming: FastTriangleMultiplicationIncoming,
}
"""By exact class: a subclass may compute something else."""

if hasattr(host, "FusedTriangleMultiplicationOutgoing"):

    class FastFusedTriangleMultiplicationOutgoing(
        FastFusedTriangleMultiplication, host.FusedTriangleMultiplicationOutgoing
    ):
        """Outgoing edges, layers of both edges in one."""

    class FastFusedTriangleMultiplicationIncoming(
        FastFusedTriangleMultiplication, host.FusedTriangleMultiplicationIncoming
    ):
        """Incoming edges, layers of both edges in one."""

    NEW_CLASS[host.FusedTriangleMultiplicationOutgoing] = FastFusedTriangleMultiplicationOutgoing
    NEW_CLASS[host.FusedTriangleMultiplicationIncoming] = FastFusedTriangleMultiplicationIncoming


_KNOWN = {*NEW_CLASS, Linear, LayerNorm, nn.Sigmoid, nn.ReLU}
"""What they are made of."""


def is_known(module: nn.Module) -> bool:
    """Whether ``module`` is one of these of OpenFold, or a subclass."""
    return isinstance(module, tuple(NEW_CLASS))


def obstacle(module: nn.Module) -> str | None:
    """Why such a module cannot be swapped; None if it can."""
    if isinstance(module, (FastTriangleMultiplication, FastTransition)):
        return "accelerated already; restore it first, or set another config with set_attention"
    if type(module) not in NEW_CLASS:
        return "a subclass, which may compute something else"
    inner = foreign_part(module, lambda part: type(part) in _KNOWN)
    if inner is None:
        return None
    return f"its {inner} is not OpenFold's own" if inner else "its forward was replaced on the instance"
