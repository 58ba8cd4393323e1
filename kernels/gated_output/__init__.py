"""Gate and output projection of attention, added to the representation that attended (AF3 Algorithms 14, 15, 24)."""

from pairformer_fast.kernels.gated_output.api import gated_output

__all__ = ["gated_output"]
