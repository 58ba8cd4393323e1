"""Protenix: pair updates of all Pairformer blocks, and the Pairformer's attention with pair bias.

Tested with protenix 2.0.0. The blocks of the trunk, the MSA, template and confidence modules run this package's
operations with Protenix's weights: triangle multiplication, triangle attention, transition, residuals. Of attention
with pair bias the norm of the single representation, the projections, the gate and the output stay Protenix's; the
other parts of a block run as they are. The bias around the ending node has Protenix's orientation, b[k, i] as in
AlphaFold 2, not b[i, k] as in AlphaFold 3. Training draws Protenix's dropout; gradients are its own with a dense bias.

Three things differ from Protenix on purpose. A row whose keys are all masked gives zeros, where Protenix averages over
masked values. Its own models pass no mask; with one, such rows would reach the single representation of all tokens, as
Protenix's attention with pair bias takes no mask. The arguments for chunks and kernels (``triangle_multiplicative``,
``triangle_attention``) have no effect on what runs here. And under autocast in fp16, where Protenix rescales the edges
of triangle multiplication, blocks run Protenix's code around the attention of this package. Diffusion transformers,
those of atoms included, are not touched.
"""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from protenix.model.modules.pairformer import MSAPairWeightedAveraging, PairformerBlock
from protenix.model.modules.primitives import Linear, Transition
from protenix.model.modules.transformer import AttentionPairBias
from protenix.model.triangular import layers
from protenix.model.triangular.layers import Attention
from protenix.model.triangular.triangular import (
    TriangleAttention,
    TriangleAttentionEndingNode,
    TriangleMultiplicationIncoming,
    TriangleMultiplicationOutgoing,
)
from protenix.model.utils import is_fp16_enabled
from torch import Tensor, nn

from pairformer_fast.bias import PairBiasAttention
from pairformer_fast.integrations.acceleration import (
    NewClass,
    Plan,
    Skipped,
    Target,
    block_obstacle,
    foreign_part,
    instance_obstacle,
    looks_like_attention,
    sort_out,
)
from pairformer_fast.integrations.triangles import NamedAsInOpenFold3, attend_rows, attend_triangles
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm_linear import layer_norm_linear
from pairformer_fast.kernels.transition import transition
from pairformer_fast.model.primitives import SharedDropout
from pairformer_fast.model.triangle_multiplication import multiply_triangles


class FastAttention(Attention):
    """Multi-head attention whose core is a :class:`~pairformer_fast.bias.PairBiasAttention`."""

    core: PairBiasAttention

    def forward(self, q_x: Tensor, kv_x: Tensor, biases: list[Tensor] | None = None, *_: Any, **_flags: Any) -> Tensor:
        """Attend, ``[*, I, N, C]``, with the biases of mask ``[*, I, 1, 1, N]`` and pairs ``[*, 1, H, N, N]``."""
        if biases is None or len(biases) != 2:
            return super().forward(q_x, kv_x, biases, *_, **_flags)
        q, k, v = self._prep_qkv(q_x, kv_x, apply_scale=False)
        return self._wrap_up(attend_rows(self.core, q, k, v, biases[1], biases[0]), q_x)


class FastTriangleAttention(NamedAsInOpenFold3, TriangleAttention):
    """Triangle attention that is not cut into chunks of rows: one factorisation serves all of them."""

    def _chunk(self, x: Tensor, biases: list[Tensor], *_limits: Any, **_flags: Any) -> Tensor:
        return self.mha(x, x, biases)


class FastTriangleAttentionEndingNode(FastTriangleAttention, TriangleAttentionEndingNode):
    """The same for the class that transposes by itself."""


class FastAttentionPairBias(AttentionPairBias):
    """Attention with pair bias; among windows of atoms it is Protenix's code."""

    core: PairBiasAttention

    def standard_multihead_attention(
        self, q: Tensor, kv: Tensor, z: Tensor, inplace_safe: bool = False, enable_efficient_fusion: bool = False
    ) -> Tensor:
        """Update ``[*, N, C_a]`` by all tokens, from ``z [*, N, N, C_z]``.

        With ``enable_efficient_fusion``, where z comes normalised and with channels first, this is Protenix's code.
        """
        if enable_efficient_fusion:
            return super().standard_multihead_attention(q, kv, z, inplace_safe, enable_efficient_fusion)
        norm, backend = NormParameters.of(self.layernorm_z), self.core.config.backend
        pairs = z.reshape(-1, *z.shape[-3:])
        _, bias = layer_norm_linear(pairs, norm, None, self.linear_nobias_z.weight, backend=backend)
        heads = self.attention._prep_qkv(q, kv, apply_scale=False)
        queries, keys, values = (x.transpose(-2, -3) for x in heads)
        flat = [x.reshape(-1, *x.shape[-3:]) for x in (queries, keys, values)]
        bias = bias.expand(len(flat[0]), *bias.shape[1:]).to(queries.dtype)
        attended = self.core(*flat, bias, None)
        return self.attention._wrap_up(attended.view(queries.shape), q)


class FastPairformerBlock(PairformerBlock):
    """Block of all stacks: those of MSA and templates have no single representation."""

    def forward(
        self,
        s: Tensor | None,
        z: Tensor,
        pair_mask: Tensor | None,
        triangle_multiplicative: str = "torch",
        triangle_attention: str = "torch",
        inplace_safe: bool = False,
        chunk_size: int | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Updated ``s [*, N, C_s]`` and ``z [*, N, N, C_z]`` under ``pair_mask [*, N, N]``.

        With ``inplace_safe`` and without gradients ``z`` takes the result.
        """
        if is_fp16_enabled():
            kernels = triangle_multiplicative, triangle_attention
            return super().forward(s, z, pair_mask, *kernels, inplace_safe, chunk_size)
        z = self._update_pairs(z, pair_mask, inplace_safe)
        if s is not None and self.c_s > 0:
            s = s + self.attention_pair_bias(a=s, s=None, z=z)
            s = s + self.single_transition(s)
        return s, z

    def _update_pairs(self, z: Tensor, pair_mask: Tensor | None, inplace_safe: bool) -> Tensor:
        """Updated ``z [*, N, N, C_z]``; after the first step in place."""
        shape, backend = z.shape, self.tri_att_start.mha.core.config.backend
        keep = torch.ones_like(z[..., 0], dtype=torch.bool) if pair_mask is None else pair_mask != 0
        z, keep = z.reshape(-1, *shape[-3:]), keep.expand(shape[:-1]).reshape(-1, *shape[-3:-1])
        draw = SharedDropout(self.p_drop, -3).train(self.training and not inplace_safe)
        first = z if inplace_safe and not torch.is_grad_enabled() else None

        z = multiply_triangles(self.tri_mul_out, z, keep, draw(z), incoming=False, out=first, backend=backend)
        out = None if torch.is_grad_enabled() else z
        z = multiply_triangles(self.tri_mul_in, z, keep, draw(z), incoming=True, out=out, backend=backend)
        z = attend_triangles(self.tri_att_start, z, keep, draw(z), ending=False, out=out, backend=backend)
        dropout = draw(z)
        columns = None if dropout is None else dropout.transpose(1, 2)
        z = attend_triangles(self.tri_att_end, z, keep, columns, ending=True, out=out, backend=backend)
        last = self.pair_transition
        layers = last.linear_no_bias_a.weight, last.linear_no_bias_b.weight, last.linear_no_bias.weight
        return transition(z, NormParameters.of(last.layernorm1), *layers, out=out, backend=backend).view(shape)


_NEW_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    TriangleAttention: FastTriangleAttention,
    TriangleAttentionEndingNode: FastTriangleAttentionEndingNode,
    AttentionPairBias: FastAttentionPairBias,
}
"""Of attention, by exact class: a subclass may compute something else."""

_PARTS: dict[str, type[nn.Module]] = {
    "tri_mul_out": TriangleMultiplicationOutgoing,
    "tri_mul_in": TriangleMultiplicationIncoming,
    "tri_att_start": TriangleAttention,
    "tri_att_end": TriangleAttention,
    "pair_transition": Transition,
}

_NORMS = {layers.OpenFoldLayerNorm, getattr(layers, "FusedLayerNorm", layers.OpenFoldLayerNorm)}
"""The second is there where Protenix has its CUDA extension."""

_KNOWN = {Linear, layers.OpenfoldLinear, Attention, nn.Sigmoid, *_NORMS, *_PARTS.values()}
"""What the parts of a block are made of."""


def plan(model: nn.Module) -> Plan:
    """What to swap in ``model``; nothing is changed yet.

    Raises
    ------
    ValueError
        If there is nothing to swap.
    """
    targets, skipped = sort_out(model, _attentions(model), _obstacle, _target, _NEW_CLASS)
    swapped = {target.path for target in targets}
    around = {}
    for path, module in model.named_modules():
        if type(module) is not PairformerBlock:
            continue
        reason = block_obstacle(module, path, _PARTS, _takes, swapped)
        if reason is None and not module.tri_att_end.starting:
            reason = "its tri_att_end transposes by itself"
        if reason is None:
            around[path] = NewClass(module, FastPairformerBlock)
        else:
            skipped.append(Skipped.of(path, module, reason))
    return Plan(targets, skipped, around)


def _takes(layer: nn.Module) -> bool:
    """Whether the operations here can stand for a layer: no offset or precision of its own in a linear layer."""
    if type(layer) not in _KNOWN:
        return False
    if isinstance(layer, nn.Linear):
        return layer.bias is None and getattr(layer, "precision", None) is None
    if isinstance(layer, Attention):
        return layer.linear_g is not None
    return type(layer) not in _NORMS or layer.weight is not None


def _target(path: str, module: nn.Module) -> Target:
    new = NewClass(module, _NEW_CLASS[type(module)])
    if isinstance(module, TriangleAttention):
        return Target(path, (new, NewClass(module.mha, FastAttention)), module.mha)
    return Target(path, (new,), module)


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Attention that is known here, and other modules that look like attention and hold no such module."""
    inside = tuple(x for x in model.modules() if isinstance(x, (TriangleAttention, AttentionPairBias)))
    parts = {part for module in inside for part in module.modules() if part is not module}
    for path, module in model.named_modules():
        if module in parts or isinstance(module, PairBiasAttention):
            continue
        known = isinstance(module, (*_NEW_CLASS, MSAPairWeightedAveraging))
        if known or (looks_like_attention(module) and sum(map(looks_like_attention, module.modules())) == 1):
            yield path, module


def _obstacle(module: nn.Module) -> str | None:
    """Why ``module`` cannot be swapped; None if it can."""
    if isinstance(module, MSAPairWeightedAveraging):
        return "has neither queries nor keys: its weights are made from the pair representation alone"
    if isinstance(module, tuple(_NEW_CLASS.values())):
        return "accelerated already; restore it first, or set another config with set_attention"
    if type(module) not in _NEW_CLASS:
        known_base = isinstance(module, tuple(_NEW_CLASS))
        return "a subclass, which may compute something else" if known_base else "not an attention that is known here"
    if isinstance(module, TriangleAttention):
        if type(module.mha) is not Attention:
            return f"its mha is not Protenix's Attention but {type(module.mha).__qualname__}"
        return instance_obstacle(module)
    if module.has_s:
        return "belongs to a diffusion transformer, which stays Protenix's"
    if any(foreign_part(module.get_submodule(name), _takes) is not None for name in ("layernorm_z", "linear_nobias_z")):
        return (
            "its pair bias comes from layers that are not Protenix's own, has an offset, or a layer norm without scale"
        )
    return instance_obstacle(module, "")
