"""The folding model: embedder, Pairformer, structure module, heads, recycling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pairformer_fast.config import ModelConfig
from pairformer_fast.features import Prediction, TokenFeatures
from pairformer_fast.model.embedder import InputEmbedder, RecyclingEmbedder
from pairformer_fast.model.heads import PAE_LARGEST, DistogramHead, PaeHead, PlddtHead, expected_value
from pairformer_fast.model.pairformer import PairformerStack
from pairformer_fast.model.structure_module import Structure, StructureModule


@dataclass(frozen=True)
class Recycled:
    """State that a pass hands to the next: ``s [B, N, C_s]``, ``z [B, N, N, C_z]``, ``ca [B, N, 3]`` (Å)."""

    s: Tensor
    z: Tensor
    ca: Tensor


@dataclass(frozen=True)
class ModelOutput:
    """Everything that the losses need from the last pass; shapes as in the heads and the structure module."""

    structure: Structure
    distogram: Tensor
    plddt: Tensor
    pae: Tensor


class FoldingModel(nn.Module):
    """Sequence to full-atom structure with confidence.

    Parameters
    ----------
    config : ModelConfig
        Dimensions.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedder = InputEmbedder(config)
        self.recycler = RecyclingEmbedder(config)
        self.pairformer_stack = PairformerStack(config.pairformer)
        self.structure_module = StructureModule(config.structure, config.pairformer.c_z)
        self.distogram_head = DistogramHead(config)
        self.plddt_head = PlddtHead(config)
        self.pae_head = PaeHead(config)

    def run(self, features: TokenFeatures, recycles: int) -> ModelOutput:
        """Fold with gradients through the last pass only.

        Parameters
        ----------
        features : TokenFeatures
            Batch of sequences.
        recycles : int
            Passes before the last one.
        """
        state = self._nothing_recycled(features)
        with torch.no_grad():
            for _ in range(recycles):
                s, z, structure = self._trunk(features, state)
                state = Recycled(s, z, structure.frames[-1].trans)
        # Autocast would reuse the weights that it cast without gradients above.
        torch.clear_autocast_cache()
        _, z, structure = self._trunk(features, state)
        return ModelOutput(structure, self.distogram_head(z), self.plddt_head(structure.s), self.pae_head(z))

    def forward(self, features: TokenFeatures, recycles: int | None = None) -> Prediction:
        """Predict structures; call it in ``eval()`` mode under ``torch.no_grad()``.

        Parameters
        ----------
        features : TokenFeatures
            Batch of sequences.
        recycles : int, optional
            Passes before the last one; the checkpoint's default if omitted.

        Returns
        -------
        Prediction
            Atoms (Å), pLDDT (0 to 100) and PAE (Å).
        """
        output = self.run(features, self.config.recycles if recycles is None else recycles)
        known = self.structure_module.all_atom.atom14_mask[features.aatype]
        return Prediction(
            atom14=output.structure.atom14,
            atom14_mask=known & features.mask[..., None],
            plddt=expected_value(output.plddt, 100.0),
            pae=expected_value(output.pae, PAE_LARGEST),
        )

    def _nothing_recycled(self, features: TokenFeatures) -> Recycled:
        """Zeros, as AlphaFold 2 starts: every parameter takes part in every pass."""
        batch, tokens = features.mask.shape
        zeros = partial(torch.zeros, device=features.mask.device)
        dims = self.config.pairformer
        return Recycled(zeros(batch, tokens, dims.c_s), zeros(batch, tokens, tokens, dims.c_z), zeros(batch, tokens, 3))

    def _trunk(self, features: TokenFeatures, state: Recycled) -> tuple[Tensor, Tensor, Structure]:
        mask = features.mask
        s, z = self.embedder(features)
        s_update, z_update = self.recycler(state.s, state.z, state.ca)
        pair_mask = mask[:, :, None] & mask[:, None, :]
        s, z = self.pairformer_stack(s + s_update, z + z_update, mask, pair_mask)
        return s, z, self.structure_module(s, z, features.aatype, mask)
