"""AlphaFold-3-style Pairformers, faster, without changing what they predict.

The public names below are imported on first use, so that neither ``import pairformer_fast`` nor the command line's
help waits for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pairformer_fast.bias import BiasFactors
    from pairformer_fast.config import AttentionConfig, ModelConfig
    from pairformer_fast.inference.compare import compare_structures
    from pairformer_fast.inference.pipeline import fold
    from pairformer_fast.inference.settings import FoldSettings
    from pairformer_fast.integrations import Acceleration, accelerate
    from pairformer_fast.kernels.flash_bias import flash_bias_attention
    from pairformer_fast.model.checkpoint import load_checkpoint
    from pairformer_fast.model.folding import FoldingModel

__version__ = "0.1.0"

__all__ = [
    "Acceleration",
    "AttentionConfig",
    "BiasFactors",
    "FoldSettings",
    "FoldingModel",
    "ModelConfig",
    "__version__",
    "accelerate",
    "compare_structures",
    "flash_bias_attention",
    "fold",
    "load_checkpoint",
]

_MODULES = {
    "Acceleration": "integrations",
    "AttentionConfig": "config",
    "BiasFactors": "bias",
    "FoldSettings": "inference.settings",
    "FoldingModel": "model.folding",
    "ModelConfig": "config",
    "accelerate": "integrations",
    "compare_structures": "inference.compare",
    "flash_bias_attention": "kernels.flash_bias",
    "fold": "inference.pipeline",
    "load_checkpoint": "model.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
