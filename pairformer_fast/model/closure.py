"""Close the peptide bonds of a predicted backbone with as little motion as possible.

A model that predicts one rigid frame per residue leaves neighbours too close or too far where it is unsure, most of all
in CDR-H3. Here every residue stays rigid and moves by a rotation and a translation that minimise its squared motion
plus restraints on the distances across each peptide bond (bond, both angles, trans or cis) and against clashes of CA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pairformer_fast.model.residue import RESTYPES
from pairformer_fast.model.rigid import distances, turned

# distances across a peptide bond, Å (bonds and angles of Engh and Huber 1991): atom of i, atom of i + 1, distance
_ACROSS = ((2, 0, 1.329), (1, 0, 2.425), (2, 1, 2.435))
_CA_TRANS, _CA_CIS = 3.80, 2.95
_CIS_BELOW = 3.3
_CARBONYL = 1.231
_CA_APART = 3.9
_CA_WATCHED = 6.0

RESTRAINT = 30.0
"""Weight of the restraints against the squared motion of N, CA and C."""

STEPS = 300
LEARNING_RATE = 0.03


def close_peptides(atom14: Tensor, chain_index: Tensor, aatype: Tensor) -> Tensor:
    """Structures with closed peptide bonds; side chains move with their residue, O is placed anew.

    Parameters
    ----------
    atom14 : Tensor
        ``[B, N, 14, 3]`` Å, complete backbones; atoms that a residue lacks are anywhere.
    chain_index : Tensor
        ``[B, N]`` int64, -1 for padding.
    aatype : Tensor
        ``[B, N]`` int64.

    Returns
    -------
    Tensor
        ``[B, N, 14, 3]`` Å.
    """
    with torch.inference_mode(False), torch.enable_grad():
        return _minimise(atom14.clone(), chain_index.clone(), aatype.clone())


def _minimise(start: Tensor, chain: Tensor, aatype: Tensor) -> Tensor:
    strain, near = Strain(start, chain, aatype, RESTRAINT), _close_pairs(start[:, :, 1], chain)
    motion = torch.zeros(*chain.shape, 6, device=start.device, requires_grad=True)
    descent = Descent({"params": [motion], "lr": LEARNING_RATE}, steps=STEPS)
    for _ in range(STEPS):
        backbone = moved(start[:, :, :3], motion)
        clash = (_CA_APART - distance(backbone[near[0], near[1], 1], backbone[near[0], near[2], 1])).relu()
        descent.step(strain(backbone) + RESTRAINT * clash.square().sum())
    with torch.no_grad():
        return with_oxygens(moved(start, motion), strain.bonded)


class Descent:
    """Adam on groups of parameters, whose learning rates fall to zero over the steps."""

    def __init__(self, *groups: dict[str, Any], steps: int) -> None:
        self._optimizer = torch.optim.Adam(groups)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, steps)

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of a loss."""
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._schedule.step()


class Strain:
    """Squared motion of N, CA and C from where they were, and restraints across each peptide bond.

    Parameters
    ----------
    start, chain, aatype : Tensor
        As in :func:`close_peptides`.
    weight : float
        Of the restraints.
    """

    def __init__(self, start: Tensor, chain: Tensor, aatype: Tensor, weight: float) -> None:
        self._start, self._weight = start[:, :, :3], weight
        self.bonded = (chain[:, 1:] == chain[:, :-1]) & (chain[:, 1:] >= 0)
        ca_step = (start[:, 1:, 1] - start[:, :-1, 1]).norm(dim=-1)
        cis = (ca_step < _CIS_BELOW) & (aatype[:, 1:] == RESTYPES.index("P"))
        self._ca_ideal = torch.where(cis, _CA_CIS, _CA_TRANS)

    def __call__(self, backbone: Tensor) -> Tensor:
        """Of ``[B, N, 3, 3]``, summed."""
        loss = (backbone - self._start).square().sum()
        for a, b, ideal in (*_ACROSS, (1, 1, self._ca_ideal)):
            apart = distance(backbone[:, 1:, b], backbone[:, :-1, a])
            loss = loss + self._weight * ((apart - ideal).square() * self.bonded).sum()
        return loss


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Distances ``[*]`` of points ``[*, 3]``, with a gradient where they meet."""
    return (a - b).square().sum(-1).clamp(min=1e-6).sqrt()


def _close_pairs(ca: Tensor, chain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Structure, residue and residue of pairs that are no neighbours and may clash."""
    apart = distances(ca)
    count = chain.shape[1]
    later = torch.ones(count, count, dtype=torch.bool, device=ca.device).triu(2)
    real = chain >= 0
    near = (apart < _CA_WATCHED) & later & real[:, :, None] & real[:, None]
    structure, first, second = torch.nonzero(near, as_tuple=True)
    return structure, first, second


def moved(atoms: Tensor, motion: Tensor) -> Tensor:
    """Atoms ``[B, N, A, 3]`` turned about their CA by a rotation vector and shifted, ``motion`` ``[B, N, 6]``."""
    turn, shift = motion.split(3, dim=-1)
    angle = (turn.square().sum(-1, keepdim=True) + 1e-12).sqrt()
    axis = (turn / angle)[:, :, None].expand_as(atoms)
    angle = angle[:, :, None]
    ca = atoms[:, :, 1:2]
    return ca + shift[:, :, None] + turned(atoms - ca, axis, angle)


def with_oxygens(atoms: Tensor, bonded: Tensor) -> Tensor:
    """Atoms with each O that has a following residue in the peptide plane, between the other two bonds of C."""
    ca, c, following = atoms[:, :-1, 1], atoms[:, :-1, 2], atoms[:, 1:, 0]
    outward = torch.nn.functional.normalize(c - ca, dim=-1) + torch.nn.functional.normalize(c - following, dim=-1)
    placed = c + _CARBONYL * torch.nn.functional.normalize(outward, dim=-1)
    oxygens = torch.cat([torch.where(bonded[..., None], placed, atoms[:, :-1, 3]), atoms[:, -1:, 3]], dim=1)
    return torch.cat([atoms[:, :, :3], oxygens[:, :, None], atoms[:, :, 4:]], dim=2)
