"""OpenFold3 0.5: what all steps and samples of its sampler have in common is computed once.

Only the noisy positions and the noise level change over the steps of one run of ``SampleDiffusion``. The conditioned
pair representation, the biases of all attentions made of it, and the conditioning of the atoms do not: they are kept
while the sampler runs, within half of the free memory (the log says what did not fit), and freed when it returns.

Without a sampler around them, or with gradients, the modules here compute what OpenFold3's do, by its code. Within a
sampler, hooks on the blocks of the transformers and on attention, norms and transitions in them are not called, and
what a hook on the conditioning makes of the pair representation counts in the first step alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from openfold3.core.model.layers.attention_pair_bias import CrossAttentionPairBias, DiffusionAttentionPairBias
from openfold3.core.model.layers.diffusion_conditioning import DiffusionConditioning
from openfold3.core.model.layers.diffusion_transformer import DiffusionTransformer, DiffusionTransformerBlock
from openfold3.core.model.layers.sequence_local_atom_attention import (
    AtomAttentionDecoder,
    AtomAttentionEncoder,
    NoisyPositionEmbedder,
)
from openfold3.core.model.layers.transition import ConditionedTransitionBlock
from openfold3.core.model.primitives import AdaLN, LayerNorm, Linear, SwiGLU
from openfold3.core.model.primitives.attention import Attention
from openfold3.core.model.structure.diffusion_module import DiffusionModule, SampleDiffusion
from torch import Tensor, nn

from pairformer_fast.integrations.acceleration import NewClass, foreign_part
from pairformer_fast.integrations.openfold3_atoms import FastAtomTransformer
from pairformer_fast.integrations.openfold3_blocks import (
    EPS,
    Condition,
    adapted,
    normalised,
    updated,
    with_transition,
)
from pairformer_fast.integrations.openfold3_kept import Inputs, Keeps, Kept
from pairformer_fast.integrations.openfold3_steps import FastAtomAttentionDecoder, FastDiffusionModule
from pairformer_fast.kernels.flash_bias import Factors, flash_bias_attention

_EPS_ATOMS = 1e-9
"""Added to the number of atoms of a token."""


class FastSampleDiffusion(SampleDiffusion):
    """Sampling whose steps share what does not depend on the noise."""

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """Sample; arguments as in the base class."""
        parts = [module for module in self.modules() if isinstance(module, Keeps)]
        if torch.is_grad_enabled() or not parts:
            return super().forward(*arguments, **options)
        readers = [part for part in parts if isinstance(part, (FastAtomAttentionEncoder, FastDiffusionTransformer))]
        with Kept(next(self.parameters()).device, parts, readers).running():
            return super().forward(*arguments, **options)


class FastDiffusionConditioning(Keeps, DiffusionConditioning):
    """Conditioning that adds the noise level of a step to what is kept.

    What all modules have kept belongs to these very trunk outputs and features, unchanged: it is dropped when others
    come.
    """

    def forward(
        self,
        batch: dict[str, Any],
        t: Tensor,
        si_input: Tensor,
        si_trunk: Tensor,
        zij_trunk: Tensor,
        use_conditioning: bool,
        chunk_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Conditioned single and pair representation; the latter empty once everybody has kept what it needs of it."""
        options = {"t": t, "use_conditioning": use_conditioning, "chunk_size": chunk_size}
        kept, inputs = self.kept, Inputs(batch, (si_input, si_trunk, zij_trunk), use_conditioning)
        if kept is None:
            return super().forward(batch, si_input=si_input, si_trunk=si_trunk, zij_trunk=zij_trunk, **options)
        found = kept.of(self)
        if found is None or not found[0].same(inputs):
            kept.clear()
            single = self.linear_s(self.layer_norm_s(torch.cat([si_trunk * use_conditioning, si_input], dim=-1)))
            s, z = super().forward(batch, si_input=si_input, si_trunk=si_trunk, zij_trunk=zij_trunk, **options)
            if not kept.keep(self, (inputs, single, z), single.nbytes + z.nbytes):
                kept.keep(self, (inputs, None, None), 0)
            return s, z
        _, single, z = found
        if single is None:
            return super().forward(batch, si_input=si_input, si_trunk=si_trunk, zij_trunk=zij_trunk, **options)
        if not kept.readers and z.numel():
            z = z.new_empty(0)
            kept.keep(self, (inputs, single, z), single.nbytes)
        level = self.fourier_emb((torch.log(t / self.sigma_data) / 4).unsqueeze(-1))
        s = single + self.linear_n(self.layer_norm_n(level)).unsqueeze(-2)
        for transition in self.transition_s:
            s = s + transition(s, mask=batch["token_mask"])
        return s, z


class FastAtomAttentionEncoder(Keeps, AtomAttentionEncoder):
    """Encoder that keeps the conditioning of single atoms and of pairs, to which a step adds its noisy positions."""

    def forward(
        self,
        batch: dict[str, Any],
        rl: Tensor | None = None,
        si_trunk: Tensor | None = None,
        zij_trunk: Tensor | None = None,
        use_high_precision_attention: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens ``[B, S, N, C]``, atoms, and the conditioning of atoms and pairs; arguments as in the base class."""
        if self.kept is None or rl is None:
            return super().forward(batch, rl, si_trunk, zij_trunk, use_high_precision_attention)
        noisy, atoms, pairs = self.get_atom_reps(batch, rl, si_trunk, zij_trunk)
        mask, options = batch["atom_mask"], {"use_high_precision_attention": use_high_precision_attention}
        updated_atoms = self.atom_transformer(a=noisy, s=atoms, z=pairs, mask=mask, **options) * mask.unsqueeze(-1)
        return _mean_by_token(self.linear_q(updated_atoms), batch), updated_atoms, atoms, pairs

    def get_atom_reps(
        self,
        batch: dict[str, Any],
        rl: Tensor | None = None,
        si_trunk: Tensor | None = None,
        zij_trunk: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Atoms with their noisy positions, and the conditioning of atoms and of pairs; as in the base class."""
        kept = self.kept
        if kept is None or rl is None or not kept.has_room(self):
            return super().get_atom_reps(batch, rl, si_trunk, zij_trunk)
        if (found := kept.of(self)) is not None:
            atoms, pairs = found
            return atoms + self.noisy_position_embedder.linear_r(rl), atoms, pairs
        noisy, atoms, pairs = super().get_atom_reps(batch, rl, si_trunk, zij_trunk)
        if kept.keep(self, (atoms, pairs), atoms.nbytes + pairs.nbytes):
            kept.readers.discard(self)
        return noisy, atoms, pairs


def _mean_by_token(x: Tensor, batch: dict[str, Any]) -> Tensor:
    """Mean ``[B, S, N, C]`` over the atoms of each token of ``x [B, S, A, C]``, without an index of its size."""
    (entries, samples, atoms, channels), tokens = x.shape, batch["token_mask"].shape[-1]
    mask = batch["atom_mask"].reshape(entries, -1, atoms)
    # Padded atoms go to a token after the last.
    of_token = torch.where(mask != 0, batch["atom_to_token_index"].reshape(mask.shape).long(), tokens)
    counts = x.new_zeros(entries, mask.shape[1], tokens + 1).scatter_add_(-1, of_token, mask.to(x.dtype))
    first = torch.arange(entries * samples, device=x.device).view(entries, samples, 1) * (tokens + 1)
    sums = x.new_zeros(entries * samples * (tokens + 1), channels)
    sums.index_add_(0, (first + of_token).flatten(), x.flatten(0, 2))
    means = sums.view(entries, samples, tokens + 1, channels) / (counts[..., None] + _EPS_ATOMS)
    return means[..., :tokens, :]


class FastDiffusionTransformer(Keeps, DiffusionTransformer):
    """Diffusion transformer that keeps its pair biases, dense or as factors, one for all samples."""

    def forward(
        self,
        a: Tensor,
        s: Tensor,
        z: Tensor,
        mask: Tensor | None = None,
        use_high_precision_attention: bool = False,
        _mask_trans: bool = True,
        **kernel_flags: Any,
    ) -> Tensor:
        """Updated ``a [B, samples, N, C]``; arguments as in the base class, ``z`` unused once all biases are kept."""
        kept = self.kept
        state: _Attention | None = None if kept is None else kept.of(self)
        if kept is not None and state is None and _shared(a, z):
            state = _Attention(len(self.blocks))
            kept.keep(self, state, 0)
        if kept is None or state is None:
            options = {"use_high_precision_attention": use_high_precision_attention, "_mask_trans": _mask_trans}
            return super().forward(a=a, s=s, z=z, mask=mask, **options, **kernel_flags)
        biases, keep = state.biases, state.keep(mask, a)
        normed = None if all(bias is not None for bias in biases) else self.layer_norm_z(z).squeeze(1)
        blocks: list[Any] = list(self.blocks)
        for index, block in enumerate(blocks):
            attention, mha = block.attention_pair_bias, block.attention_pair_bias.mha
            condition = Condition.of(block, [attention.layer_norm_a], s, mask if _mask_trans else None)
            q, k, v, gate = _heads(mha, adapted(normalised(a), condition, 0), use_high_precision_attention)
            bias = biases[index]
            if bias is None:
                assert normed is not None
                bias = self._bias(attention, normed, q, k, keep, state, kept, index)
            attended = flash_bias_attention(q, k, v, bias, keep, mha.core.config.backend, gate=gate)
            a = updated(a, condition.attention_gate, mha.linear_o(attended.flatten(-2).to(a.dtype)))
            a = with_transition(a, block.conditioned_transition, condition)
        if all(bias is not None for bias in biases):
            kept.readers.discard(self)
        return a

    def _bias(
        self,
        attention: Any,
        normed: Tensor,
        q: Tensor,
        k: Tensor,
        keep: Tensor | None,
        state: _Attention,
        kept: Kept,
        index: int,
    ) -> Tensor | Factors:
        """What attention of a block takes as its bias, kept if there is room for it."""
        dense = attention.linear_z(normed).movedim(-1, 1).to(q.dtype).contiguous()
        if index in state.dense:
            return dense
        decided = attention.mha.core.decide(q, k, dense, keep)
        parts = [decided] if isinstance(decided, Tensor) else [getattr(decided, one.name) for one in fields(decided)]
        size = state.nbytes + sum(part.nbytes for part in parts if isinstance(part, Tensor))
        if kept.has_room(self) and kept.keep(self, state, size):
            state.nbytes, state.biases[index] = size, decided
        elif isinstance(decided, Tensor):
            state.dense.add(index)
        return decided


def _shared(a: Tensor, z: Tensor) -> bool:
    """Whether one pair representation is for all samples."""
    return a.ndim == 4 and z.ndim == 5 and z.shape[:2] == (len(a), 1)


def _heads(mha: Any, y: Tensor, high_precision: bool) -> list[Tensor]:
    """q (not scaled), k, v and gate ``[B, S, N, H, D]``."""
    projected = [layer(y) for layer in (mha.linear_q, mha.linear_k, mha.linear_v, mha.linear_g)]
    if high_precision:
        projected = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in projected]
    return [x.unflatten(-1, (mha.no_heads, -1)) for x in projected]


class _Attention:
    """What :class:`FastDiffusionTransformer` keeps.

    Attributes
    ----------
    biases : list of Tensor or Factors, optional
        By block; None where the bias is computed in every step.
    dense : set of int
        Blocks whose bias was left dense and did not fit.
    nbytes : int
        Of the biases.
    """

    def __init__(self, blocks: int) -> None:
        self.biases: list[Tensor | Factors | None] = [None] * blocks
        self.dense: set[int] = set()
        self.nbytes = 0
        self._mask: Tensor | None = None
        self._keep: Tensor | None = None

    def keep(self, mask: Tensor | None, a: Tensor) -> Tensor | None:
        """Which keys of ``a [B, S, N, C]`` are kept, bool ``[B, S, N]``; None if all are, found once for a mask."""
        if mask is not self._mask:
            # A capture ends here, with an error: only what was found counts.
            self._keep = None if mask is None or bool(mask.all()) else (mask != 0).expand(a.shape[:-1])
            self._mask = mask
        return self._keep


_PARTS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "": (DiffusionModule, FastDiffusionModule),
    "diffusion_conditioning": (DiffusionConditioning, FastDiffusionConditioning),
    "atom_attn_enc": (AtomAttentionEncoder, FastAtomAttentionEncoder),
    "atom_attn_enc.atom_transformer": (DiffusionTransformer, FastAtomTransformer),
    "diffusion_transformer": (DiffusionTransformer, FastDiffusionTransformer),
    "atom_attn_dec": (AtomAttentionDecoder, FastAtomAttentionDecoder),
    "atom_attn_dec.atom_transformer": (DiffusionTransformer, FastAtomTransformer),
}

_IN_TRANSFORMERS = {
    *(nn.ModuleList, nn.Sigmoid, nn.SiLU, Linear, LayerNorm, AdaLN, SwiGLU, Attention),
    *(DiffusionTransformer, DiffusionTransformerBlock, ConditionedTransitionBlock),
    *(DiffusionAttentionPairBias, CrossAttentionPairBias),
}


def sampler_obstacle(sampler: SampleDiffusion, paths: Mapping[nn.Module, str], swapped: set[str]) -> str | None:
    """Why a sampler and its diffusion module stay OpenFold3's; None if they need not.

    Parameters
    ----------
    sampler : SampleDiffusion
    paths : mapping of nn.Module to str
        Of all modules of the model.
    swapped : set of str
        Paths of the attention that is accelerated.
    """
    denoiser: Any = sampler.diffusion_module
    if "forward" in vars(sampler):
        return "its forward was replaced on the instance"
    if type(denoiser) is not DiffusionModule:
        return "its diffusion module is not the one that is known here"
    for name, (cls, _) in _PARTS.items():
        part = denoiser.get_submodule(name)
        if type(part) is not cls or vars(part).keys() & {"forward", "get_atom_reps"}:
            return f"{name} of its diffusion module is not OpenFold3's own"
        inner = foreign_part(part, _known) if cls is DiffusionTransformer else None
        if inner is not None:
            return f"{name}.{inner} of its diffusion module is not OpenFold3's own, or of a kind that is not known here"
    embedder = denoiser.atom_attn_enc.noisy_position_embedder
    if type(embedder) is not NoisyPositionEmbedder or "forward" in vars(embedder):
        return "the embedding of noisy positions in its diffusion module is not OpenFold3's own"
    if not {paths[block.attention_pair_bias] for block in denoiser.diffusion_transformer.blocks} <= swapped:
        return "attention of its diffusion transformer is not accelerated"
    return None


def around_sampler(sampler: SampleDiffusion, paths: Mapping[nn.Module, str]) -> dict[str, NewClass]:
    """Classes of a sampler without an obstacle and of the parts of its diffusion module, by path."""
    parts = {name: sampler.diffusion_module.get_submodule(name) for name in _PARTS}
    around = {paths[sampler]: NewClass(sampler, FastSampleDiffusion)}
    return around | {paths[part]: NewClass(part, _PARTS[name][1]) for name, part in parts.items()}


def _known(module: nn.Module) -> bool:
    """Whether a part of a transformer of the diffusion module computes what is computed in its stead."""
    if type(module) not in _IN_TRANSFORMERS:
        return False
    if isinstance(module, LayerNorm):
        return module.eps == EPS
    if isinstance(module, Linear):
        return module.precision is None
    return not isinstance(module, Attention) or module.linear_g is not None
