"""Accuracy of a model on structures that it has not seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from pairformer_fast.inference import metrics
from pairformer_fast.model.folding import FoldingModel
from pairformer_fast.training.dataset import AntibodyDataset, collate
from pairformer_fast.training.losses import lddt_ca
from pairformer_fast.training.shards import Structure

CDR_H3 = 3
_CA = 1


@dataclass(frozen=True)
class Folded:
    """A prediction and the structure that it should be.

    Attributes
    ----------
    prediction, target : Structure
        Of the same residues; the prediction has all atoms, as the model gives them.
    plddt : numpy.ndarray
        ``[N]`` predicted lDDT-CA, 0 to 1; NaN where it is not known.
    """

    prediction: Structure
    target: Structure
    plddt: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """``[N]`` bool, True where the target has a CA."""
        return self.target.atom14_mask[:, _CA]

    def lddt(self) -> np.ndarray:
        """``[N]`` lDDT-CA of each residue, 0 to 1; 0 where the target has no CA."""
        x, target = (torch.from_numpy(s.atom14[None, :, _CA]) for s in (self.prediction, self.target))
        return lddt_ca(x, target, torch.from_numpy(self.known)[None])[0].numpy()


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
        """Means over the structures that have a value, the median and the worst lDDT, and the number of structures."""
        columns = {name: [asdict(s)[name] for s in self.scores] for name in ("lddt", "lddt_h3", "rmsd", "plddt_error")}
        known = {name: np.array(values)[~np.isnan(values)] for name, values in columns.items()}
        means = {name: round(float(values.mean()), 4) for name, values in known.items() if len(values)}
        return {
            "structures": len(self.scores),
            **means,
            "lddt_median": round(float(np.median(columns["lddt"])), 4),
            "lddt_worst": round(float(np.min(columns["lddt"])), 4),
        }


def evaluate(
    model: FoldingModel,
    dataset: AntibodyDataset,
    device: torch.device,
    recycles: int | None = None,
    batch_size: int = 1,
) -> Evaluation:
    """Fold every structure of a split, in fp32, and score it; arguments as in :func:`fold_all`."""
    return Evaluation([score(folded) for folded in fold_all(model, dataset, device, recycles, batch_size)])


def fold_all(
    model: FoldingModel,
    dataset: AntibodyDataset,
    device: torch.device,
    recycles: int | None = None,
    batch_size: int = 1,
) -> Iterator[Folded]:
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
    for start in range(0, len(dataset), batch_size):
        indices = range(start, min(start + batch_size, len(dataset)))
        batch = collate([dataset[i] for i in indices]).to(device)
        with torch.no_grad():
            prediction = model(batch.features, recycles)
        atom14, mask, plddt = (
            tensor.cpu().numpy() for tensor in (prediction.atom14, prediction.atom14_mask, prediction.plddt / 100)
        )
        for row, index in enumerate(indices):
            target = dataset.structure(index)
            count = len(target)
            predicted = replace(target, atom14=atom14[row, :count], atom14_mask=mask[row, :count])
            yield Folded(predicted, target, plddt[row, :count])


def score(folded: Folded) -> Score:
    """Accuracy of one prediction."""
    known, lddt, target = folded.known, folded.lddt(), folded.target
    h3 = known & (target.cdr == CDR_H3) & (target.chain_index == 0)
    x, y = (torch.from_numpy(s.atom14[known, _CA]) for s in (folded.prediction, target))
    return Score(
        id=target.id,
        lddt=float(lddt[known].mean()),
        lddt_h3=float(lddt[h3].mean()) if h3.any() else float("nan"),
        rmsd=superposed_rmsd(x, y),
        plddt=float(folded.plddt[known].mean()),
        plddt_error=float(np.abs(folded.plddt - lddt)[known].mean()),
    )


def region_rmsd(prediction: Structure, target: Structure) -> dict[str, float]:
    """CA RMSD (Å) of the framework and of each CDR of each chain, superposed on the framework of that chain.

    Parameters
    ----------
    prediction, target : Structure
        Of the same residues, chains in the order H, L.

    Returns
    -------
    dict of str to float
        By ``H framework``, ``H CDR1``, ...; regions without a known CA are left out.
    """
    found = {}
    for chain, letter in enumerate("HL"):
        known = target.atom14_mask[:, _CA] & (target.chain_index == chain)
        framework = known & (target.cdr == 0)
        if not framework.any():
            continue
        x, y = (structure.atom14[:, _CA].astype(np.float64) for structure in (prediction, target))
        moved = metrics.transform(x, *metrics.superposition(x[framework], y[framework]))
        for number, region in enumerate(("framework", "CDR1", "CDR2", "CDR3")):
            some = known & (target.cdr == number)
            if some.any():
                found[f"{letter} {region}"] = metrics.rmsd(moved[some], y[some])
    return found


def plddt_agreement(structures: Sequence[Folded], bins: int = 10) -> dict:
    """pLDDT against true lDDT-CA over all residues of some structures.

    Parameters
    ----------
    structures : sequence of Folded
    bins : int
        Equal intervals of pLDDT from 0 to 1.

    Returns
    -------
    dict
        ``pearson``, None where one of them is the same everywhere; ``error``, the mean of pLDDT minus lDDT;
        ``bins``, for each interval that has residues their number ``residues`` and their mean ``plddt`` and ``lddt``.
    """
    plddt = np.concatenate([one.plddt[one.known] for one in structures]).astype(np.float64)
    lddt = np.concatenate([one.lddt()[one.known] for one in structures]).astype(np.float64)
    place = np.minimum((plddt * bins).astype(int), bins - 1)
    filled = []
    for number in np.unique(place):
        inside = place == number
        filled.append(
            {
                "residues": int(inside.sum()),
                "plddt": round(float(plddt[inside].mean()), 4),
                "lddt": round(float(lddt[inside].mean()), 4),
            }
        )
    spread = plddt.std() > 0 and lddt.std() > 0
    return {
        "pearson": round(float(np.corrcoef(plddt, lddt)[0, 1]), 4) if spread else None,
        "error": round(float((plddt - lddt).mean()), 4),
        "bins": filled,
    }


def superposed_rmsd(x: torch.Tensor, target: torch.Tensor) -> float:
    """RMSD (Å) of two sets of points ``[N, 3]`` after the best superposition (Kabsch 1976)."""
    x = (x - x.mean(0)).double()
    target = (target - target.mean(0)).double()
    u, s, vt = torch.linalg.svd(x.mT @ target)
    s[-1] *= torch.sign(torch.linalg.det(u @ vt))
    squared = (x.square().sum() + target.square().sum() - 2 * s.sum()) / len(x)
    return float(squared.clamp(min=0).sqrt())
