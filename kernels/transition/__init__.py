"""SwiGLU transition with or without its residual (AF3 Algorithm 11), without its hidden layer in memory."""

from pairformer_fast.kernels.transition.api import runs_triton, transition

__all__ = ["runs_triton", "transition"]
