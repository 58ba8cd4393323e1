"""Attention with an additive pair bias, dense or given by low-rank factors.

What ``backend="auto"`` runs:

* On an H100 or H200 with Triton 3.6, in bf16, with a head width up to 64, without table and pair mask: Gluon
  (``hopper_forward.py``), persistent and warp-specialised, with tiles from ``hopper_tiles.json``. Weights are computed
  without a running maximum; queries whose logits leave +-100 in units of log2 are found and done again with one. On
  newer Triton these kernels compile (a test does that) but have not been run, so the general ones are taken.
* On other NVIDIA GPUs, dtypes, head widths up to 128 and forms, with Triton 3.6 and newer: plain Triton
  (``triton_forward.py``), with tiles from ``tiles.json``.
* On a CPU and in fp64: ``scaled_dot_product_attention`` of PyTorch.

``backend="reference"`` is explicit PyTorch. ``scripts/tune.py`` measures the tables of tiles anew.
"""

from pairformer_fast.kernels.flash_bias.api import (
    Factors,
    chosen_backend,
    flash_bias_attention,
    packed_flash_bias_attention,
)

__all__ = ["Factors", "chosen_backend", "flash_bias_attention", "packed_flash_bias_attention"]
