"""The Pairformer (AF3 Algorithm 17); parameter names and shapes equal OpenFold3 0.5.0's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pairformer_fast.config import PairformerConfig
from pairformer_fast.model.attention import AttentionPairBias, TriangleAttention
from pairformer_fast.model.primitives import SharedDropout, Transition
from pairformer_fast.model.triangle_multiplication import TriangleMultiplication


class PairBlock(nn.Module):
    """The part of a Pairformer block that updates the pair representation.

    Parameters
    ----------
    config : PairformerConfig
        Dimensions.
    """

    def __init__(self, config: PairformerConfig) -> None:
        super().__init__()
        c_z, c_mul = config.c_z, config.c_hidden_mul
        c_att, heads = config.c_hidden_pair_att, config.no_heads_pair
        self.tri_mul_out = TriangleMultiplication(c_z, c_mul)
        self.tri_mul_in = TriangleMultiplication(c_z, c_mul, incoming=True)
        self.tri_att_start = TriangleAttention(c_z, c_att, heads)
        self.tri_att_end = TriangleAttention(c_z, c_att, heads, ending=True)
        self.pair_transition = Transition(c_z, config.transition_n)
        self.row_dropout = SharedDropout(config.pair_dropout, -3)
        self.column_dropout = SharedDropout(config.pair_dropout, -2)

    def forward(self, z: Tensor, pair_mask: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Updated ``z [B, N, N, C_z]`` under the bool ``pair_mask [B, N, N]``.

        Without gradients the steps after the first work in place on the result, which is ``out`` if given (such as z).
        """
        z = self.tri_mul_out(z, pair_mask, self.row_dropout(z), out=out)
        out = None if torch.is_grad_enabled() else z
        z = self.tri_mul_in(z, pair_mask, self.row_dropout(z), out=out)
        z = self.tri_att_start(z, pair_mask, self.row_dropout(z), out=out)
        z = self.tri_att_end(z, pair_mask, self.column_dropout(z), out=out)
        return self.pair_transition(z, pair_mask, out=out)


class PairformerBlock(nn.Module):
    """One block: pair representation first, then the single representation that reads it.

    Parameters
    ----------
    config : PairformerConfig
        Dimensions.
    """

    def __init__(self, config: PairformerConfig) -> None:
        super().__init__()
        self.pair_stack = PairBlock(config)
        self.attn_pair_bias = AttentionPairBias(
            config.c_s, config.c_z, config.c_hidden_pair_bias, config.no_heads_pair_bias
        )
        self.single_transition = Transition(config.c_s, config.transition_n)

    def forward(
        self, s: Tensor, z: Tensor, mask: Tensor, pair_mask: Tensor, *, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Update both representations.

        Parameters
        ----------
        s : Tensor
            ``[B, N, C_s]`` single representation.
        z : Tensor
            ``[B, N, N, C_z]`` pair representation.
        mask : Tensor
            ``[B, N]`` bool, True for a token to keep.
        pair_mask : Tensor
            ``[B, N, N]`` bool.
        out : Tensor, optional
            Where the pair representation goes, such as z itself; without gradients only.

        Returns
        -------
        tuple of Tensor
            Updated ``s`` and ``z``.
        """
        z = self.pair_stack(z, pair_mask, out=out)
        s = self.attn_pair_bias(s, z, mask)
        return self.single_transition(s, mask), z


class PairformerStack(nn.Module):
    """A stack of Pairformer blocks.

    Parameters
    ----------
    config : PairformerConfig
        Dimensions and number of blocks.
    """

    def __init__(self, config: PairformerConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PairformerBlock(config) for _ in range(config.no_blocks))

    def forward(self, s: Tensor, z: Tensor, mask: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run all blocks; shapes as in :class:`PairformerBlock`. Without gradients they share one result."""
        out = None
        for block in self.blocks:
            s, z = block(s, z, mask, pair_mask, out=out)
            out = None if torch.is_grad_enabled() else z
        return s, z
