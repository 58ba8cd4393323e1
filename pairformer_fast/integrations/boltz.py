"""Boltz 1 and 2: pair updates of all Pairformer and MSA layers, and the Pairformer's attention with pair bias.

Tested with boltz 2.2.1. The layers of the trunk, the MSA, template, confidence and affinity modules run this package's
operations with Boltz's weights: triangle multiplication, whose fused ``p_in`` and ``g_in`` are read as views, triangle
attention, transition, residuals. Of attention with pair bias the norm, the projections, the gate and the output stay
Boltz's, in fp32 as there; the other parts of a layer run as they are. The bias around the ending node has Boltz's
orientation, b[k, i] as in AlphaFold 2, not b[i, k] as in AlphaFold 3.

Layers draw the random numbers that Boltz draws for dropout, in evaluation too, where it does not use them: a seed gives
the same noise to the diffusion module, and training the same dropout. Gradients are those of Boltz with a dense bias.

Two things differ from Boltz on purpose. A row whose keys are all masked gives zeros, where Boltz averages over masked
values; with masks made from tokens this concerns padding alone. And the arguments for chunks and kernels
(``use_kernels``) have no effect on what runs here. Diffusion transformers, those of atoms included, are not touched.
"""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from boltz.model.layers import attention as attention_v1
from boltz.model.layers import attentionv2 as attention_v2
from boltz.model.layers import pairformer, triangular_mult
from boltz.model.layers.dropout import get_dropout_mask
from boltz.model.layers.pair_averaging import PairWeightedAveraging
from boltz.model.layers.transition import Transition
from boltz.model.layers.triangular_attention import primitives
from boltz.model.layers.triangular_attention.attention import TriangleAttention, TriangleAttentionEndingNode
from boltz.model.layers.triangular_attention.primitives import Attention
from boltz.model.modules import trunk
from torch import Tensor, nn

from pairformer_fast.bias import PairBiasAttention
from pairformer_fast.config import Backend
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
from pairformer_fast.kernels.triangle_multiplication import TriangleWeights, triangle_multiplication
from pairformer_fast.model.slabs import rows_at_a_time


class FastAttention(Attention):
    """Multi-head attention whose core is a :class:`~pairformer_fast.bias.PairBiasAttention`."""

    core: PairBiasAttention

    def forward(self, q_x: Tensor, kv_x: Tensor, tri_bias: Tensor, mask_bias: Tensor, *_: Any, **_flags: Any) -> Tensor:
        """Attend, ``[*, I, N, C]``, with ``tri_bias [*, 1, H, N, N]`` and ``mask_bias [*, I, 1, 1, N]``."""
        q, k, v = self._prep_qkv(q_x, kv_x, apply_scale=False)
        return self._wrap_up(attend_rows(self.core, q, k, v, tri_bias, mask_bias), q_x)


class FastTriangleAttention(NamedAsInOpenFold3, TriangleAttention):
    """Triangle attention that is not cut into chunks of rows: one factorisation serves all of them."""

    def _chunk(self, x: Tensor, tri_bias: Tensor, mask_bias: Tensor, *_limits: Any, **_flags: Any) -> Tensor:
        return self.mha(x, x, tri_bias, mask_bias)


class FastTriangleAttentionEndingNode(FastTriangleAttention, TriangleAttentionEndingNode):
    """The same around the ending node, which transposes by itself."""


class FastAttentionPairBias1(attention_v1.AttentionPairBias):
    """Attention with pair bias of Boltz 1; with keys of their own or a cache of the sampler it is Boltz's code."""

    core: PairBiasAttention

    def forward(self, s: Tensor, z: Tensor, mask: Tensor, *others: Any, **options: Any) -> Tensor:
        """Update of ``s [B, N, C_s]`` from ``z [B, N, N, C_z]`` under ``mask [B, N]``, 1 = keep."""
        if others or options:
            return super().forward(s, z, mask, *others, **options)
        s = self.norm_s(s)
        return _attend(self, s, s, z, mask)


class FastAttentionPairBias2(attention_v2.AttentionPairBias):
    """Attention with pair bias of Boltz 2; for several samples it is Boltz's code."""

    core: PairBiasAttention

    def forward(self, s: Tensor, z: Tensor, mask: Tensor, k_in: Tensor, multiplicity: int = 1) -> Tensor:
        """Update of ``s [B, N, C_s]`` from ``z [B, N, N, C_z]`` under ``mask [B, N]``, 1 = keep."""
        if multiplicity != 1:
            return super().forward(s, z, mask, k_in, multiplicity)
        return _attend(self, s, k_in, z, mask)


def _attend(module: Any, s: Tensor, k_in: Tensor, z: Tensor, mask: Tensor) -> Tensor:
    """What both versions of attention with pair bias have in common: all but the norm of ``s``."""
    norm, projection = NormParameters.of(module.proj_z[0]), module.proj_z[1]
    _, bias = layer_norm_linear(z, norm, None, projection.weight, backend=module.core.config.backend)
    q, k, v = (
        linear(x).unflatten(-1, (module.num_heads, -1))
        for linear, x in ((module.proj_q, s), (module.proj_k, k_in), (module.proj_v, k_in))
    )
    with torch.autocast("cuda", enabled=False):
        keep = (mask != 0).expand(k.shape[:2])
        attended = module.core(*map(_wide, (q, k, v, bias)), keep).to(v.dtype)
    return module.proj_o(module.proj_g(s).sigmoid() * attended.flatten(-2))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class FastPairformerNoSeqLayer(pairformer.PairformerNoSeqLayer):
    """Layer without a single representation (Boltz 2: MSA, template and affinity modules)."""

    def forward(self, z: Tensor, pair_mask: Tensor, *_: Any, **_flags: Any) -> Tensor:
        """Updated ``z [B, N, N, C_z]`` under ``pair_mask [B, N, N]``; other arguments have no effect."""
        return _update_pairs(self, z, pair_mask, self.transition_z, self.dropout)


class FastPairformerLayer(pairformer.PairformerLayer):
    """Layer of Boltz 2, whose single representation is updated in fp32."""

    def forward(
        self, s: Tensor, z: Tensor, mask: Tensor, pair_mask: Tensor, *_: Any, **_flags: Any
    ) -> tuple[Tensor, Tensor]:
        """Updated ``s [B, N, C_s]`` and ``z [B, N, N, C_z]``; arguments for chunks and kernels have no effect."""
        z = _update_pairs(self, z, pair_mask, self.transition_z, self.dropout)
        with torch.autocast("cuda", enabled=False):
            s = _wide(s)
            normed = self.pre_norm_s(s)
            s = s + self.attention(s=normed, z=_wide(z), mask=_wide(mask), k_in=normed)
            return self.s_post_norm(s + self.transition_s(s)), z


class FastPairformerLayer1(trunk.PairformerLayer):
    """Layer of Boltz 1."""

    def forward(
        self, s: Tensor, z: Tensor, mask: Tensor, pair_mask: Tensor, *_: Any, **_flags: Any
    ) -> tuple[Tensor, Tensor]:
        """Updated ``s [B, N, C_s]`` and ``z [B, N, N, C_z]``; arguments for chunks and kernels have no effect."""
        z = _update_pairs(self, z, pair_mask, self.transition_z, self.dropout)
        if not self.no_update_s:
            s = s + self.attention(s, z, mask)
            s = s + self.transition_s(s)
        return s, z


class FastMSALayer1(trunk.MSALayer):
    """MSA layer of Boltz 1; that of Boltz 2 holds a :class:`FastPairformerNoSeqLayer`."""

    def forward(
        self,
        z: Tensor,
        m: Tensor,
        token_mask: Tensor,
        msa_mask: Tensor,
        chunk_heads_pwa: bool = False,
        chunk_size_transition_z: int | None = None,
        chunk_size_transition_msa: int | None = None,
        chunk_size_outer_product: int | None = None,
        *_: Any,
        **_flags: Any,
    ) -> tuple[Tensor, Tensor]:
        """Updated ``z [B, N, N, C_z]`` and ``m [B, S, N, C_m]``; chunks of work on the MSA are Boltz's."""
        averaged = self.pair_weighted_averaging(m, z, token_mask, chunk_heads_pwa)
        m = m + get_dropout_mask(self.msa_dropout, m, self.training) * averaged
        m = m + self.msa_transition(m, chunk_size_transition_msa)
        z = z + self.outer_product_mean(m, msa_mask, chunk_size_outer_product)
        return _update_pairs(self, z, token_mask, self.z_transition, self.z_dropout), m


def _update_pairs(layer: Any, z: Tensor, pair_mask: Tensor, last: Any, rate: float) -> Tensor:
    """Updated ``z [B, N, N, C_z]`` of a layer whose transition is ``last``; after the first step in place.

    At least in fp32, as Boltz's dropout makes it, whatever the products are in.
    """
    z = _wide(z)
    keep, backend = (pair_mask != 0).expand(z.shape[:-1]), layer.tri_att_start.mha.core.config.backend

    def dropout(columnwise: bool = False) -> Tensor | None:
        drawn = get_dropout_mask(rate, z, layer.training, columnwise=columnwise)
        return drawn.to(z.dtype) if layer.training else None

    z = _multiply(layer.tri_mul_out, z, keep, dropout(), incoming=False, out=None, backend=backend)
    out = None if torch.is_grad_enabled() else z
    z = _multiply(layer.tri_mul_in, z, keep, dropout(), incoming=True, out=out, backend=backend)
    z = attend_triangles(layer.tri_att_start, z, keep, dropout(), ending=False, out=out, backend=backend)
    z = attend_triangles(layer.tri_att_end, z, keep, dropout(True), ending=True, out=out, backend=backend)
    norm = NormParameters.of(last.norm)
    return transition(z, norm, last.fc1.weight, last.fc2.weight, last.fc3.weight, out=out, backend=backend)


def _multiply(
    module: Any,
    z: Tensor,
    keep: Tensor,
    dropout: Tensor | None,
    *,
    incoming: bool,
    out: Tensor | None,
    backend: Backend,
) -> Tensor:
    """Triangle multiplication with its residual; the first half of ``p_in`` and of ``g_in`` is a, the second b."""
    a, b = module.p_in.weight.chunk(2)
    a_gate, b_gate = module.g_in.weight.chunk(2)
    norms = NormParameters.of(module.norm_in), NormParameters.of(module.norm_out)
    weights = TriangleWeights(*norms, a, a_gate, b, b_gate, gate=module.g_out.weight, out=module.p_out.weight)
    slab = rows_at_a_time(z, weights.out.shape[1])
    return triangle_multiplication(
        z, keep, weights, dropout, incoming=incoming, out=out, slab_rows=slab, backend=backend
    )


_NEW_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    TriangleAttention: FastTriangleAttention,
    TriangleAttentionEndingNode: FastTriangleAttentionEndingNode,
    attention_v1.AttentionPairBias: FastAttentionPairBias1,
    attention_v2.AttentionPairBias: FastAttentionPairBias2,
}
"""Of attention, by exact class: a subclass may compute something else."""

_NEW_LAYER: dict[type[nn.Module], tuple[type[nn.Module], str]] = {
    pairformer.PairformerNoSeqLayer: (FastPairformerNoSeqLayer, "transition_z"),
    pairformer.PairformerLayer: (FastPairformerLayer, "transition_z"),
    trunk.PairformerLayer: (FastPairformerLayer1, "transition_z"),
    trunk.MSALayer: (FastMSALayer1, "z_transition"),
}
"""Of layers, with the name of the transition of the pair representation."""

_PARTS: dict[str, type[nn.Module]] = {
    "tri_mul_out": triangular_mult.TriangleMultiplicationOutgoing,
    "tri_mul_in": triangular_mult.TriangleMultiplicationIncoming,
    "tri_att_start": TriangleAttention,
    "tri_att_end": TriangleAttentionEndingNode,
}

_KNOWN = {
    *(nn.Linear, nn.LayerNorm, nn.Sigmoid, nn.SiLU, primitives.Linear, primitives.LayerNorm, Attention, Transition),
    *_PARTS.values(),
}
"""What the parts of a layer are made of."""


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
        if type(module) not in _NEW_LAYER:
            continue
        cls, last = _NEW_LAYER[type(module)]
        reason = block_obstacle(module, path, _PARTS | {last: Transition}, _takes, swapped)
        if reason is None:
            around[path] = NewClass(module, cls)
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
    return not isinstance(layer, nn.LayerNorm) or layer.weight is not None


def _target(path: str, module: nn.Module) -> Target:
    new = NewClass(module, _NEW_CLASS[type(module)])
    if isinstance(module, TriangleAttention):
        return Target(path, (new, NewClass(module.mha, FastAttention)), module.mha)
    return Target(path, (new,), module)


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Attention that is known here, and other modules that look like attention and hold no such module."""
    for path, module in model.named_modules():
        if isinstance(module, (Attention, PairBiasAttention)):
            continue
        known = isinstance(module, (*_NEW_CLASS, PairWeightedAveraging))
        if known or (looks_like_attention(module) and sum(map(looks_like_attention, module.modules())) == 1):
            yield path, module


def _obstacle(module: nn.Module) -> str | None:
    """Why ``module`` cannot be swapped; None if it can."""
    if isinstance(module, PairWeightedAveraging):
        return "has neither queries nor keys: its weights are made from the pair representation alone"
    if isinstance(module, tuple(_NEW_CLASS.values())):
        return "accelerated already; restore it first, or set another config with set_attention"
    if type(module) not in _NEW_CLASS:
        known_base = isinstance(module, tuple(_NEW_CLASS))
        return "a subclass, which may compute something else" if known_base else "not an attention that is known here"
    if isinstance(module, TriangleAttention):
        if type(module.mha) is not Attention:
            return f"its mha is not Boltz's Attention but {type(module.mha).__qualname__}"
        return instance_obstacle(module)
    if not getattr(module, "initial_norm", True) or not getattr(module, "compute_pair_bias", True):
        return "belongs to a diffusion transformer, which stays Boltz's"
    if any(foreign_part(module.get_submodule(name), _takes) is not None for name in ("proj_z.0", "proj_z.1")):
        return "its pair bias comes from layers that are not Boltz's own, has an offset, or a layer norm without scale"
    return instance_obstacle(module, "")
