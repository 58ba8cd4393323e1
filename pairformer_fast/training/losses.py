"""Losses on frames, atoms, torsions, distances and confidence (AF2 supplement 1.9, AF3 Algorithm 27)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pairformer_fast.features import TokenFeatures
from pairformer_fast.kernels.smooth_lddt import THRESHOLDS
from pairformer_fast.model.all_atom import AllAtom, vdw_radii
from pairformer_fast.model.folding import ModelOutput
from pairformer_fast.model.heads import PAE_LARGEST
from pairformer_fast.model.residue import CLASH_OVERLAP, VDW_RADIUS
from pairformer_fast.model.rigid import EPSILON, Rigid, distances, normalize, rotate, superposing_rotation
from pairformer_fast.model.structure_module import torsion_norm
from pairformer_fast.training.dataset import Batch


@dataclass(frozen=True)
class Weight:
    """Weight of a loss term: ``before`` until a share ``start`` of the run, ``after`` from a share ``end`` on."""

    before: float
    after: float
    start: float = 0.0
    end: float = 0.0

    def at(self, progress: float) -> float:
        """Weight at a share ``progress`` (0 to 1) of the run, linear between ``start`` and ``end``."""
        if progress >= self.end:
            return self.after
        done = max(0.0, progress - self.start) / (self.end - self.start)
        return self.before + done * (self.after - self.before)


WEIGHTS = {
    "fape_backbone": Weight(1.0, 1.0),
    "fape_atoms": Weight(1.0, 1.0),
    "torsion": Weight(0.5, 0.5),
    "rmsd": Weight(0.0, 1.0, 0.3, 0.5),
    "lddt": Weight(0.5, 1.0, 0.3, 0.5),
    "distogram": Weight(1.0, 0.3, 0.2, 0.5),
    # Bonds and clashes pull at residues before they have found their places, so they come last.
    "peptide": Weight(0.0, 0.3, 0.5, 0.8),
    "clash": Weight(0.0, 0.3, 0.5, 0.8),
    "plddt": Weight(0.02, 0.02),
    "pae": Weight(0.02, 0.02),
}
"""Weight of each term in the total loss, over a run."""

FAPE_CLAMP, FAPE_SCALE = 30.0, 10.0
"""Largest error (Å) that FAPE counts, and the error that counts as 1."""
LDDT_RADIUS = 15.0
DISTOGRAM_RANGE = (2.0, 22.0)
PEPTIDE_LENGTH = 1.329
PEPTIDE_COS_CA_C_N, PEPTIDE_COS_C_N_CA = -0.4473, -0.5203
"""Engh and Huber: C-N in Å, cosines of the angles CA-C-N (116.6 degrees) and C-N-CA (121.4 degrees)."""

CLASH_NEIGHBOURS = 32
"""Residues, nearest by CA, that a residue is held apart from."""


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of each structure ``[B]`` over the entries of ``x [B, ...]`` that ``mask [B, ...]`` keeps."""
    mask = mask.expand_as(x).to(x.dtype).flatten(1)
    return (x.flatten(1) * mask).sum(1) / mask.sum(1).clamp(min=1)


def term_weights(progress: float) -> Tensor:
    """Weights of all terms ``[terms]`` at a share ``progress`` of the run."""
    return torch.tensor([weight.at(progress) for weight in WEIGHTS.values()])


def term_scales(scales: Mapping[str, float]) -> Tensor:
    """Factors of the weights of all terms ``[terms]``, 1 where none is given."""
    return torch.tensor([scales.get(name, 1.0) for name in WEIGHTS])


def compute_losses(output: ModelOutput, batch: Batch, all_atom: AllAtom, weights: Tensor) -> dict[str, Tensor]:
    """Every term, weighted by the structures' weights and averaged; ``total`` is their weighted sum.

    Runs in fp32 under any autocast: coordinates do not survive bf16.

    Parameters
    ----------
    output : ModelOutput
        From the last pass of the model.
    batch : Batch
        Features and target coordinates (Å).
    all_atom : AllAtom
        Ideal geometry.
    weights : Tensor
        From :func:`term_weights`, on the device of the batch.

    Returns
    -------
    dict of str to Tensor
        Scalars.
    """
    with torch.autocast(batch.weight.device.type, enabled=False):
        terms, lddt = _terms(output, batch, all_atom)
    weight = batch.weight / batch.weight.sum()
    means = {name: (terms[name] * weight).sum() for name in WEIGHTS}
    means["total"] = (torch.stack(list(means.values())) * weights).sum()
    means["lddt_ca"] = (lddt * weight).sum()
    return means


def _terms(output: ModelOutput, batch: Batch, all_atom: AllAtom) -> tuple[dict[str, Tensor], Tensor]:
    """All terms of each structure, ``[B]``, and its lDDT-CA."""
    features, structure = batch.features, output.structure
    target, known = _rename_symmetric(structure.frames[-1], structure.atom14, batch, all_atom)
    frame_mask = known[:, :, :3].all(-1)
    frames = Rigid.from_backbone(*(target[:, :, i] for i in range(3)))
    ca, ca_known = target[:, :, 1], known[:, :, 1]

    per_block = [fape(f, frames, frame_mask, f.trans, ca, ca_known) for f in structure.frames]
    lddt = lddt_ca(structure.atom14[:, :, 1].detach(), ca, ca_known)
    terms = {
        "fape_backbone": torch.stack(per_block).mean(0),
        "fape_atoms": fape(
            structure.frames[-1], frames, frame_mask, structure.atom14.flatten(1, 2), target.flatten(1, 2),
            known.flatten(1, 2),
        ),
        "torsion": torsion_loss(structure.torsions, target, known, features.aatype, all_atom),
        "rmsd": rmsd_ca(structure.atom14[:, :, 1], ca, ca_known) / FAPE_SCALE,
        "lddt": 1 - smooth_lddt(structure.atom14[:, :, 1], ca, ca_known),
        "distogram": distogram_loss(output.distogram, target, frame_mask),
        "peptide": peptide_loss(structure.atom14, features),
        "clash": clash_loss(structure.atom14, features),
        "plddt": binned_loss(output.plddt, lddt, 1.0, ca_known),
        "pae": pae_loss(output.pae, structure.frames[-1], frames, frame_mask, ca, ca_known),
    }  # fmt: skip
    return terms, masked_mean(lddt, ca_known)


def fape(frames: Rigid, target_frames: Rigid, frame_mask: Tensor, x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Frame-aligned point error (AF2 Algorithm 28), clamped at 30 Å, inside chains and between them.

    Parameters
    ----------
    frames, target_frames : Rigid
        ``[B, N]``, Å.
    frame_mask : Tensor
        ``[B, N]`` bool.
    x, target : Tensor
        ``[B, M, 3]`` Å.
    mask : Tensor
        ``[B, M]`` bool.

    Returns
    -------
    Tensor
        ``[B]``, errors over 10 Å.
    """
    error = ((frames.see(x) - target_frames.see(target)).square().sum(-1) + EPSILON).sqrt()
    pairs = frame_mask[:, :, None] & mask[:, None, :]
    return masked_mean(error.clamp(max=FAPE_CLAMP), pairs) / FAPE_SCALE


def torsion_loss(torsions: list[Tensor], target: Tensor, known: Tensor, aatype: Tensor, all_atom: AllAtom) -> Tensor:
    """Squared chord between torsions, the nearer of two where a half turn changes nothing (AF2 Algorithm 27)."""
    wanted, mask = all_atom.torsions(target, known, aatype)
    half_turn = torch.where(all_atom.torsion_pi_periodic[aatype][..., None], -wanted, wanted)
    total = torch.zeros(target.shape[0], device=target.device)
    for predicted in torsions:
        unit = normalize(predicted)
        chord = torch.minimum((unit - wanted).square().sum(-1), (unit - half_turn).square().sum(-1))
        total = total + masked_mean(chord, mask) + 0.02 * masked_mean((torsion_norm(predicted) - 1).abs(), mask)
    return total / len(torsions)


def _lddt_pairs(target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    between = distances(target)
    near = (between < LDDT_RADIUS) & mask[:, :, None] & mask[:, None, :]
    diagonal = torch.eye(target.shape[1], dtype=torch.bool, device=target.device)
    return between, near & ~diagonal


def lddt_ca(x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """lDDT of each residue, ``[B, N]`` from 0 to 1, for CA coordinates ``[B, N, 3]`` (Å) and ``mask [B, N]``."""
    between, pairs = _lddt_pairs(target, mask)
    error = (distances(x) - between).abs()
    kept = torch.stack([error < t for t in THRESHOLDS]).float().mean(0)
    return (kept * pairs).sum(-1) / pairs.sum(-1).clamp(min=1)


def smooth_lddt(x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """lDDT with sigmoids for steps (AF3 Algorithm 27), ``[B]``, for CA ``[B, N, 3]`` (Å) and ``mask [B, N]``."""
    between, pairs = _lddt_pairs(target, mask)
    difference = x[:, :, None] - x[:, None, :]
    error = ((difference.square().sum(-1) + EPSILON).sqrt() - between).abs()
    kept = torch.stack([torch.sigmoid(t - error) for t in THRESHOLDS]).mean(0)
    return masked_mean(kept, pairs)


def rmsd_ca(x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """CA RMSD after the best superposition, ``[B]`` Å, for CA ``[B, N, 3]`` (Å) and ``mask [B, N]``.

    Where several places are likely, its least value is expected at their mean, and errors count by their square: it
    asks more of loops than FAPE does. It has a gradient where both are the same, and is 1e-4 Å there.
    """
    points, places = (mask[..., None] * (p - masked_centre(p, mask)) for p in (x, target))
    with torch.no_grad():
        rotation = superposing_rotation(points, places)
    squared = (rotate(rotation[:, None], points) - places).square().sum(-1)
    return (masked_mean(squared, mask) + EPSILON).sqrt()


def masked_centre(x: Tensor, mask: Tensor) -> Tensor:
    """Mean ``[B, 1, 3]`` of the points ``[B, N, 3]`` that ``mask [B, N]`` keeps."""
    counted = mask[..., None].to(x.dtype)
    return (x * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)


def distogram_loss(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy ``[B]`` of binned CB distances (Å), for ``logits [B, N, N, bins]`` and ``target [B, N, 14, 3]``.

    CB is built from the backbone, so every residue has one.
    """
    cb = virtual_cb(target)
    edges = torch.linspace(*DISTOGRAM_RANGE, logits.shape[-1] - 1, device=logits.device)
    bins = torch.bucketize(distances(cb), edges)
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 2), bins.flatten(), reduction="none")
    return masked_mean(loss.view_as(bins), mask[:, :, None] & mask[:, None, :])


def virtual_cb(atom14: Tensor) -> Tensor:
    """CB position ``[B, N, 3]`` (Å) by tetrahedral geometry from N, CA and C of ``atom14 [B, N, 14, 3]``."""
    n, ca, c = (atom14[:, :, i] for i in range(3))
    bisector = normalize(normalize(ca - n) + normalize(ca - c))
    normal = normalize(torch.linalg.cross(n - ca, c - ca))
    return ca + 1.53 * (0.5774 * bisector + 0.8165 * normal)


def peptide_loss(atom14: Tensor, features: TokenFeatures) -> Tensor:
    """Deviation of peptide bonds (Å) and of the cosines of their two angles from ideal values, ``[B]``."""
    chain, index, mask = features.chain_index, features.residue_index, features.mask
    bonded = (chain[:, 1:] == chain[:, :-1]) & (index[:, 1:] == index[:, :-1] + 1) & mask[:, 1:] & mask[:, :-1]
    ca, c = atom14[:, :-1, 1], atom14[:, :-1, 2]
    n, next_ca = atom14[:, 1:, 0], atom14[:, 1:, 1]
    length = ((n - c).square().sum(-1) + EPSILON).sqrt()
    cos_c = (normalize(ca - c) * normalize(n - c)).sum(-1)
    cos_n = (normalize(c - n) * normalize(next_ca - n)).sum(-1)
    deviation = (length - PEPTIDE_LENGTH).abs() + (cos_c - PEPTIDE_COS_CA_C_N).abs()
    return masked_mean(deviation + (cos_n - PEPTIDE_COS_C_N_CA).abs(), bonded)


def clash_loss(atom14: Tensor, features: TokenFeatures) -> Tensor:
    """Overlap (Å) of van der Waals spheres beyond 0.4 Å, summed over the atoms around a residue; its mean ``[B]``.

    Residues that follow one another and pairs of sulphur atoms do not count (AF2 supplement 1.9.11). The gradient moves
    atoms of a residue away from where its neighbours are; each pair of near residues is seen from both sides.
    """
    index, chain, mask = features.residue_index, features.chain_index, features.mask
    radii = vdw_radii(atom14.device)[features.aatype] * mask[..., None]
    with torch.no_grad():
        bonded = (chain[:, :, None] == chain[:, None]) & ((index[:, :, None] - index[:, None]).abs() <= 1)
        between = distances(atom14[:, :, 1]).masked_fill(bonded | ~mask[:, None], torch.inf)
        nearest = between.topk(min(CLASH_NEIGHBOURS, atom14.shape[1] - 1), largest=False)
        structures = torch.arange(len(atom14), device=atom14.device)[:, None, None]
        others = atom14[structures, nearest.indices]
        other_radii = radii[structures, nearest.indices] * nearest.values.isfinite()[..., None]
    first, second = radii[:, :, None, :, None], other_radii[:, :, :, None]
    counted = (first > 0) & (second > 0) & ((first < VDW_RADIUS["S"]) | (second < VDW_RADIUS["S"]))
    apart = ((atom14[:, :, None, :, None] - others[:, :, :, None]).square().sum(-1) + EPSILON).sqrt()
    overlap = (first + second - CLASH_OVERLAP - apart).clamp(min=0) * counted
    return masked_mean(overlap.sum((-3, -2, -1)), mask)


def binned_loss(logits: Tensor, value: Tensor, largest: float, mask: Tensor) -> Tensor:
    """Cross-entropy of a value binned equally from 0 to ``largest``; ``logits`` has one axis more than ``value``."""
    bins = bins_of(value, logits.shape[-1], largest)
    loss = nn.functional.cross_entropy(logits.float().flatten(0, -2), bins.flatten(), reduction="none")
    return masked_mean(loss.view_as(bins), mask)


def bins_of(value: Tensor, count: int, largest: float) -> Tensor:
    """Which of ``count`` equal bins from 0 to ``largest`` a value falls into; one outside, into the nearest."""
    return (value * (count / largest)).long().clamp(0, count - 1)


def pae_loss(
    logits: Tensor, frames: Rigid, target_frames: Rigid, frame_mask: Tensor, ca: Tensor, mask: Tensor
) -> Tensor:
    """Cross-entropy ``[B]`` of the error of CA j in frame i (Å), for ``logits [B, N, N, bins]``."""
    with torch.no_grad():
        error = (frames.see(frames.trans) - target_frames.see(ca)).norm(dim=-1)
    return binned_loss(logits, error, PAE_LARGEST, frame_mask[:, :, None] & mask[:, None, :])


def _rename_symmetric(frames: Rigid, atom14: Tensor, batch: Batch, all_atom: AllAtom) -> tuple[Tensor, Tensor]:
    """Target coordinates and mask with symmetric atoms named as in the prediction, residue by residue.

    Of both namings the one that is nearer in the local frame of the residue is taken.
    """
    with torch.no_grad():
        target, known = batch.atom14, batch.atom14_mask
        swap = all_atom.symmetric_swap[batch.features.aatype]
        swapped = target.gather(2, swap[..., None].expand_as(target))
        swapped_known = known.gather(2, swap)
        target_frames = Rigid.from_backbone(*(target[:, :, i] for i in range(3))).unsqueeze()
        local = frames.unsqueeze().invert_apply(atom14)
        both = known & swapped_known
        as_is = ((local - target_frames.invert_apply(target)).square().sum(-1) * both).sum(-1)
        renamed = ((local - target_frames.invert_apply(swapped)).square().sum(-1) * both).sum(-1)
        better = (renamed < as_is)[..., None]
        return torch.where(better[..., None], swapped, target), torch.where(better, swapped_known, known)
