"""OpenFold3 0.5: Pairformer stacks on a GPU, whose blocks are launched by CUDA graphs.

A plain call of a block of up to about a thousand tokens takes longer on the host than on the GPU, in training too.
Where nothing in a stack needs the host, all of its blocks are replayed from the graph of one
(:mod:`pairformer_fast.model.replay`). The stack stays OpenFold3's otherwise, without its search for a chunk size, which
has no effect on what runs here.
"""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from openfold3.core.model.latent.pairformer import PairFormerStack
from openfold3.core.utils.checkpointing import is_deepspeed_configured
from torch import Tensor

from pairformer_fast.integrations.acceleration import Releases
from pairformer_fast.model.replay import BlockReplay, Call, CaptureError, can_replay

LARGEST = 1024
"""Tokens up to which blocks are replayed; with more, the GPU takes longer than the host."""

_REPLAYS: WeakKeyDictionary[PairFormerStack, BlockReplay] = WeakKeyDictionary()
"""Not attributes of the stacks: models are copied and pickled, graphs cannot be."""

_REFUSED: WeakSet[PairFormerStack] = WeakSet()
"""Stacks of which a block could not be captured."""

_log = logging.getLogger(__name__)


class FastPairFormerStack(Releases, PairFormerStack):
    """Pairformer stack whose blocks are replayed where they can be."""

    def forward(
        self,
        s: Tensor,
        z: Tensor,
        single_mask: Tensor,
        pair_mask: Tensor,
        chunk_size: int | None = None,
        inplace_safe: bool = False,
        _mask_trans: bool = True,
        **kernel_flags: Any,
    ) -> tuple[Tensor, Tensor]:
        """Updated ``s [*, N, C_s]`` and ``z [*, N, N, C_z]``; arguments as in the base class, chunks have no effect."""
        masks = {"single_mask": single_mask, "pair_mask": pair_mask}
        if self._can_replay(z):
            try:
                return self._replayed(s, z, masks, inplace_safe, _mask_trans)
            except CaptureError as error:
                _log.warning("blocks of a Pairformer stack run without CUDA graphs from now on: %s", error)
                _REFUSED.add(self)
        options = {"inplace_safe": inplace_safe, "_mask_trans": _mask_trans}
        return super().forward(s, z, **masks, chunk_size=None, **options, **kernel_flags)

    def _replayed(
        self, s: Tensor, z: Tensor, masks: dict[str, Tensor], inplace_safe: bool, mask_trans: bool
    ) -> tuple[Tensor, Tensor]:
        if self not in _REPLAYS:
            _REPLAYS[self] = BlockReplay()
        replay, blocks, trains = _REPLAYS[self], list(self.blocks), torch.is_grad_enabled()
        call = Call(masks, {"inplace_safe": not trains, "_mask_trans": mask_trans})
        if trains:
            s, z = replay.train(blocks, call, (s, z))
        else:
            s, z = replay.infer(blocks, call, (s, z), (s, z) if inplace_safe else None)
        return s, z

    def _can_replay(self, z: Tensor) -> bool:
        if z.shape[-2] > LARGEST or len(self.blocks) < 2 or self.clear_cache_between_blocks or self in _REFUSED:
            return False
        if torch.is_grad_enabled():
            # Each block is its own checkpoint there, and all of its parameters get a gradient.
            checkpointed = self.blocks_per_ckpt == 1 and not is_deepspeed_configured()
            if not checkpointed or not all(x.requires_grad for x in self.parameters()):
                return False
        return can_replay(self.blocks, z)

    def release(self) -> None:
        """Free the graphs."""
        _REPLAYS.pop(self, None)
        _REFUSED.discard(self)
