"""SwiGLU transition with its residual (AF3 Algorithm 11), without its hidden layer in memory."""

from pairformer_fast.kernels.transition.api import transition

__all__ = ["transition"]
