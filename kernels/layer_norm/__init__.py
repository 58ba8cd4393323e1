"""Layer norm over the last dimension, and its backward pass: what the other kernels of the block are made with."""

from pairformer_fast.kernels.layer_norm.api import layer_norm, layer_norm_backward
from pairformer_fast.kernels.layer_norm.parameters import NormParameters

__all__ = ["NormParameters", "layer_norm", "layer_norm_backward"]
