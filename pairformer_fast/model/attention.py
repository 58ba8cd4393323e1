"""Multi-head attention with a pair bias: projections, gate and output around one attention core."""

from __future__ import annotations

from torch import Tensor, nn

from pairformer_fast.bias import PairBiasAttention
from pairformer_fast.model.primitives import linear


class GatedAttention(nn.Module):
    """Projections to q, k, v and gate, attention with a pair bias, gated output (the ``mha`` of OpenFold3).

    Parameters
    ----------
    c : int
        Channels of input and output.
    c_hidden : int
        Channels of one head.
    no_heads : int
        Number of heads.
    query_offset : bool
        Whether the query projection has an offset (single attention, AF3 Algorithm 24).
    """

    def __init__(self, c: int, c_hidden: int, no_heads: int, *, query_offset: bool = False) -> None:
        super().__init__()
        self.no_heads = no_heads
        hidden = c_hidden * no_heads
        self.linear_q = linear(c, hidden, bias=query_offset, init="glorot")
        self.linear_k = linear(c, hidden, init="glorot")
        self.linear_v = linear(c, hidden, init="glorot")
        self.linear_o = linear(hidden, c, init="final")
        self.linear_g = linear(c, hidden, init="gating")
        self.core = PairBiasAttention()

    def forward(self, x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        """Attend along the second-last axis.

        Parameters
        ----------
        x : Tensor
            ``[B, I, N, C]`` (triangle attention: every row attends with the same bias) or ``[B, N, C]``.
        bias : Tensor
            ``[B, H, N, N]`` pair bias, any strides.
        mask : Tensor
            ``[B, I, N]`` or ``[B, N]`` bool, True for keys to keep.

        Returns
        -------
        Tensor
            Shape of ``x``.
        """
        heads = (*x.shape[:-1], self.no_heads, -1)
        q = self.linear_q(x).view(heads)
        k = self.linear_k(x).view(heads)
        v = self.linear_v(x).view(heads)
        out = self.core(q, k, v, bias, mask).to(v.dtype)
        gate = self.linear_g(x).sigmoid()
        return self.linear_o(out.flatten(-2) * gate)


class TriangleAttention(nn.Module):
    """Triangle attention around the starting node (AF3 Algorithm 14) or the ending node (Algorithm 15).

    The ending node transposes the pair representation, attends along its columns, and keeps the orientation of
    the bias as OpenFold3 0.5 and AlphaFold 3 do: query j and key k of column i see the bias b[j, k] of the pair
    representation as it was before the transposition.

    Parameters
    ----------
    c_z : int
        Channels of the pair representation.
    c_hidden : int
        Channels of one head.
    no_heads : int
        Number of heads.
    ending : bool
        Attend around the ending node.
    """

    def __init__(self, c_z: int, c_hidden: int, no_heads: int, *, ending: bool = False) -> None:
        super().__init__()
        self.ending = ending
        self.layer_norm = nn.LayerNorm(c_z)
        self.linear_z = linear(c_z, no_heads)
        self.mha = GatedAttention(c_z, c_hidden, no_heads)

    def forward(self, z: Tensor, pair_mask: Tensor) -> Tensor:
        """Update of the pair representation.

        Parameters
        ----------
        z : Tensor
            ``[B, N, N, C_z]`` pair representation.
        pair_mask : Tensor
            ``[B, N, N]`` bool.

        Returns
        -------
        Tensor
            ``[B, N, N, C_z]``.
        """
        z = self.layer_norm(z)
        bias = self.linear_z(z).permute(0, 3, 1, 2)
        if not self.ending:
            return self.mha(z, bias, pair_mask)
        return self.mha(z.transpose(1, 2), bias, pair_mask.transpose(1, 2)).transpose(1, 2)


class AttentionPairBias(nn.Module):
    """Attention of the single representation with a bias from the pair representation (AF3 Algorithm 24).

    Parameters
    ----------
    c_s, c_z : int
        Channels of the single and of the pair representation.
    c_hidden : int
        Channels of one head.
    no_heads : int
        Number of heads.
    """

    def __init__(self, c_s: int, c_z: int, c_hidden: int, no_heads: int) -> None:
        super().__init__()
        self.layer_norm_a = nn.LayerNorm(c_s)
        self.layer_norm_z = nn.LayerNorm(c_z)
        self.linear_z = linear(c_z, no_heads)
        self.mha = GatedAttention(c_s, c_hidden, no_heads, query_offset=True)

    def forward(self, s: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        """Update of ``s [B, N, C_s]`` from ``z [B, N, N, C_z]`` under the bool ``mask [B, N]``."""
        bias = self.linear_z(self.layer_norm_z(z)).permute(0, 3, 1, 2)
        return self.mha(self.layer_norm_a(s), bias, mask)
