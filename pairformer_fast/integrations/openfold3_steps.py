"""OpenFold3 0.5: steps of its sampler as one CUDA graph, once they have kept all that they share.

The first step of a run computes what is kept (:mod:`~pairformer_fast.integrations.openfold3_sampling`), the second is
captured on a GPU, and the others are replayed with their own noisy positions and noise level.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from openfold3.core.model.layers.sequence_local_atom_attention import AtomAttentionDecoder
from openfold3.core.model.structure.diffusion_module import DiffusionModule
from openfold3.core.utils.atomize_utils import broadcast_token_feat_to_atoms
from torch import Tensor
from torch.nn import functional

from pairformer_fast.bias import PairBiasAttention
from pairformer_fast.integrations.acceleration import Releases
from pairformer_fast.integrations.openfold3_kept import Inputs, Keeps
from pairformer_fast.model.replay import (
    CaptureError,
    Graph,
    GraphMemory,
    can_capture,
    capture,
    graph_memory,
    intervened,
    same_autocast,
)

_log = logging.getLogger(__name__)

_MEMORIES: WeakKeyDictionary[DiffusionModule, GraphMemory] = WeakKeyDictionary()
"""Kept for the next run: PyTorch would not give the memory of a graph that has gone to another."""


class _Step(NamedTuple):
    """A captured step.

    Attributes
    ----------
    inputs : Inputs
        What it shares with the other steps.
    positions, level, result : Tensor
        What replays read and write.
    graph : Graph
    """

    inputs: Inputs
    positions: Tensor
    level: Tensor
    result: Tensor
    graph: Graph


class FastDiffusionModule(Releases, Keeps, DiffusionModule):
    """Denoiser whose steps within a run of the sampler are replayed where they can be."""

    def forward(
        self,
        batch: dict[str, Any],
        xl_noisy: Tensor,
        token_mask: Tensor,
        atom_mask: Tensor,
        t: Tensor,
        si_input: Tensor,
        si_trunk: Tensor,
        zij_trunk: Tensor,
        use_conditioning: bool,
        **options: Any,
    ) -> Tensor:
        """Denoised positions ``[*, atoms, 3]`` in Å; arguments as in the base class."""
        shared = (token_mask, atom_mask, si_input, si_trunk, zij_trunk)

        def run(positions: Tensor, level: Tensor) -> Tensor:
            return super(FastDiffusionModule, self).forward(
                batch, positions, token_mask, atom_mask, level, *shared[2:], use_conditioning, **options
            )

        kept = self.kept
        if kept is None or not kept.complete or not can_capture(xl_noisy):
            return run(xl_noisy, t)
        inputs = Inputs(batch, shared, (use_conditioning, *sorted(options.items())))
        step: _Step | None = kept.of(self)
        if step is None:
            if not self._can_replay():
                return run(xl_noisy, t)
            memory = _MEMORIES[self] = graph_memory(xl_noisy.device)
            try:
                step = _captured(inputs, xl_noisy.clone(), t.clone(), run, memory)
            except CaptureError as error:
                kept.refuse(self)
                _log.warning("diffusion: steps run without CUDA graphs: %s", error)
                return run(xl_noisy, t)
            kept.keep(self, step, 2 * xl_noisy.nbytes)
        elif not step.inputs.same(inputs) or step.positions.shape != xl_noisy.shape or step.level.shape != t.shape:
            return run(xl_noisy, t)
        step.positions.copy_(xl_noisy)
        step.level.copy_(t)
        step.graph.replay()
        return step.result.clone()

    def release(self) -> None:
        """Free what is kept for graphs."""
        _MEMORIES.pop(self, None)

    def _can_replay(self) -> bool:
        if any(part is not self and intervened(part) for part in self.modules()):
            return False
        return all(core.config.graphs for core in self.modules() if isinstance(core, PairBiasAttention))


def _captured(inputs: Inputs, positions: Tensor, level: Tensor, run: Any, memory: GraphMemory) -> _Step:
    def once() -> tuple[Tensor]:
        with same_autocast(positions.device):
            return (run(positions, level),)

    graph, (result,) = capture(once, positions.device, memory, known=True)
    return _Step(inputs, positions, level, result, graph)


class FastAtomAttentionDecoder(Keeps, AtomAttentionDecoder):
    """Decoder that keeps which token an atom belongs to."""

    def forward(
        self,
        batch: dict[str, Any],
        ai: Tensor,
        ql: Tensor,
        cl: Tensor,
        plm: Tensor,
        use_high_precision_attention: bool = False,
    ) -> Tensor:
        """Updates of positions ``[*, atoms, 3]``; arguments as in the base class."""
        kept, precision = self.kept, use_high_precision_attention
        if kept is None or not kept.has_room(self):
            return super().forward(batch, ai, ql, cl, plm, precision)
        tokens: Tensor | None = kept.of(self)
        if tokens is None:
            # Tokens count from one here: what OpenFold3 fills with zeros, such as padded atoms, belongs to token 0.
            numbers = torch.arange(1, ai.shape[-2] + 1, device=ai.device, dtype=torch.float64)
            tokens = broadcast_token_feat_to_atoms(
                token_mask=batch["token_mask"],
                num_atoms_per_token=batch["num_atoms_per_token"],
                token_feat=numbers[:, None].expand(*ai.shape[:-1], 1),
                token_dim=-2,
            ).long()
            if not kept.keep(self, tokens, tokens.nbytes):
                return super().forward(batch, ai, ql, cl, plm, precision)
        by_token = functional.pad(self.linear_q_in(ai), (0, 0, 1, 0))
        ql = ql + by_token.gather(-2, tokens.expand(*tokens.shape[:-1], by_token.shape[-1]))
        ql = self.atom_transformer(
            a=ql, s=cl, z=plm, mask=batch["atom_mask"], use_high_precision_attention=use_high_precision_attention
        )
        return self.linear_q_out(self.layer_norm(ql))
