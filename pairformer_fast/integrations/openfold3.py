"""OpenFold3 0.5: pair blocks, triangle attention, attention with pair bias, and that of the diffusion transformer.

A pair block (of the trunk, the MSA, the template and the confidence stack) runs this package's operations with
OpenFold3's weights: triangle multiplication, triangle attention, transition, residuals. In attention elsewhere only
what lies between q, k, v and the gate is replaced, and the rest stays OpenFold3's code. SwiGLU transitions elsewhere
are swapped one by one (:mod:`~pairformer_fast.integrations.openfold3_transitions`). The bias around the ending node has
OpenFold3's orientation, b[i, k] (``transpose_bias=True``) as in AlphaFold 3, not b[k, i] as in AlphaFold 2. While the
sampler of the diffusion module runs, biases and all else that its steps have in common are computed once
(:mod:`~pairformer_fast.integrations.openfold3_sampling`).

Learned factors are for the triangle attention of whole pair blocks and for single attention; templates and the
diffusion transformer keep their dense bias.

Two things differ from OpenFold3 on purpose. A row whose keys are all masked gives zeros, where OpenFold3 averages over
masked values; with masks made from tokens this concerns padding alone. And the host's flags for chunks, in-place work
and kernels do not reach attention, which never holds a table of all its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from openfold3.core.model.latent.base_blocks import PairBlock
from openfold3.core.model.latent.pairformer import PairFormerStack
from openfold3.core.model.latent.template_module import TemplatePairBlock
from openfold3.core.model.layers.attention_pair_bias import (
    AttentionPairBias,
    CrossAttentionPairBias,
    DiffusionAttentionPairBias,
)
from openfold3.core.model.layers.msa import MSAAttention, MSAPairWeightedAveraging
from openfold3.core.model.layers.transition import SwiGLUTransition
from openfold3.core.model.layers.triangular_attention import TriangleAttention, TriangleAttentionEndingNode
from openfold3.core.model.layers.triangular_multiplicative_update import (
    TriangleMultiplicationIncoming,
    TriangleMultiplicationOutgoing,
)
from openfold3.core.model.primitives import DropoutRowwise, LayerNorm, Linear, SwiGLU
from openfold3.core.model.primitives.attention import Attention, GlobalAttention
from openfold3.core.model.structure.diffusion_module import SampleDiffusion
from torch import Tensor, nn

from pairformer_fast.bias import PairBiasAttention
from pairformer_fast.config import Backend
from pairformer_fast.integrations.acceleration import (
    NewClass,
    Plan,
    Skipped,
    Target,
    attention_owners,
    block_obstacle,
    foreign_part,
    instance_obstacle,
    sort_out,
)
from pairformer_fast.integrations.openfold3_sampling import around_sampler, sampler_obstacle
from pairformer_fast.integrations.openfold3_stack import FastPairFormerStack
from pairformer_fast.integrations.openfold3_transitions import (
    FastSwiGLUTransition,
    has_kernel_parameters,
    is_transition,
    transition_obstacle,
)
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm_linear import layer_norm_linear
from pairformer_fast.model.attention import TriangleUpdate
from pairformer_fast.model.factors import core_path
from pairformer_fast.model.primitives import SharedDropout, transform
from pairformer_fast.model.tokens import token_means
from pairformer_fast.model.triangle_multiplication import multiply_triangles


class FastAttention(Attention):
    """Multi-head attention whose core is a :class:`~pairformer_fast.bias.PairBiasAttention`."""

    core: PairBiasAttention

    def forward(
        self, q_x: Tensor, kv_x: Tensor, biases: list[Tensor], use_high_precision: bool = False, **_kernel_flags: Any
    ) -> Tensor:
        """Attend.

        Parameters
        ----------
        q_x, kv_x : Tensor
            ``[*, N, C]``.
        biases : list of Tensor
            Mask bias ``[*, 1, 1, N]``, 0 for keys to keep, and pair bias ``[*, H, N, N]``; leading dimensions
            broadcast.
        use_high_precision : bool
            Attend in fp32 (fp64 for fp64 inputs), whatever the dtype of the projections.

        Returns
        -------
        Tensor
            ``[*, N, C]``.
        """
        q, k, v = (x.transpose(-2, -3) for x in self._prep_qkv(q_x, kv_x, apply_scale=False))
        mask_bias, pair_bias = biases
        dtype = torch.promote_types(q.dtype, torch.float32) if use_high_precision else q.dtype
        out = _attend(self.core, q.to(dtype), k.to(dtype), v.to(dtype), pair_bias.to(dtype), mask_bias)
        return self._wrap_up(out.to(q.dtype), q_x)

    def with_factors(self, x: Tensor, tokens: Tensor, keep: Tensor, high_precision: bool) -> Tensor:
        """The same of ``x [B, N, C]`` where factors are learned.

        Parameters
        ----------
        x : Tensor
            Normalised.
        tokens, keep : Tensor
            What the network reads, see :meth:`PairBiasAttention.factors`.
        high_precision : bool
            As above.
        """
        q, k, v = (x.transpose(-2, -3) for x in self._prep_qkv(x, x, apply_scale=False))
        wide = torch.promote_types(q.dtype, torch.float32) if high_precision else q.dtype
        out = self.core(q.to(wide), k.to(wide), v.to(wide), self.core.factors(tokens, keep, q.to(wide)), keep)
        return self._wrap_up(out.to(q.dtype), x)


class FastTriangleAttention(TriangleAttention):
    """Triangle attention that is not cut into chunks of rows: one factorisation serves all of them."""

    def _chunk(self, x: Tensor, biases: list[Tensor], *_limits: Any, **_flags: Any) -> Tensor:
        return self.mha(q_x=x, kv_x=x, biases=biases)


class FastTriangleAttentionEndingNode(FastTriangleAttention, TriangleAttentionEndingNode):
    """The same for the class that transposes by itself."""


def single_tokens(
    module: Any, a: Tensor, z: Tensor, mask: Tensor | None, backend: Backend
) -> tuple[Tensor, Tensor, Tensor]:
    """What single attention with learned factors reads, as a batch.

    Parameters
    ----------
    module : AttentionPairBias
    a, z, mask : Tensor
        ``[*, N, C]``, ``[*, N, N, C_z]`` and, optional, ``[*, N]``.
    backend : Backend
        Of the layer norm of z.

    Returns
    -------
    normed, tokens, keep : Tensor
        Normalised a ``[B, N, C]``, features of the network ``[B, N, 2 C_z + C]``, bool ``[B, N]``.
    """
    shape = a.shape
    keep = torch.ones_like(a[..., 0], dtype=torch.bool) if mask is None else (mask != 0).expand(shape[:-1])
    normed, keep = module.layer_norm_a(a).reshape(-1, *shape[-2:]), keep.reshape(-1, shape[-2])
    z = z.expand(*shape[:-2], *z.shape[-3:]).reshape(-1, *z.shape[-3:])
    means = token_means(z, NormParameters.of(module.layer_norm_z), keep, backend)
    return normed, torch.cat([means, normed.to(means.dtype)], dim=-1), keep


class FastAttentionPairBias(AttentionPairBias):
    """Attention whose pair bias is normalised, projected and laid out in one pass over the pair representation."""

    def forward(
        self,
        a: Tensor,
        z: Tensor,
        mask: Tensor | None = None,
        use_high_precision_attention: bool = False,
        **kernel_flags: Any,
    ) -> Tensor:
        """Update of ``a [*, N, C]``; arguments as in the base class."""
        if not self.mha.core.learned:
            return super().forward(
                a, z, mask, use_high_precision_attention=use_high_precision_attention, **kernel_flags
            )
        normed, tokens, keep = single_tokens(self, a, z, mask, self.mha.core.config.backend)
        return self.mha.with_factors(normed, tokens, keep, use_high_precision_attention).view(a.shape)

    def _prep_bias(self, a: Tensor, z: Tensor, mask: Tensor | None) -> list[Tensor]:
        mask = a.new_ones(a.shape[:-1]) if mask is None else mask.expand(a.shape[:-1])
        norm, backend = NormParameters.of(self.layer_norm_z), self.mha.core.config.backend
        _, bias = layer_norm_linear(z.reshape(-1, *z.shape[-3:]), norm, None, self.linear_z.weight, backend=backend)
        return [(self.inf * (mask - 1))[..., None, None, :], bias.view(*z.shape[:-3], *bias.shape[-3:])]


class FastPairBlock(PairBlock):
    """The updates of the pair representation by the operations of :mod:`pairformer_fast.kernels`."""

    def forward(
        self, z: Tensor, pair_mask: Tensor, *_: Any, inplace_safe: bool = False, _mask_trans: bool = True, **_flags: Any
    ) -> Tensor:
        """Updated ``z [*, N, N, C_z]`` under ``pair_mask [*, N, N]``; flags for chunks and kernels have no effect."""
        return _update_pairs(self, z, pair_mask, inplace_safe, _mask_trans)


class FastTemplatePairBlock(TemplatePairBlock):
    """The same for templates, one after the other as in the base class, which copies results where that is safe."""

    def _forward_single_template(
        self, t: Tensor, mask: Tensor, *_: Any, _mask_trans: bool = True, **_flags: Any
    ) -> Tensor:
        return _update_pairs(self, t, mask, False, _mask_trans)


def _update_pairs(block: Any, z: Tensor, pair_mask: Tensor, inplace_safe: bool, mask_transition: bool) -> Tensor:
    """Updated ``z [*, N, N, C_z]`` under ``pair_mask [*, N, N]``, written over if that is safe."""
    shape = z.shape
    z, keep = z.reshape(-1, *shape[-3:]), (pair_mask != 0).expand(shape[:-1]).reshape(-1, *shape[-3:-1])
    backend = block.tri_att_start.mha.core.config.backend
    first = z if inplace_safe and not torch.is_grad_enabled() else None

    def dropout(shared_dim: int) -> Tensor | None:
        return SharedDropout(block.ps_dropout_row_layer.r, shared_dim).train(block.training)(z)

    z = multiply_triangles(block.tri_mul_out, z, keep, dropout(-3), incoming=False, out=first, backend=backend)
    out = None if torch.is_grad_enabled() else z
    z = multiply_triangles(block.tri_mul_in, z, keep, dropout(-3), incoming=True, out=out, backend=backend)
    z = TriangleUpdate(block.tri_att_start, False, backend)(z, keep, dropout(-3), out)
    z = TriangleUpdate(block.tri_att_end, True, backend)(z, keep, dropout(-2), out)
    z = transform(block.pair_transition, z, keep if mask_transition else None, out=out, backend=backend)
    return z.view(shape)


_NEW_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    TriangleAttention: FastTriangleAttention,
    TriangleAttentionEndingNode: FastTriangleAttentionEndingNode,
    AttentionPairBias: FastAttentionPairBias,
    DiffusionAttentionPairBias: DiffusionAttentionPairBias,
}
"""By exact class: a subclass may compute something else. Where the class stays, that of ``mha`` is all that changes."""

_NEW_BLOCK: dict[type[nn.Module], type[nn.Module]] = {
    PairBlock: FastPairBlock,
    TemplatePairBlock: FastTemplatePairBlock,
}

_OTHER: dict[type[nn.Module], str] = {
    CrossAttentionPairBias: "attends between blocks of atoms, not with one bias for N x N tokens",
    MSAAttention: "attention over an MSA is not supported",
    MSAPairWeightedAveraging: "has neither queries nor keys: its weights are made from the pair representation alone",
    GlobalAttention: "global attention has no pair bias",
}

_ALREADY = "accelerated already; restore it first, or set another config with set_attention"
_SUBCLASS = "a subclass, which may compute something else"

_PARTS: dict[str, type[nn.Module]] = {
    "tri_mul_out": TriangleMultiplicationOutgoing,
    "tri_mul_in": TriangleMultiplicationIncoming,
    "tri_att_start": TriangleAttention,
    "tri_att_end": TriangleAttention,
    "pair_transition": SwiGLUTransition,
    "ps_dropout_row_layer": DropoutRowwise,
}

_KNOWN = {Linear, LayerNorm, Attention, SwiGLU, nn.SiLU, nn.Sigmoid, nn.Dropout, *_PARTS.values()}
"""What the parts of a pair block are made of."""


def plan(model: nn.Module) -> Plan:
    """What to swap in ``model``; nothing is changed yet.

    Raises
    ------
    ValueError
        If there is nothing to swap.
    """
    targets, skipped = sort_out(
        model, attention_owners(model, Attention, tuple(_OTHER)), _obstacle, _target, _NEW_CLASS
    )
    swapped = {target.path for target in targets}
    paths = {module: path for path, module in model.named_modules()}
    around: dict[str, NewClass] = {}
    for module, path in paths.items():
        if type(module) is SampleDiffusion:
            reason = sampler_obstacle(module, paths, swapped)
            new = {} if reason else around_sampler(module, paths)
        elif isinstance(module, PairBlock):
            reason = _block_obstacle(module, path, swapped)
            new = {} if reason else {path: NewClass(module, _NEW_BLOCK[type(module)])}
        else:
            continue
        if reason is None:
            around |= new
        else:
            skipped.append(Skipped.of(path, module, reason))
    whole = {path for path, change in around.items() if change.cls is FastPairBlock}
    for module, path in paths.items():
        if type(module) is PairFormerStack and all(_runs_here(paths[block], whole, swapped) for block in module.blocks):
            around[path] = NewClass(module, FastPairFormerStack)
    for path, module in _transitions(paths, around):
        reason = transition_obstacle(module)
        if reason is None:
            around[path] = NewClass(module, FastSwiGLUTransition)
        else:
            skipped.append(Skipped.of(path, module, reason))
    learnable = dict(_learnable(targets, whole))
    return Plan(targets, skipped, around, learnable)


def _block_obstacle(block: PairBlock, path: str, swapped: set[str]) -> str | None:
    """Why a pair block cannot run here as a whole; None if it can."""
    if isinstance(block, tuple(_NEW_BLOCK.values())):
        return _ALREADY
    if type(block) not in _NEW_BLOCK:
        return _SUBCLASS
    if not getattr(block, "tri_mul_first", True):
        return "its attention comes before its triangle multiplication"
    return block_obstacle(block, path, _PARTS, _takes, swapped)


def _runs_here(block: str, whole: set[str], swapped: set[str]) -> bool:
    """Whether the pair representation and the single attention of a Pairformer block are updated here."""
    return f"{block}.pair_stack" in whole and f"{block}.attn_pair_bias" in swapped


def _transitions(paths: Mapping[nn.Module, str], around: Mapping[str, NewClass]) -> Iterator[tuple[str, nn.Module]]:
    """Transitions that no pair block runs as a part of itself."""
    fast = tuple(_NEW_BLOCK.values())
    blocks = {path for module, path in paths.items() if isinstance(module, fast)}
    blocks |= {path for path, change in around.items() if change.cls in fast}
    for module, path in paths.items():
        if is_transition(module) and path.rpartition(".")[0] not in blocks:
            yield path, module


def _learnable(targets: Iterable[Target], blocks: set[str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Features of a token and heads of triangle attention in whole pair ``blocks`` and of single attention, by core."""
    for path, classes, holder in targets:
        module: Any = classes[0].module
        mha: Any = holder
        if path.rpartition(".")[0] in blocks and classes[0].cls is FastTriangleAttention:
            yield core_path(path), (2 * module.linear_z.in_features, mha.no_heads)
        elif classes[0].cls is FastAttentionPairBias:
            yield core_path(path), (2 * module.linear_z.in_features + mha.linear_q.in_features, mha.no_heads)


def _takes(layer: nn.Module) -> bool:
    """Whether the operations here can stand for a layer."""
    if type(layer) not in _KNOWN:
        return False
    if isinstance(layer, Attention):
        return layer.linear_g is not None
    return has_kernel_parameters(layer)


def _target(path: str, module: nn.Module) -> Target:
    mha = module.get_submodule("mha")
    cls = _NEW_CLASS[type(module)]
    if cls is FastAttentionPairBias and not all(
        foreign_part(module.get_submodule(name), _takes) is None for name in ("linear_z", "layer_norm_z")
    ):
        cls = AttentionPairBias
    return Target(path, (NewClass(module, cls), NewClass(mha, FastAttention)), mha)


def _obstacle(module: nn.Module) -> str | None:
    """Why ``module`` cannot be swapped; None if it can."""
    for known, reason in _OTHER.items():
        if isinstance(module, known):
            return reason
    if isinstance(getattr(module, "mha", None), FastAttention):
        return _ALREADY
    if type(module) not in _NEW_CLASS:
        return _SUBCLASS if isinstance(module, tuple(_NEW_CLASS)) else "not an attention that is known here"
    if type(module.mha) is not Attention:
        return f"its mha is not OpenFold3's Attention but {type(module.mha).__qualname__}"
    return instance_obstacle(module)


def _attend(core: PairBiasAttention, q: Tensor, k: Tensor, v: Tensor, pair_bias: Tensor, mask_bias: Tensor) -> Tensor:
    """Bring the host's broadcast shapes into those of the core.

    A bias with a last leading dimension of 1 is shared by all rows of q: the rows I of triangle attention, the samples
    of the diffusion transformer.
    """
    *leading, tokens, heads, dim = q.shape
    batch, rows = leading, []
    if pair_bias.ndim > 3 and pair_bias.shape[-4] == 1 and leading[-1] > 1:
        batch, rows = leading[:-1], leading[-1:]
        pair_bias = pair_bias.squeeze(-4)
    bias = pair_bias.expand(*batch, heads, tokens, tokens).reshape(-1, heads, tokens, tokens)
    keep = (mask_bias == 0)[..., 0, 0, :].expand(*leading, tokens).reshape(-1, *rows, tokens)
    q, k, v = (x.reshape(-1, *rows, tokens, heads, dim) for x in (q, k, v))
    return core(q, k, v, bias, keep).reshape(*leading, tokens, heads, dim)
