"""The baseline that a model has to beat: copy the backbone of the most similar training domain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from Bio.Align import Alignment, PairwiseAligner, substitution_matrices

from pairformer_fast.training.losses import lddt_ca
from pairformer_fast.training.shards import Structure

_FAR = 1e4


@dataclass(frozen=True)
class TemplateScore:
    """``lddt`` and ``lddt_h3`` are mean lDDT-CA (0 to 1) over all residues and over CDR 3 of the first chain."""

    id: str
    template: str
    lddt: float
    lddt_h3: float


def template_baseline(templates: list[Structure], targets: list[Structure]) -> list[TemplateScore]:
    """Score the best template of each target by a global BLOSUM62 alignment (gap 11, extension 1).

    Residues without a template residue score 0.

    Parameters
    ----------
    templates, targets : list of Structure
        Single chains with all CA.
    """
    aligner = PairwiseAligner(
        substitution_matrix=substitution_matrices.load("BLOSUM62"), open_gap_score=-11, extend_gap_score=-1
    )
    sequences = [template.sequence for template in templates]
    scores = []
    for target in targets:
        sequence = target.sequence
        best = int(np.argmax([aligner.score(sequence, other) for other in sequences]))
        copied = _copied_ca(aligner.align(sequence, sequences[best])[0], templates[best], len(target))
        known = torch.ones(1, len(target), dtype=torch.bool)
        lddt = lddt_ca(torch.from_numpy(copied)[None], torch.from_numpy(target.atom14[None, :, 1]), known)[0].numpy()
        h3 = (target.cdr == 3) & (target.chain_index == 0)
        loop = float(lddt[h3].mean()) if h3.any() else float("nan")
        scores.append(TemplateScore(target.id, templates[best].id, float(lddt.mean()), loop))
    return scores


def _copied_ca(alignment: Alignment, template: Structure, length: int) -> np.ndarray:
    """CA ``[length, 3]`` of aligned template residues; the others lie far from everything."""
    ca = np.arange(1, length + 1, dtype=np.float32)[:, None] * np.full(3, _FAR, dtype=np.float32)
    for (target_from, target_to), (template_from, template_to) in zip(*alignment.aligned, strict=True):
        ca[target_from:target_to] = template.atom14[template_from:template_to, 1]
    return ca
