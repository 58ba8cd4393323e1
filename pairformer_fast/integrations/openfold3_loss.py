"""OpenFold3 0.5: the two losses of its diffusion module over pairs of atoms, without tensors over pairs of atoms.

Beside accelerated blocks they are the largest part of a training step: OpenFold3 passes some fifty times over
``[samples, atoms, atoms]``. The smooth lDDT takes one pass of a kernel (:mod:`~pairformer_fast.kernels.smooth_lddt`),
the bonds of ligands to polymers only the atoms that are bonded. All other losses are computed by OpenFold3's code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from openfold3.core.loss.loss_module import OpenFold3Loss
from openfold3.core.loss.loss_utils import loss_masked_batch_mean
from openfold3.core.utils.atomize_utils import broadcast_token_feat_to_atoms
from torch import Tensor

from pairformer_fast.config import AttentionConfig, Backend
from pairformer_fast.kernels.smooth_lddt import smooth_lddt

PROTEIN_RADIUS, NUCLEOTIDE_RADIUS = 15.0, 30.0
"""Å within which pairs of an atom count in its lDDT."""

Losses = tuple[Tensor, dict[str, Tensor]]

_log = logging.getLogger(__name__)


class FastOpenFold3Loss(OpenFold3Loss):
    """Losses of a training step; see :func:`accelerated_loss`."""

    backend: Backend

    def loss(self, batch: dict[str, Any], output: dict[str, Any]) -> Losses:
        """Weighted sum of all losses, and each of them; arguments as in the base class."""
        x, weights = output.get("atom_positions_diffusion"), batch["loss_weights"]
        if x is None or x.ndim != 4 or self.config.train_confidence_only:
            return super().loss(batch, output)
        pairwise: dict[str, Callable[..., Tensor]] = {
            "bond": _bond_loss,
            "smooth_lddt": partial(_smooth_lddt_loss, backend=self.backend),
        }
        others = {name: torch.zeros_like(w) if name in pairwise else w for name, w in weights.items()}
        total, losses = super().loss(batch | {"loss_weights": others}, output)
        settings, t = self.config.diffusion, output["noise_level"]
        mean = partial(loss_masked_batch_mean, apply_weight=False, eps=settings.eps)
        # As AlphaFold 3's equation 6 weights them: the bonds by the noise level, as positions are.
        noise = (t**2 + settings.sigma_data**2) / (t * settings.sigma_data) ** 2
        added = x.new_zeros(())
        for name, function in pairwise.items():
            weight = weights[name]
            if not weight.any():
                continue
            value = function(x, batch, settings.eps)
            losses[f"{name}_loss"] = mean(value.detach().mean(-1), weight.squeeze(-1))
            scaled = value * weight * (noise if name == "bond" else 1)
            added = added + mean(scaled.mean(-1), weights["mse"].squeeze(-1))
        for name in {"diffusion_loss", "loss"} & losses.keys():
            losses[name] = losses[name] + added.detach()
        return total + added, losses


@contextmanager
def accelerated_loss(loss: OpenFold3Loss, config: AttentionConfig | None = None) -> Iterator[None]:
    """Within this context OpenFold3's loss takes one pass over pairs of atoms; values and gradients stay the same.

    Parameters
    ----------
    loss : OpenFold3Loss
        Changed in place.
    config : AttentionConfig, optional
        Its ``backend`` is taken.
    """
    swap_loss(loss, config or AttentionConfig())
    try:
        yield
    finally:
        swap_loss(loss, None)


def swap_loss(loss: OpenFold3Loss, config: AttentionConfig | None) -> None:
    """Make a loss of OpenFold3's ours, with the ``backend`` of ``config``, or with None OpenFold3's again.

    A subclass stays as it is, and the log says so: it may compute something else.
    """
    if config is None and type(loss) is FastOpenFold3Loss:
        del loss.backend
        loss.__class__ = OpenFold3Loss
    elif config is not None and type(loss) in (OpenFold3Loss, FastOpenFold3Loss):
        loss.__class__ = FastOpenFold3Loss
        loss.backend = config.backend
    elif config is not None:
        _log.warning("flashbias: the loss is a %s, not OpenFold3's own, and stays as it is", type(loss).__name__)


def _smooth_lddt_loss(x: Tensor, batch: dict[str, Any], eps: float, backend: Backend) -> Tensor:
    """One less the smooth lDDT ``[B, S]`` of positions ``x [B, S, A, 3]``."""
    truth, protein = batch["ground_truth"], batch["is_protein"]
    without_others = batch["loss_weights"].get("disable_non_protein_diffusion_weights")
    counted = protein if without_others is not None and without_others.any() else torch.ones_like(protein)
    mask = _to_atoms(batch, counted) * truth["atom_resolved_mask"]
    nucleotide = _to_atoms(batch, batch["is_dna"] + batch["is_rna"]) > 0
    radius = torch.where(nucleotide, NUCLEOTIDE_RADIUS, PROTEIN_RADIUS)
    target, mask, radius = (one.squeeze(1) for one in (truth["atom_positions"], mask != 0, radius))
    return 1 - smooth_lddt(x.float(), target, mask, radius, eps, backend=backend)


def _bond_loss(x: Tensor, batch: dict[str, Any], eps: float) -> Tensor:
    """Mean squared error ``[B, S]`` of the lengths of bonds between polymers and ligands, Å²."""
    polymer = batch["is_protein"] + batch["is_dna"] + batch["is_rna"]
    bonded = batch["token_bonds"] * (polymer[..., None, :] * batch["is_ligand"][..., None])
    if not bonded.any():
        return x.new_zeros(x.shape[:2])
    truth = batch["ground_truth"]
    known = truth["atom_resolved_mask"]
    atoms = _to_atoms(batch, _to_atoms(batch, bonded, -2).mT, -2).mT * (known[..., None] * known[..., None, :])
    structures, first, second = atoms.squeeze(1).nonzero(as_tuple=True)

    def lengths(positions: Tensor) -> Tensor:
        apart = positions[structures, :, first] - positions[structures, :, second]
        return (eps + apart.square().sum(-1)).sqrt()

    squares = (lengths(x) - lengths(truth["atom_positions"])).square()
    counts = torch.bincount(structures, minlength=len(x))[:, None]
    return x.new_zeros(x.shape[:2]).index_add(0, structures, squares) / (counts + eps)


def _to_atoms(batch: dict[str, Any], feature: Tensor, dimension: int = -1) -> Tensor:
    """A feature of tokens for each of their atoms."""
    return broadcast_token_feat_to_atoms(
        token_mask=batch["token_mask"],
        num_atoms_per_token=batch["num_atoms_per_token"],
        token_feat=feature,
        token_dim=dimension,
    )
