"""Triangle attention and attention with pair bias: projections, gate and output around one attention core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pairformer_fast.bias import Configured, PairBiasAttention
from pairformer_fast.config import Backend
from pairformer_fast.kernels.flash_bias import Factors
from pairformer_fast.kernels.gated_output import gated_output
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm_linear import layer_norm_linear
from pairformer_fast.model.primitives import FEW_TOKENS, linear
from pairformer_fast.model.slabs import rows_at_a_time
from pairformer_fast.model.tokens import single_tokens, token_means

SAMPLED_ROWS = 32
"""Rows that stand for all where the bias is decided about before the rows are projected slab by slab."""


class GatedAttention(nn.Module):
    """Weights of multi-head attention with a gate, and its core (the ``mha`` of OpenFold3).

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


def projections(mha: Any) -> Tensor:
    """Weights of queries, keys and values of an attention of ours or of OpenFold3, ``[3 H D, C]``."""
    return torch.cat([mha.linear_q.weight, mha.linear_k.weight, mha.linear_v.weight])


def heads(mha: Any, projected: Tensor) -> Tensor:
    """``projected [..., 3 H D]`` as q, k and v of each head, ``[..., 3, H, D]``."""
    return projected.unflatten(-1, (3, mha.no_heads, -1))


class TriangleAttention(Configured):
    """Triangle attention around the starting node (AF3 Algorithm 14) or the ending node (Algorithm 15).

    Around the ending node attention runs along the columns of the pair representation, a transposed view, and the bias
    keeps its orientation as in OpenFold3 0.5 and AlphaFold 3: query j and key k of column i see the bias b[j, k] of the
    pair representation as it is.

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

    def forward(
        self, z: Tensor, pair_mask: Tensor, dropout: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """Add the update to the pair representation.

        Parameters
        ----------
        z : Tensor
            ``[B, N, N, C_z]``.
        pair_mask : Tensor
            ``[B, N, N]`` bool, True for keys to keep.
        dropout : Tensor, optional
            Broadcastable to z, multiplies the update.
        out : Tensor, optional
            Where to write, such as z itself; without gradients only.

        Returns
        -------
        Tensor
            ``[B, N, N, C_z]``, or ``out``.
        """
        return TriangleUpdate(self, self.ending, self.config.backend)(z, pair_mask, dropout, out)


@dataclass
class TriangleUpdate:
    """What :meth:`TriangleAttention.forward` does, with the weights of a module of ours or of OpenFold3.

    Attributes
    ----------
    module : nn.Module
        Has ``layer_norm``, ``linear_z`` and ``mha`` with linear layers q, k, v, g, o, ``no_heads`` and a ``core``.
    ending : bool
        Attend around the ending node.
    backend : Backend
    """

    module: Any
    ending: bool
    backend: Backend

    def __call__(self, z: Tensor, pair_mask: Tensor, dropout: Tensor | None, out: Tensor | None) -> Tensor:
        core, weight = self.module.mha.core, projections(self.module.mha)
        bias_weight = None if core.learned else self.module.linear_z.weight
        slab = rows_at_a_time(z, len(weight) + len(weight) // 3)
        if slab is None:
            projected, bias = self._project(z, weight, bias_weight)
            qkv, mask = self._heads(projected), self._turned(pair_mask)
            q, k, _ = qkv.unbind(-3)
            if bias is None:
                decided: Tensor | Factors = core.factors(*self.tokens(z, pair_mask), q)
            else:
                decided = core.decide(q, k, bias, mask)
            return self._finish(z, core.attend_packed(qkv, decided, mask), dropout, out)
        q, k, mask = self.sample(z, pair_mask)
        decided = core.factors(*self.tokens(z, pair_mask), q) if core.learned else core.decide(q, k, self.bias(z), mask)
        rows = z.shape[2 if self.ending else 1]
        out = torch.empty_like(z) if out is None else out
        for start in range(0, rows, slab):
            part = slice(start, start + slab)
            some, keep = self._rows(z, part), self._turned(self._rows(pair_mask, part))
            attended = core.attend_packed(self._heads(self._project(some, weight, None)[0]), decided, keep)
            scale = None if dropout is None else self._rows(dropout.expand(z.shape), part)
            self._finish(some, attended, scale, self._rows(out, part))
        return out

    def bias(self, z: Tensor) -> Tensor:
        """Dense pair bias ``[B, H, N, N]``."""
        return self._project(z, None, self.module.linear_z.weight)[1]

    def tokens(self, z: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What a factor network reads: features ``[B, N, 2 C_z]``, and which tokens are kept, ``[B, N]``."""
        keep = self._turned(pair_mask).any(1)
        return token_means(z, NormParameters.of(self.module.layer_norm), keep, self.backend), keep

    def sample(self, z: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k ``[B, I, N, H, D]`` and mask ``[B, I, N]`` of some evenly spaced rows of attention."""
        rows = z.shape[2 if self.ending else 1]
        part = slice(None, None, -(-rows // SAMPLED_ROWS))
        q, k, _ = self._heads(self._project(self._rows(z, part), projections(self.module.mha), None)[0]).unbind(-3)
        return q, k, self._turned(self._rows(pair_mask, part))

    def _rows(self, x: Tensor, part: slice) -> Tensor:
        """Rows of attention in ``part``: columns of the pair representation around the ending node."""
        return x[:, :, part] if self.ending else x[:, part]

    def _turned(self, x: Tensor) -> Tensor:
        """Attention's rows first, from the pair representation's layout, and back."""
        return x.transpose(1, 2) if self.ending else x

    def _project(self, z: Tensor, weight: Tensor | None, bias_weight: Tensor | None) -> tuple[Any, Any]:
        """q, k and v in one tensor, laid out for attention, and the pair bias; None where there is no weight."""
        norm = NormParameters.of(self.module.layer_norm)
        return layer_norm_linear(z, norm, weight, bias_weight, transposed=self.ending, backend=self.backend)

    def _heads(self, projected: Tensor) -> Tensor:
        """``[B, I, N, 3, H, D]`` queries, keys and values, attention's rows first."""
        return heads(self.module.mha, self._turned(projected))

    def _finish(self, z: Tensor, attended: Tensor, dropout: Tensor | None, out: Tensor | None) -> Tensor:
        """Gate, output and residual."""
        mha, norm = self.module.mha, NormParameters.of(self.module.layer_norm)
        gate, last = mha.linear_g.weight, mha.linear_o.weight
        attended = self._turned(attended.flatten(-2))
        return gated_output(z, attended, norm, gate, last, dropout, out=out, backend=self.backend)


class AttentionPairBias(Configured):
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
        """Add the update to ``s [B, N, C_s]``, from ``z [B, N, N, C_z]`` under the bool ``mask [B, N]``."""
        core, norm, row = self.mha.core, NormParameters.of(self.layer_norm_a), s.unsqueeze(1)
        q, k, v = self.heads(row)
        bias = core.factors(self.tokens(s, z, mask), mask, q) if core.learned else self.bias(z)
        attended = core(q, k, v, bias, mask).flatten(-2).unsqueeze(1)
        gate, last = self.mha.linear_g.weight, self.mha.linear_o.weight
        return gated_output(row, attended, norm, gate, last, backend=FEW_TOKENS).squeeze(1)

    def bias(self, z: Tensor) -> Tensor:
        """Dense pair bias ``[B, H, N, N]``."""
        norm = NormParameters.of(self.layer_norm_z)
        return layer_norm_linear(z, norm, None, self.linear_z.weight, backend=self.config.backend)[1]

    def tokens(self, s: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        """What a factor network reads, ``[B, N, 2 C_z + C_s]``."""
        means = token_means(z, NormParameters.of(self.layer_norm_z), mask, self.config.backend)
        return torch.cat([means, single_tokens(s, NormParameters.of(self.layer_norm_a)).to(means.dtype)], dim=-1)

    def heads(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (not scaled), k and v ``[B, N, H, D]`` of ``s [B, 1, N, C_s]``."""
        norm = NormParameters.of(self.layer_norm_a)
        projected, _ = layer_norm_linear(row, norm, projections(self.mha), backend=FEW_TOKENS)
        q, k, v = heads(self.mha, projected.squeeze(1)).unbind(-3)
        return q + self.mha.linear_q.bias.view(q.shape[-2:]).to(q.dtype), k, v
