"""The loss over pairs of atoms of a diffusion model in training, without a tensor over pairs of atoms."""

from pairformer_fast.kernels.smooth_lddt.api import smooth_lddt
from pairformer_fast.kernels.smooth_lddt.reference import THRESHOLDS

__all__ = ["THRESHOLDS", "smooth_lddt"]
