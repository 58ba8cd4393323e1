"""Superposition, GDT and TM-score of matched CA coordinates (Å)."""

from __future__ import annotations

import numpy as np
import tmtools

GDT_TS_CUTOFFS = (1.0, 2.0, 4.0, 8.0)
GDT_HA_CUTOFFS = (0.5, 1.0, 2.0, 4.0)

_SMALLEST_SEED = 4
_MOST_STARTS = 128
_MOST_ROUNDS = 20


def superposition(
    mobile: np.ndarray, fixed: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares rotation and translation (Kabsch 1976), batched over leading dimensions of ``weights``.

    Parameters
    ----------
    mobile, fixed : numpy.ndarray
        ``[N, 3]`` matched coordinates.
    weights : numpy.ndarray, optional
        ``[..., N]``, at least one positive in each set; all equal if omitted.

    Returns
    -------
    rotation : numpy.ndarray
        ``[..., 3, 3]``, proper.
    translation : numpy.ndarray
        ``[..., 3]``: ``mobile @ rotation.mT + translation`` lies on ``fixed``.
    """
    mobile, fixed = np.asarray(mobile, dtype=float), np.asarray(fixed, dtype=float)
    weights = np.ones(len(mobile)) if weights is None else np.asarray(weights, dtype=float)
    weights = weights / weights.sum(-1, keepdims=True)
    center_m, center_f = weights @ mobile, weights @ fixed
    covariance = np.einsum("...n,ni,nj->...ij", weights, fixed, mobile, optimize=True)
    covariance -= center_f[..., :, None] * center_m[..., None, :]
    u, _, vh = np.linalg.svd(covariance)
    u[..., :, 2] *= np.where(np.linalg.det(u) * np.linalg.det(vh) < 0, -1.0, 1.0)[..., None]
    rotation = u @ vh
    return rotation, center_f - np.einsum("...ij,...j->...i", rotation, center_m)


def transform(coord: np.ndarray, rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """``[..., N, 3]``: coordinates moved by the result of :func:`superposition`."""
    return np.asarray(coord, dtype=float) @ np.swapaxes(rotation, -1, -2) + translation[..., None, :]


def rmsd(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square distance of matched points as they lie, Å."""
    return float(np.sqrt(((np.asarray(a, dtype=float) - b) ** 2).sum(-1).mean()))


def gdt(model: np.ndarray, reference: np.ndarray, cutoffs: tuple[float, ...], length: int) -> float:
    """Global distance test (Zemla 2003): mean over cutoffs of the largest share of residues within the cutoff.

    The best superposition is searched for every cutoff by itself. Each search starts from runs of consecutive
    residues (all, a half, a quarter, ... down to four) and repeats superposing on the residues within the cutoff
    until they no longer change. Like every such search it is a lower bound of the true maximum.

    Parameters
    ----------
    model, reference : numpy.ndarray
        ``[N, 3]`` matched CA coordinates, Å.
    cutoffs : tuple of float
        Å; :data:`GDT_TS_CUTOFFS` or :data:`GDT_HA_CUTOFFS`.
    length : int
        Number of residues to normalise by.

    Returns
    -------
    float
        0 to 1.
    """
    seeds = _seeds(len(model))
    return float(np.mean([_most_within(model, reference, seeds, cutoff) for cutoff in cutoffs])) / length


def _seeds(n: int) -> np.ndarray:
    sizes, size = [], n
    while size >= min(_SMALLEST_SEED, n):
        sizes.append(size)
        size = min(size // 2, n - 1)
    rows = []
    for size in sizes:
        starts = np.arange(0, n - size + 1, max(1, size // 4, n // _MOST_STARTS))
        positions = np.arange(n)
        rows.append((positions >= starts[:, None]) & (positions < starts[:, None] + size))
    return np.concatenate(rows)


def _most_within(model: np.ndarray, reference: np.ndarray, members: np.ndarray, cutoff: float) -> int:
    best = 0
    for _ in range(_MOST_ROUNDS):
        distance = np.linalg.norm(transform(model, *superposition(model, reference, members)) - reference, axis=-1)
        within = distance <= cutoff
        best = max(best, int(within.sum(-1).max()))
        grown = within.sum(-1) >= 3
        changed = grown & (within != members).any(-1)
        if not changed.any():
            break
        members = within[changed]
    return best


def tm_score(model: np.ndarray, reference: np.ndarray, model_alignment: str, reference_alignment: str) -> float:
    """TM-score (Zhang and Skolnick 2004) at a fixed alignment, by TM-align's search for the best superposition.

    Parameters
    ----------
    model, reference : numpy.ndarray
        ``[N, 3]`` and ``[M, 3]`` CA coordinates, Å.
    model_alignment, reference_alignment : str
        Equally long rows of an alignment, ``-`` for a gap.

    Returns
    -------
    float
        0 to 1, normalised by the length of the reference.
    """
    result = tmtools.tm_align(
        np.asarray(model, dtype=np.float64),
        np.asarray(reference, dtype=np.float64),
        model_alignment.replace("-", ""),
        reference_alignment.replace("-", ""),
        [model_alignment, reference_alignment],
    )
    return float(result.tm_norm_chain2)
