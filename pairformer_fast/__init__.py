"""AlphaFold-3-style Pairformers, faster, without changing what they predict.

The public names below are imported on first use, so that neither ``import pairformer_fast`` nor the command line's
help waits for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pairformer_fast.config import AttentionConfig, ModelConfig
    from pairformer_fast.kernels.flash_bias import BiasFactors, flash_bias_attention
    from pairformer_fast.model.checkpoint import load_checkpoint
    from pairformer_fast.model.folding import FoldingModel

__version__ = "0.1.0"

__all__ = [
    "AttentionConfig",
    "BiasFactors",
    "FoldingModel",
    "ModelConfig",
    "__version__",
    "flash_bias_attention",
    "load_checkpoint",
]

_MODULES = {
    "AttentionConfig": "config",
    "BiasFactors": "kernels.flash_bias",
    "FoldingModel": "model.folding",
    "ModelConfig": "config",
    "flash_bias_attention": "kernels.flash_bias",
    "load_checkpoint": "model.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
