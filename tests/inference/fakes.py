"""A folding model without weights: plausible coordinates as a deterministic function of the features."""

import numpy as np
import torch
from torch import nn

from pairformer_fast.config import ModelConfig
from pairformer_fast.features import Prediction, TokenFeatures
from pairformer_fast.inference.fasta import Chain, Job
from pairformer_fast.model.residue import ATOM14, RESTYPES


def make_job(*sequences: str, name: str = "job", names: str = "ABCDEFG") -> Job:
    return Job(name, tuple(Chain(s, c, f"{name}|{c}", 1) for s, c in zip(sequences, names, strict=False)))


def helix(features: TokenFeatures) -> Prediction:
    """Ideal CA helices with atoms scattered around them, one helix a chain, 30 Å apart."""
    index = features.residue_index.double()
    angle = index * np.deg2rad(100.0)
    offset = 30.0 * features.chain_index.double()
    ca = torch.stack((2.3 * angle.cos() + offset, 2.3 * angle.sin(), 1.5 * index), dim=-1)
    scatter = torch.from_numpy(np.random.default_rng(0).normal(scale=1.0, size=(21, 14, 3)))
    scatter[:, 1] = 0
    sizes = torch.tensor([len(ATOM14[aa]) for aa in RESTYPES] + [0])
    return Prediction(
        atom14=(ca[..., None, :] + scatter[features.aatype]).float(),
        atom14_mask=torch.arange(14) < sizes[features.aatype][..., None],
        plddt=(60 + 40 * (0.1 * index).sin().abs()).float(),
        pae=torch.ones(*index.shape, index.shape[-1]),
    )


class FakeModel(nn.Module):
    """Returns :func:`helix`; what ``set_attention`` leaves in ``attention`` decides by how much it is off.

    A chain that starts with ``WWW`` breaks it.
    """

    def __init__(self, domain: str = "any") -> None:
        super().__init__()
        self.config = ModelConfig(domain=domain)
        self.weight = nn.Parameter(torch.zeros(1))
        self.attention = None
        self.calls: list[int | None] = []

    def forward(self, features: TokenFeatures, recycles: int | None) -> Prediction:
        if features.aatype[0, :3].tolist() == [RESTYPES.index("W")] * 3:
            raise RuntimeError("the fake model broke")
        self.calls.append(recycles)
        prediction = helix(features)
        if self.attention is not None and self.attention.bias != "dense":
            prediction.atom14.add_(0.05 * torch.randn_like(prediction.atom14))
        return prediction
