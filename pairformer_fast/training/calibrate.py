"""pLDDT that means what it says: its logits scaled and tilted to fit held-out crystals, inside the head's last layer.

A model fits what it was trained on better than anything else, so its head learns to be over-confident. The scale is
temperature scaling (Guo et al., ICML 2017); the tilt moves weight between high bins and low ones. Structures do not
change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pairformer_fast.bias import FactorNetworks, attach_factors, set_attention
from pairformer_fast.bias.learned import side_file
from pairformer_fast.config import AttentionConfig
from pairformer_fast.model.checkpoint import (
    checkpoint_metadata,
    load_checkpoint,
    save_checkpoint,
    trained_with_factors,
)
from pairformer_fast.model.factors import load_factors
from pairformer_fast.model.folding import FoldingModel
from pairformer_fast.model.heads import PlddtHead, bin_centres, expected_value
from pairformer_fast.training.dataset import AntibodyDataset, collate
from pairformer_fast.training.losses import bins_of, lddt_ca

_CA = 1
ROUNDS = 100
"""Steps of L-BFGS at most; two parameters need some ten."""


@dataclass(frozen=True)
class Calibration:
    """Logits become ``scale * logits + tilt * centre``, with the centre of a bin of lDDT from 0 to 1."""

    scale: float
    tilt: float

    def __call__(self, logits: Tensor) -> Tensor:
        """Calibrated logits ``[..., bins]``."""
        return _moved(logits, self.scale, self.tilt)


@dataclass(frozen=True)
class Confidence:
    """Residues of a structure with a known CA: ``logits [N, bins]`` of the pLDDT head and true ``lddt [N]``, 0 to 1."""

    logits: Tensor
    lddt: Tensor


def confidences(model: FoldingModel, dataset: AntibodyDataset) -> Iterator[Confidence]:
    """Fold every structure of a split, in fp32 on a CPU, and compare it with its crystal.

    Parameters
    ----------
    model : FoldingModel
        In ``eval()`` mode.
    dataset : AntibodyDataset
    """
    for index in range(len(dataset)):
        batch = collate([dataset[index]])
        with torch.no_grad():
            output = model.run(batch.features, model.config.recycles)
        known = batch.atom14_mask[:, :, _CA]
        lddt = lddt_ca(output.structure.atom14[:, :, _CA], batch.atom14[:, :, _CA], known)
        yield Confidence(output.plddt[known].double(), lddt[known].double())


def fit(observed: list[Confidence]) -> Calibration:
    """Calibration with the least cross-entropy to binned lDDT over all residues.

    There the mean of pLDDT is that of lDDT, but for the width of a bin.
    """
    logits, lddt = _joined(observed)
    wanted = bins_of(lddt, logits.shape[-1], 1.0)
    parameters = torch.tensor([1.0, 0.0], dtype=logits.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=ROUNDS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(_moved(logits, *parameters), wanted)
        value.backward()
        return value

    optimizer.step(loss)
    scale, tilt = parameters.tolist()
    return Calibration(scale, tilt)


def crossed_error(observed: list[Confidence]) -> float:
    """Mean of pLDDT minus lDDT (0 to 1) of a half of the structures, calibrated by the other half; the worse of two."""
    halves = observed[::2], observed[1::2]
    errors = [float(errors_of(there, fit(here)).mean()) for here, there in (halves, halves[::-1])]
    return max(errors, key=abs)


def errors_of(observed: list[Confidence], calibration: Calibration = Calibration(1.0, 0.0)) -> np.ndarray:
    """pLDDT minus lDDT (0 to 1) of every residue."""
    logits, lddt = _joined(observed)
    return (expected_value(calibration(logits), 1.0) - lddt).numpy()


def apply(head: PlddtHead, calibration: Calibration) -> None:
    """Put a calibration into the last layer of a head."""
    last = cast(nn.Linear, head.layers[-1])
    with torch.no_grad():
        last.weight.mul_(calibration.scale)
        last.bias.copy_(calibration(last.bias))


def calibrate(checkpoint: Path, data: Path, split: str, output: Path) -> dict[str, Any]:
    """Write a copy of a checkpoint with calibrated pLDDT, and of its factor networks if it was trained with them.

    Parameters
    ----------
    checkpoint : Path
        Weights; they stay as they are.
    data : Path
        Shards that ``scripts/prepare_antibody_data.py`` wrote.
    split : str
        Structures to calibrate with, which the model was not trained on.
    output : Path
        Weights to write; the folder must exist.

    Returns
    -------
    dict
        What the header of ``output`` says under ``plddt``: split and number of structures, scale and tilt, the mean of
        pLDDT minus lDDT (0 to 1) ``before``, and ``crossed`` as :func:`crossed_error` has it.

    Raises
    ------
    FileNotFoundError, CheckpointError, FactorsError
        If a file or the folder of ``output`` is missing, or a file is not what it should be.
    ValueError
        If ``output`` is ``checkpoint``, that is calibrated already, or the split has fewer than two structures.
    """
    if output.resolve() == checkpoint.resolve():
        raise ValueError(f"{output} is what is to be calibrated: give another file to write")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output.parent} does not exist: make it, or give another file to write")
    dataset = AntibodyDataset(data, split)
    if len(dataset) < 2:
        raise ValueError(
            f"{split} in {data} has {len(dataset)} structures, and calibration needs two: give another --split"
        )
    model = load_checkpoint(checkpoint)
    facts = checkpoint_metadata(checkpoint)
    if "plddt" in facts:
        raise ValueError(f"pLDDT of {checkpoint} is calibrated already: take the weights that training wrote")
    networks: FactorNetworks | None = None
    if trained_with_factors(checkpoint):
        networks = load_factors(side_file(checkpoint), model, checkpoint)
        attach_factors(model, networks)
    else:
        set_attention(model, AttentionConfig.reference())
    observed = list(confidences(model, dataset))
    calibration = fit(observed)
    apply(model.plddt_head, calibration)
    report = {"split": split, "structures": len(observed)} | asdict(calibration)
    report |= {"before": float(errors_of(observed).mean()), "crossed": crossed_error(observed)}
    report = {name: round(value, 4) if isinstance(value, float) else value for name, value in report.items()}
    save_checkpoint(model, output, facts | {"plddt": report})
    if networks is not None:
        networks.save(side_file(output), output, facts)
    return report


def _moved(logits: Tensor, scale: float | Tensor, tilt: float | Tensor) -> Tensor:
    return scale * logits + tilt * bin_centres(logits, 1.0)


def _joined(observed: list[Confidence]) -> tuple[Tensor, Tensor]:
    return torch.cat([one.logits for one in observed]), torch.cat([one.lddt for one in observed])
