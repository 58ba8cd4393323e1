"""The operation in plain PyTorch, one sample after the other."""

from __future__ import annotations

import torch
from torch import Tensor

THRESHOLDS = (0.5, 1.0, 2.0, 4.0)
"""Of lDDT, Å."""


def pairs(
    x: Tensor, target: Tensor, mask: Tensor, radius: Tensor, eps: float, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums over the pairs of each atom.

    Parameters
    ----------
    x : Tensor
        ``[B, S, A, 3]``, Å.
    target : Tensor
        ``[B, A, 3]``, Å.
    mask, radius : Tensor
        ``[B, A]``.
    eps : float
    differentiate : bool
        Whether the gradient is computed, too.

    Returns
    -------
    hits : Tensor
        ``[B, S, A]``, of the scores of pairs that count.
    included : Tensor
        ``[B, A]``, of pairs that count.
    gradient : Tensor, optional
        ``[B, S, A, 3]``, of the sum of ``hits`` over the atoms.
    """
    true = _distances(target, eps)
    others = ~torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
    counts = ((true < radius[:, :, None]) & mask[:, :, None] & mask[:, None, :] & others).to(x.dtype)
    hits, gradient = torch.empty_like(x[..., 0]), torch.empty_like(x) if differentiate else None
    for sample in range(x.shape[1]):
        distances = _distances(x[:, sample], eps)
        change = distances - true
        near = [torch.sigmoid(threshold - change.abs()) for threshold in THRESHOLDS]
        hits[:, sample] = (counts * sum(near) / len(near)).sum(-1)
        if gradient is not None:
            slope = sum(score * (1 - score) for score in near) / len(near)
            pull = -(counts + counts.mT) * slope * change.sign() / distances
            gradient[:, sample] = (pull[..., None] * _differences(x[:, sample])).sum(-2)
    return hits, counts.sum(-1), gradient


def _differences(x: Tensor) -> Tensor:
    return x[:, :, None] - x[:, None, :]


def _distances(x: Tensor, eps: float) -> Tensor:
    return (eps + _differences(x).square().sum(-1)).sqrt()
