"""A Pairformer block written out in plain PyTorch at any precision, in slabs of rows: what results are held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, silu
from torch.utils.checkpoint import checkpoint

from pairformer_fast.config import PairformerConfig

SLAB_SCORES = 2**29
"""Attention scores of triangle attention that are held at once."""


class ExactBlock:
    """AF3 Algorithm 17 without dropout, all tokens kept, in the dtype of its inputs.

    It shares no code with the library. Without gradients it writes to the pair representation it is given; with
    gradients every slab of rows is computed again in the backward, so that fp64 fits on the device.

    Parameters
    ----------
    config : PairformerConfig
        Dimensions.
    weights : dict of str to Tensor
        By the names of OpenFold3, in the dtype to compute with.
    """

    def __init__(self, config: PairformerConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = weights

    def block(self, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Updated ``s [B, N, C_s]`` and ``z [B, N, N, C_z]``."""
        z = self.triangle_multiplication(z, "pair_stack.tri_mul_out", incoming=False)
        z = self.triangle_multiplication(z, "pair_stack.tri_mul_in", incoming=True)
        z = self.triangle_attention(z, "pair_stack.tri_att_start", ending=False)
        z = self.triangle_attention(z, "pair_stack.tri_att_end", ending=True)
        z = self.transition(z, "pair_stack.pair_transition")
        s = s + self.single_attention(s, z)
        return s + self._transition(s, "single_transition"), z

    def triangle_multiplication(self, z: Tensor, name: str, *, incoming: bool) -> Tensor:
        """``z`` and its update (Algorithm 12, incoming: 13)."""

        def factor(rows: Tensor, which: str) -> Tensor:
            x = self._norm(rows, f"{name}.layer_norm_in")
            return self._gate(x, f"{name}.linear_{which}_g") * self._linear(x, f"{name}.linear_{which}_p")

        def update(rows: Tensor, a_rows: Tensor, b: Tensor) -> Tensor:
            product = self._norm(torch.einsum("bcik,bckj->bijc", a_rows, b), f"{name}.layer_norm_out")
            gate = self._gate(self._norm(rows, f"{name}.layer_norm_in"), f"{name}.linear_g")
            return gate * self._linear(product, f"{name}.linear_z")

        edges = z.transpose(1, 2) if incoming else z
        a = torch.cat([self._call(factor, rows, "a").permute(0, 3, 1, 2) for rows in self._slabs(edges)], 2)
        b = torch.cat([self._call(factor, rows, "b").permute(0, 3, 2, 1) for rows in self._slabs(edges)], 3)
        along = self._slabs(a, 2)
        return self._updated(z, update, along, b)

    def triangle_attention(self, z: Tensor, name: str, *, ending: bool) -> Tensor:
        """``z`` and its update (Algorithm 14, ending: 15, with the bias b[j, k] in either)."""

        def update(rows: Tensor, bias: Tensor) -> Tensor:
            x = self._norm(rows, f"{name}.layer_norm")
            return self._attend(x, f"{name}.mha", self.config.no_heads_pair, bias[:, None])

        bias = self._bias(z, f"{name}.layer_norm", f"{name}.linear_z")
        if not ending:
            return self._updated(z, update, (), bias)
        return self._updated(z.transpose(1, 2), update, (), bias).transpose(1, 2)

    def attention_inputs(self, z: Tensor, name: str) -> dict[str, Tensor]:
        """``projected``: q, k and v side by side; ``bias``: the pair bias."""
        x = self._norm(z, f"{name}.layer_norm")
        projected = torch.cat([self._linear(x, f"{name}.mha.linear_{part}") for part in "qkv"], -1)
        return {"projected": projected, "bias": self._linear(x, f"{name}.linear_z").permute(0, 3, 1, 2)}

    def gated_output(self, z: Tensor, attended: Tensor, name: str) -> Tensor:
        """``z`` and the gated output projection of ``attended [B, N, N, H D]``."""
        gate = self._gate(self._norm(z, f"{name}.layer_norm"), f"{name}.mha.linear_g")
        return z + self._linear(gate * attended, f"{name}.mha.linear_o")

    def transition(self, z: Tensor, name: str) -> Tensor:
        """``z`` and its update (Algorithm 11)."""
        return self._updated(z, lambda rows: self._transition(rows, name))

    def single_attention(self, s: Tensor, z: Tensor) -> Tensor:
        """Update of ``s`` (Algorithm 24 without conditioning)."""
        name = "attn_pair_bias"
        bias = self._bias(z, f"{name}.layer_norm_z", f"{name}.linear_z")
        x = self._norm(s, f"{name}.layer_norm_a")
        return self._attend(x, f"{name}.mha", self.config.no_heads_pair_bias, bias)

    def _transition(self, x: Tensor, name: str) -> Tensor:
        x = self._norm(x, f"{name}.layer_norm")
        hidden = silu(self._linear(x, f"{name}.swiglu.linear_a")) * self._linear(x, f"{name}.swiglu.linear_b")
        return self._linear(hidden, f"{name}.linear_out")

    def _attend(self, x: Tensor, name: str, heads: int, bias: Tensor) -> Tensor:
        """Gated attention along the second-last axis of ``x``; ``bias`` broadcasts to ``[*, H, N, N]``."""
        q, k, v = (
            self._linear(x, f"{name}.linear_{part}").unflatten(-1, (heads, -1)).transpose(-2, -3) for part in "qkv"
        )
        weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
        attended = (weights @ v).transpose(-2, -3).flatten(-2)
        return self._linear(self._gate(x, f"{name}.linear_g") * attended, f"{name}.linear_o")

    def _bias(self, z: Tensor, norm: str, projection: str) -> Tensor:
        """Pair bias ``[B, H, N, N]``."""
        parts = [
            self._call(lambda rows: self._linear(self._norm(rows, norm), projection), rows) for rows in self._slabs(z)
        ]
        return torch.cat(parts, 1).permute(0, 3, 1, 2).contiguous()

    def _updated(
        self, z: Tensor, update: Callable[..., Tensor], along: tuple[Tensor, ...] = (), *others: Tensor
    ) -> Tensor:
        """``z`` and its ``update``, which is given a slab of rows, the slab of ``along`` beside it, and ``others``."""
        slabs = self._slabs(z)
        beside: list[tuple[Tensor, ...]] = [(slab,) for slab in along] or [()] * len(slabs)
        if torch.is_grad_enabled():
            parts = [rows + self._call(update, rows, *more, *others) for rows, more in zip(slabs, beside, strict=True)]
            return torch.cat(parts, 1)
        for rows, more in zip(slabs, beside, strict=True):
            rows += update(rows, *more, *others)
        return z

    def _slabs(self, x: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        n = x.shape[dim]
        return x.split(max(1, SLAB_SCORES // (self.config.no_heads_pair * n**2)), dim)

    def _call(self, function: Callable[..., Tensor], *arguments: object) -> Tensor:
        return (
            checkpoint(function, *arguments, use_reentrant=False) if torch.is_grad_enabled() else function(*arguments)
        )

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _gate(self, x: Tensor, name: str) -> Tensor:
        return self._linear(x, name).sigmoid()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return layer_norm(x, weight.shape, weight, bias)
