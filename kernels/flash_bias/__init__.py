"""Attention with an additive pair bias, dense or given by low-rank factors."""

from pairformer_fast.kernels.flash_bias.api import (
    Factors,
    chosen_backend,
    flash_bias_attention,
    packed_flash_bias_attention,
)

__all__ = ["Factors", "chosen_backend", "flash_bias_attention", "packed_flash_bias_attention"]
