"""Which backend computes an operation, in which dtype, and that its arguments are in one place."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from pairformer_fast.config import Backend

HAS_TRITON = find_spec("triton") is not None

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def takes_triton(backend: Backend, x: Tensor, channels: int) -> bool:
    """Whether Triton computes an operation on ``x [..., C]``, the first argument of all operations of the block.

    Parameters
    ----------
    backend : Backend
        ``auto`` takes Triton on CUDA for bf16, fp16 and fp32, up to ``channels`` channels that are contiguous.
    x : Tensor
    channels : int
        Most channels that the kernels hold on chip.

    Raises
    ------
    RuntimeError
        If ``backend`` is ``triton`` without Triton, or off CUDA (``TRITON_INTERPRET=1`` runs it on a CPU, slowly).
    TypeError, ValueError
        If ``backend`` is ``triton`` and the kernels do not take the dtype, width or strides of ``x``.
    """
    if not isinstance(backend, Backend):
        backend = Backend(backend)
    if backend is Backend.AUTO:
        fits = x.dtype in TRITON_DTYPES and x.shape[-1] <= channels and x.stride(-1) == 1
        return HAS_TRITON and x.is_cuda and fits
    if backend is not Backend.TRITON:
        return False
    if not HAS_TRITON:
        raise RuntimeError(
            "backend 'triton' needs Triton: pip install 'pairformer_fast[gpu]', or choose backend 'auto' or 'reference'"
        )
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"backend 'triton' needs tensors on a CUDA device, but got {x.device}; move them to a GPU, or choose "
            "backend 'auto' or 'reference'"
        )
    if x.dtype not in TRITON_DTYPES:
        raise TypeError(f"backend 'triton' takes bf16, fp16 and fp32, but got {x.dtype}; choose backend 'reference'")
    if x.shape[-1] > channels:
        raise ValueError(
            f"backend 'triton' takes up to {channels} channels here, but got {x.shape[-1]}; choose backend 'reference'"
        )
    if x.stride(-1) != 1:
        raise ValueError(
            f"backend 'triton' needs channels that are contiguous in memory, but got strides {x.stride()}; "
            "call .contiguous() first"
        )
    return True


def check_device(name: str, x: Tensor, other: str, like: Tensor) -> None:
    """Raise ValueError unless ``x``, the argument called ``name``, is where ``like``, the argument ``other``, is."""
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {other}, {like.device}, but got {x.device}")


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products with ``x`` are computed in: autocast's dtype where it is on, else that of ``x``."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
