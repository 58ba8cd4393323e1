"""OpenFold3's transformer of atoms, which attend from blocks of 32 to the 128 around them, as its sampler runs it.

Its conditioning, its pair biases and the windows of the blocks are the same in all steps: they are kept. Keys and
values are projected by atom, before each is copied into the windows that it is in.
"""

from __future__ import annotations

from typing import Any

import torch
from openfold3.core.model.layers.diffusion_transformer import DiffusionTransformer
from openfold3.core.utils.atom_attention_block_utils import convert_single_rep_to_blocks
from torch import Tensor
from torch.nn import functional

from pairformer_fast.config import Backend
from pairformer_fast.integrations.openfold3_blocks import Condition, adapted, normalised, updated, with_transition
from pairformer_fast.integrations.openfold3_kept import Keeps
from pairformer_fast.kernels.flash_bias import chosen_backend, flash_bias_attention


class FastAtomTransformer(Keeps, DiffusionTransformer):
    """Transformer of atoms whose conditioning and pair biases are kept."""

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
        """Updated ``a [B, samples, N, C]``; arguments as in the base class, all but ``a`` the same in all steps."""
        kept = self.kept
        state: _AtomBlocks | None = None if kept is None else kept.of(self)
        if kept is not None and state is None and kept.has_room(self) and mask is not None and _fits(a, s, z, mask):
            dtype = torch.promote_types(a.dtype, torch.float32) if use_high_precision_attention else a.dtype
            state = _AtomBlocks(self, a, s, self.layer_norm_z(z), mask, mask if _mask_trans else None, dtype)
            state = state if kept.keep(self, state, state.nbytes) else None
        if state is None:
            options = {"use_high_precision_attention": use_high_precision_attention, "_mask_trans": _mask_trans}
            return super().forward(a=a, s=s, z=z, mask=mask, **options, **kernel_flags)
        for block in state.blocks:
            a = block(a, state.windows)
        return a


def _fits(a: Tensor, s: Tensor, z: Tensor, mask: Tensor) -> bool:
    shared = (len(a), 1)
    return (a.ndim, s.ndim, z.ndim, mask.ndim) == (4, 4, 6, 3) and shared == s.shape[:2] == z.shape[:2] == mask.shape[
        :2
    ]


class _Windows:
    """Which atoms the blocks of atoms attend to.

    Attributes
    ----------
    queries : int
        Atoms of a block.
    dropped : Tensor
        ``[B, blocks, 1, queries, keys]``, 0 where a key is kept, very negative elsewhere.
    """

    def __init__(self, a: Tensor, mask: Tensor, attention: Any) -> None:
        batch, samples, atoms, _ = a.shape
        number = torch.arange(atoms, device=a.device, dtype=torch.float64).expand(batch, 1, atoms).unsqueeze(-1)
        of_queries, of_keys, kept = convert_single_rep_to_blocks(number, attention.n_query, attention.n_key, mask)
        self.queries, self._padding = of_queries.shape[-2], -atoms % of_queries.shape[-2]
        self.dropped = (attention.inf * (kept - 1)).transpose(1, 2)
        entries = torch.arange(batch * samples, device=a.device).view(batch, samples, 1, 1) * atoms
        self._keys = entries + of_keys.squeeze(-1).long()  # [B, S, blocks, keys]
        self.nbytes = self._keys.nbytes

    def of_queries(self, x: Tensor) -> Tensor:
        """``[B, S, N, C]`` to ``[B, blocks, S, queries, C]``."""
        return functional.pad(x, (0, 0, 0, self._padding)).unflatten(2, (-1, self.queries)).transpose(1, 2)

    def of_keys(self, x: Tensor) -> Tensor:
        """``[B, S, N, C]`` to ``[B, blocks, S, keys, C]``."""
        rows = x.flatten(0, 2).index_select(0, self._keys.flatten())
        return rows.view(*self._keys.shape, -1).transpose(1, 2)

    def by_atom(self, x: Tensor) -> Tensor:
        """Undo :meth:`of_queries`."""
        flat = x.transpose(1, 2).flatten(2, 3)
        return flat[:, :, : flat.shape[2] - self._padding]


class _AtomBlock:
    """A block of OpenFold3, its condition, and its pair bias ``[B, blocks, H, queries, keys]``."""

    def __init__(self, block: Any, condition: Condition, normed: Tensor, windows: _Windows, dtype: torch.dtype) -> None:
        self._mha, self._transition = block.attention_pair_bias.mha, block.conditioned_transition
        self._dtype, self._condition = dtype, condition
        bias = block.attention_pair_bias.linear_z(normed).squeeze(1).movedim(-1, 2)
        self._bias = (bias + windows.dropped).to(dtype).contiguous()
        of_condition = (*condition.scales, *condition.shifts, condition.attention_gate, condition.transition_gate)
        self.nbytes = sum(x.nbytes for x in (self._bias, *of_condition))

    def __call__(self, a: Tensor, windows: _Windows) -> Tensor:
        """Updated ``a [B, S, N, C]``."""
        update = self._mha.linear_o(self._attended(normalised(a), windows).to(a.dtype))
        a = updated(a, self._condition.attention_gate, update)
        return with_transition(a, self._transition, self._condition)

    def _attended(self, y: Tensor, windows: _Windows) -> Tensor:
        """Values that normalised ``y`` attends to; keys and values are freed before anything else is computed."""
        mha = self._mha
        queries, keys = adapted(y, self._condition, 0), adapted(y, self._condition, 1)
        q, gate = (self._heads(windows.of_queries(layer(queries))) for layer in (mha.linear_q, mha.linear_g))
        k, v = (self._heads(windows.of_keys(layer(keys))) for layer in (mha.linear_k, mha.linear_v))
        backend = chosen_backend(Backend.AUTO, q)
        # Elsewhere, one small product for all windows is faster than one call of PyTorch's attention for each.
        backend = backend if backend is Backend.TRITON else Backend.REFERENCE
        attended = flash_bias_attention(q, k, v, self._bias, None, backend, gate=gate)
        return windows.by_atom(attended.flatten(-2))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.to(self._dtype).unflatten(-1, (self._mha.no_heads, -1))


class _AtomBlocks:
    """What :class:`FastAtomTransformer` keeps."""

    def __init__(
        self,
        transformer: DiffusionTransformer,
        a: Tensor,
        s: Tensor,
        normed: Tensor,
        mask: Tensor,
        updated_atoms: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        blocks: list[Any] = list(transformer.blocks)
        self.windows = _Windows(a, mask, blocks[0].attention_pair_bias)
        self.blocks = []
        for block in blocks:
            norms = block.attention_pair_bias.layer_norm_a_q, block.attention_pair_bias.layer_norm_a_k
            condition = Condition.of(block, norms, s, updated_atoms)
            self.blocks.append(_AtomBlock(block, condition, normed, self.windows, dtype))
        self.nbytes = self.windows.nbytes + sum(block.nbytes for block in self.blocks)
