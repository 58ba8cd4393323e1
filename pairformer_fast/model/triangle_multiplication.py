"""Triangle multiplication (AF3 Algorithms 12 and 13)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pairformer_fast.bias import Configured
from pairformer_fast.config import Backend
from pairformer_fast.kernels.triangle_multiplication import TriangleWeights, triangle_multiplication
from pairformer_fast.model.primitives import linear
from pairformer_fast.model.slabs import rows_at_a_time


class TriangleMultiplication(Configured):
    """Update of edge ij from the edges ik, jk (outgoing) or ki, kj (incoming) of all triangles.

    Parameters
    ----------
    c_z : int
        Channels of the pair representation.
    c_hidden : int
        Channels of the product.
    incoming : bool
        Use the incoming edges (Algorithm 13).
    """

    def __init__(self, c_z: int, c_hidden: int, *, incoming: bool = False) -> None:
        super().__init__()
        self.incoming = incoming
        self.layer_norm_in = nn.LayerNorm(c_z)
        self.layer_norm_out = nn.LayerNorm(c_hidden)
        self.linear_a_p = linear(c_z, c_hidden)
        self.linear_a_g = linear(c_z, c_hidden, init="gating")
        self.linear_b_p = linear(c_z, c_hidden)
        self.linear_b_g = linear(c_z, c_hidden, init="gating")
        self.linear_z = linear(c_hidden, c_z, init="final")
        self.linear_g = linear(c_z, c_z, init="gating")

    def forward(
        self, z: Tensor, pair_mask: Tensor, dropout: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """Add the update to the pair representation.

        Parameters
        ----------
        z : Tensor
            ``[B, N, N, C_z]``.
        pair_mask : Tensor
            ``[B, N, N]`` bool; edges where it is False contribute nothing.
        dropout : Tensor, optional
            Broadcastable to z, multiplies the update.
        out : Tensor, optional
            Where to write, such as z itself; without gradients only.

        Returns
        -------
        Tensor
            ``[B, N, N, C_z]``, or ``out``.
        """
        backend = self.config.backend
        return multiply_triangles(self, z, pair_mask, dropout, incoming=self.incoming, out=out, backend=backend)


def multiply_triangles(
    module: Any,
    z: Tensor,
    pair_mask: Tensor,
    dropout: Tensor | None,
    *,
    incoming: bool,
    out: Tensor | None,
    backend: Backend,
) -> Tensor:
    """What :meth:`TriangleMultiplication.forward` does, with the weights of a module of ours or of OpenFold3."""
    weights = TriangleWeights.of(module)
    slab = rows_at_a_time(z, weights.out.shape[1])
    return triangle_multiplication(
        z, pair_mask, weights, dropout, incoming=incoming, out=out, slab_rows=slab, backend=backend
    )
