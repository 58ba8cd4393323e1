"""The small steps of randomised factors: between two products with a bias a GPU does one each."""

from pairformer_fast.kernels.low_rank.api import balanced, centred, inverse_cholesky

__all__ = ["balanced", "centred", "inverse_cholesky"]
