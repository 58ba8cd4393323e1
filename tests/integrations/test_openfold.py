"""An OpenFold (for AlphaFold 2) whose attention runs through this package, in an environment of its own.

PyPI's 0.0.1 declares no dependencies, its source distribution lacks the ``scripts`` that its ``setup.py`` imports, and
its softmax is a CUDA extension without which it cannot be imported: all three are made up for here.
"""

import pytest

NEEDS = ("dm-tree", "ml_collections", "scipy")
OPENFOLD = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "openfold==0.0.1")
BUILD_SCRIPTS = """
from setuptools import Distribution

Distribution.has_ext_modules = lambda distribution: False  # without a GPU the extension would raise when called


def get_nvidia_cc():
    return None, None
"""
SOFTMAX = """
def forward_(logits, rows, columns):
    logits.copy_(logits.softmax(-1))


def backward_(weights, grad_output, values, rows, columns, width):
    grad_weights = grad_output @ values.transpose(-1, -2)
    weights.mul_(grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
"""


@pytest.mark.slow
def test_accelerated_openfold_computes_and_learns_what_openfold_does(run_checks) -> None:
    stand_ins = {"attn_core_inplace_cuda.py": SOFTMAX, "scripts/utils.py": BUILD_SCRIPTS}
    run_checks("openfold", [NEEDS, OPENFOLD], stand_ins)
