"""Triangle multiplication with its layer norms, gates and residual."""

from pairformer_fast.kernels.triangle_multiplication.api import triangle_multiplication
from pairformer_fast.kernels.triangle_multiplication.parameters import TriangleWeights

__all__ = ["TriangleWeights", "triangle_multiplication"]
