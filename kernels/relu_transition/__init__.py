"""Layer norm and a transition with ReLU and offsets."""

from pairformer_fast.kernels.relu_transition.api import relu_transition, runs_triton

__all__ = ["relu_transition", "runs_triton"]
