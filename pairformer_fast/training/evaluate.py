"""Accuracy of a model on structures that it has not seen."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch

from pairformer_fast.model.folding import FoldingModel
from pairformer_fast.training.dataset import AntibodyDataset, collate
from pairformer_fast.training.losses import lddt_ca

CDR_H3 = 3


@dataclass(frozen=True)
class Score:
    """Accuracy of one structure.

    Attributes
    ----------
    id : str
        Structure.
    lddt, lddt_h3 : float
        Mean lDDT-CA (0 to 1) over all residues and over CDR-H3.
    rmsd : float
        CA RMSD after superposition, Å.
    plddt : float
        Mean predicted lDDT, 0 to 1.
    plddt_error : float
        Mean absolute difference between predicted and true lDDT of a residue.
    """

    id: str
    lddt: float
    lddt_h3: float
    rmsd: float
    plddt: float
    plddt_error: float


@dataclass(frozen=True)
class Evaluation:
    """Scores of a data split."""

    scores: list[Score]

    def summary(self) -> dict[str, float]:
        """Means, the median and the worst lDDT, and the number of structures."""
        columns = {name: [asdict(s)[name] for s in self.scores] for name in ("lddt", "lddt_h3", "rmsd", "plddt_error")}
        means = {name: round(float(np.nanmean(values)), 4) for name, values in columns.items()}
        return {
            "structures": len(self.scores),
            **means,
            "lddt_median": round(float(np.median(columns["lddt"])), 4),
            "lddt_worst": round(float(np.min(columns["lddt"])), 4),
        }


@torch.no_grad()
def evaluate(
    model: FoldingModel, dataset: AntibodyDataset, device: torch.device, recycles: int | None = None
) -> Evaluation:
    """Fold every structure of a split, one at a time, in fp32.

    Parameters
    ----------
    model : FoldingModel
        In ``eval()`` mode on ``device``.
    dataset : AntibodyDataset
        Split with CA coordinates.
    device : torch.device
        Where to compute.
    recycles : int, optional
        As in :class:`FoldingModel`.
    """
    scores = []
    for i in range(len(dataset)):
        batch = collate([dataset[i]]).to(device)
        prediction = model(batch.features, recycles)
        known = batch.atom14_mask[:, :, 1]
        x, target = prediction.atom14[:, :, 1], batch.atom14[:, :, 1]
        lddt = lddt_ca(x, target, known)[known]
        h3 = lddt[((batch.cdr == CDR_H3) & (batch.features.chain_index == 0))[known]]
        plddt = prediction.plddt[known] / 100
        scores.append(
            Score(
                id=dataset.ids[i],
                lddt=float(lddt.mean()),
                lddt_h3=float(h3.mean()) if len(h3) else float("nan"),
                rmsd=superposed_rmsd(x[known], target[known]),
                plddt=float(plddt.mean()),
                plddt_error=float((plddt - lddt).abs().mean()),
            )
        )
    return Evaluation(scores)


def superposed_rmsd(x: torch.Tensor, target: torch.Tensor) -> float:
    """RMSD (Å) of two sets of points ``[N, 3]`` after the best superposition (Kabsch 1976)."""
    x = (x - x.mean(0)).double()
    target = (target - target.mean(0)).double()
    u, s, vt = torch.linalg.svd(x.mT @ target)
    s[-1] *= torch.sign(torch.linalg.det(u @ vt))
    squared = (x.square().sum() + target.square().sum() - 2 * s.sum()) / len(x)
    return float(squared.clamp(min=0).sqrt())
