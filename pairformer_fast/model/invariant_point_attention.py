"""Invariant point attention (AF2 Algorithm 22)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pairformer_fast.config import StructureModuleConfig
from pairformer_fast.model.primitives import linear
from pairformer_fast.model.rigid import EPSILON, Rigid


class InvariantPointAttention(nn.Module):
    """Attention over residues whose logits also see distances between points carried by the residue frames.

    Parameters
    ----------
    config : StructureModuleConfig
        Dimensions.
    c_z : int
        Channels of the pair representation.
    """

    def __init__(self, config: StructureModuleConfig, c_z: int) -> None:
        super().__init__()
        self.heads, self.c_hidden = config.no_heads_ipa, config.c_hidden_ipa
        self.qk_points, self.v_points = config.no_qk_points, config.no_v_points
        self.linear_q = linear(config.c_s, self.heads * self.c_hidden, bias=True)
        self.linear_kv = linear(config.c_s, 2 * self.heads * self.c_hidden, bias=True)
        self.linear_q_points = linear(config.c_s, 3 * self.heads * self.qk_points, bias=True)
        self.linear_kv_points = linear(config.c_s, 3 * self.heads * (self.qk_points + self.v_points), bias=True)
        self.linear_b = linear(c_z, self.heads, bias=True)
        # softplus of this is 1
        self.head_weights = nn.Parameter(torch.full((self.heads,), math.log(math.e - 1)))
        self.linear_out = linear(
            self.heads * (c_z + self.c_hidden + 4 * self.v_points), config.c_s, bias=True, init="final"
        )

    def forward(self, s: Tensor, z: Tensor, frames: Rigid, mask: Tensor) -> Tensor:
        """Update of the single representation.

        Parameters
        ----------
        s : Tensor
            ``[B, N, C_s]``.
        z : Tensor
            ``[B, N, N, C_z]``.
        frames : Rigid
            ``[B, N]`` residue frames, nm.
        mask : Tensor
            ``[B, N]`` bool.

        Returns
        -------
        Tensor
            ``[B, N, C_s]``.
        """
        heads = (self.heads, -1)
        q = self.linear_q(s).unflatten(-1, heads)
        k, v = self.linear_kv(s).unflatten(-1, heads).chunk(2, dim=-1)
        q_points = self._points(self.linear_q_points(s), frames)
        kv_points = self._points(self.linear_kv_points(s), frames)
        k_points, v_points = kv_points.split([self.qk_points, self.v_points], dim=-2)

        logits = torch.einsum("bihc,bjhc->bhij", q, k) * (3 * self.c_hidden) ** -0.5
        logits = logits + self.linear_b(z).permute(0, 3, 1, 2) * 3**-0.5
        point_weight = nn.functional.softplus(self.head_weights) * (3 * self.qk_points * 9 / 2) ** -0.5
        logits = logits - 0.5 * point_weight[:, None, None] * _squared_distances(q_points, k_points)
        logits = logits.masked_fill(~mask[:, None, None, :], torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1)

        out = torch.einsum("bhij,bjhc->bihc", weights, v)
        out_pair = torch.einsum("bhij,bijc->bihc", weights, z)
        out_points = torch.einsum("bhij,bjhpx->bihpx", weights, v_points)
        out_points = frames.unsqueeze().unsqueeze().invert_apply(out_points)
        distances = (out_points.square().sum(-1) + EPSILON).sqrt()
        features = [out.flatten(2), out_points.flatten(2), distances.flatten(2), out_pair.flatten(2)]
        return self.linear_out(torch.cat(features, dim=-1))

    def _points(self, x: Tensor, frames: Rigid) -> Tensor:
        """Local points ``[B, N, H * P * 3]`` to global ones ``[B, N, H, P, 3]``."""
        return frames.unsqueeze().unsqueeze().apply(x.unflatten(-1, (self.heads, -1, 3)))


def _squared_distances(q: Tensor, k: Tensor) -> Tensor:
    """Sum over points of squared distances, ``[B, N, H, P, 3]`` twice to ``[B, H, N, N]``."""
    q, k = q.flatten(3).transpose(1, 2), k.flatten(3).transpose(1, 2)
    norms = q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :]
    return norms - 2 * q @ k.mT
