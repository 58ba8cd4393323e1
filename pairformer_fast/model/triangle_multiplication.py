"""Triangle multiplication (AF3 Algorithms 12 and 13)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pairformer_fast.model.primitives import linear


class TriangleMultiplication(nn.Module):
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
        self.equation = "bkic,bkjc->bijc" if incoming else "bikc,bjkc->bijc"
        self.layer_norm_in = nn.LayerNorm(c_z)
        self.layer_norm_out = nn.LayerNorm(c_hidden)
        self.linear_a_p = linear(c_z, c_hidden)
        self.linear_a_g = linear(c_z, c_hidden, init="gating")
        self.linear_b_p = linear(c_z, c_hidden)
        self.linear_b_g = linear(c_z, c_hidden, init="gating")
        self.linear_z = linear(c_hidden, c_z, init="final")
        self.linear_g = linear(c_z, c_z, init="gating")

    def forward(self, z: Tensor, pair_mask: Tensor) -> Tensor:
        """Update of ``z [B, N, N, C_z]``; edges where ``pair_mask [B, N, N]`` is False contribute nothing."""
        z = self.layer_norm_in(z)
        keep = pair_mask[..., None]
        a = self.linear_a_g(z).sigmoid() * self.linear_a_p(z) * keep
        b = self.linear_b_g(z).sigmoid() * self.linear_b_p(z) * keep
        product = self.layer_norm_out(torch.einsum(self.equation, a, b))
        return self.linear_g(z).sigmoid() * self.linear_z(product)
