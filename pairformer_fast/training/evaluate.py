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
    model: FoldingModel,
    dataset: AntibodyDataset,
    device: torch.device,
    recycles: int | None = None,
    batch_size: int = 1,
) -> Evaluation:
    """Fold every structure of a split, in fp32.

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
    batch_size : int
        Structures folded together, which is faster on a GPU and changes nothing but rounding.
    """
    scores = []
    for start in range(0, len(dataset), batch_size):
        batch = collate([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]).to(device)
        prediction = model(batch.features, recycles)
        known = batch.atom14_mask[:, :, 1]
        x, target = prediction.atom14[:, :, 1], batch.atom14[:, :, 1]
        lddt = lddt_ca(x, target, known)
        h3 = (batch.cdr == CDR_H3) & (batch.features.chain_index == 0) & known
        plddt = prediction.plddt / 100
        for row, some in enumerate(known):
            true, loop = lddt[row, some], lddt[row, h3[row]]
            scores.append(
                Score(
                    id=dataset.ids[start + row],
                    lddt=float(true.mean()),
                    lddt_h3=float(loop.mean()) if len(loop) else float("nan"),
                    rmsd=superposed_rmsd(x[row, some], target[row, some]),
                    plddt=float(plddt[row, some].mean()),
                    plddt_error=float((plddt[row, some] - true).abs().mean()),
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
