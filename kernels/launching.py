"""What every launch of a Triton kernel needs to know."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor


def padded(width: int) -> int:
    """Smallest width that holds ``width`` and that ``tl.dot`` takes."""
    return max(16, triton.next_power_of_2(width))


def tf32(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are rounded to TF32: those of fp32, if PyTorch's switch allows it."""
    # Reading the older ``allow_tf32`` raises once the newer ``fp32_precision`` has been set.
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies."""
    return "tf32" if tf32(dtype) else "ieee"


def on_device(x: Tensor) -> AbstractContextManager:
    """Make the device of ``x`` current, where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter three, so that a persistent program has several tiles there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
