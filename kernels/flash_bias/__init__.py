"""Attention with an additive pair bias, dense or given by low-rank factors."""

from pairformer_fast.kernels.flash_bias.api import Factors, flash_bias_attention

__all__ = ["Factors", "flash_bias_attention"]
