"""Layer norm and the linear layers that read it, in one pass over the pair representation."""

from pairformer_fast.kernels.layer_norm_linear.api import layer_norm_linear

__all__ = ["layer_norm_linear"]
