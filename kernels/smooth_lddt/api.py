"""Public function of the operation: checks and dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pairformer_fast.config import Backend
from pairformer_fast.kernels.backend import check_device, takes_triton
from pairformer_fast.kernels.smooth_lddt import reference

DIMENSIONS = 3


def smooth_lddt(
    x: Tensor, target: Tensor, mask: Tensor, radius: Tensor, eps: float, *, backend: Backend = Backend.AUTO
) -> Tensor:
    """Differentiable lDDT of samples of one structure: a sigmoid stands for each of its four thresholds.

    Memory grows with the number of atoms, not of their pairs. What is differentiated computes its gradient in the same
    pass over the pairs, so that the backward pass only scales it.

    Parameters
    ----------
    x : Tensor
        ``[B, S, A, 3]`` positions of the atoms in S samples, Å, fp32 or fp64.
    target : Tensor
        ``[B, A, 3]`` true positions, Å; no gradient.
    mask : Tensor
        ``[B, A]`` bool, True = keep.
    radius : Tensor
        ``[B, A]``, Å: a pair counts for an atom if it is truly nearer than this.
    eps : float
        Added to squared distances and to denominators.
    backend : Backend
        ``auto`` takes Triton on CUDA for fp32, and plain PyTorch elsewhere.

    Returns
    -------
    Tensor
        ``[B, S]`` in the dtype of ``x``, 0 to 1.

    Raises
    ------
    TypeError, ValueError
        If shapes, dtypes or devices do not fit together or to the backend.
    RuntimeError
        If ``backend`` is ``triton`` and cannot run here.

    Notes
    -----
    Source: AF3 Algorithm 27.
    """
    _check(x, target, mask, radius)
    x = x.contiguous()
    # Of the dtypes that are left, Triton is taken for fp32 alone.
    triton = takes_triton(backend, x, DIMENSIONS)
    hits, included = _Pairs.apply(x, target.to(x.dtype), mask, radius.to(x.dtype), eps, triton)
    kept = mask.sum(-1, dtype=torch.float64)
    pairs = kept * (kept - 1) + eps
    return ((hits / pairs[:, None]) / (included / pairs + eps)[:, None]).to(x.dtype)


class _Pairs(torch.autograd.Function):
    """Sums over the pairs, in fp64: of their scores ``[B, S]``, and of those that count ``[B]``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, target: Tensor, mask: Tensor, radius: Tensor, eps: float, triton: bool
    ) -> tuple[Tensor, Tensor]:
        hits, included, gradient = _pairs(triton)(x, target, mask, radius, eps, ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.set_materialize_grads(False)
        included = included.sum(-1, dtype=torch.float64)
        ctx.mark_non_differentiable(included)
        return hits.sum(-1, dtype=torch.float64), included

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhits: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dhits is None:
            return (None,) * 6
        (gradient,) = ctx.saved_tensors
        return gradient * dhits[..., None, None].to(gradient.dtype), None, None, None, None, None


def _pairs(triton: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    if not triton:
        return reference.pairs
    from pairformer_fast.kernels.smooth_lddt import triton_pairs

    return triton_pairs.pairs


def _check(x: Tensor, target: Tensor, mask: Tensor, radius: Tensor) -> None:
    if x.ndim != 4 or x.shape[-1] != DIMENSIONS:
        raise ValueError(f"x must be [B, S, A, 3], but is {list(x.shape)}")
    batch, _, atoms, _ = x.shape
    for name, value, shape in (
        ("target", target, (batch, atoms, DIMENSIONS)),
        ("mask", mask, (batch, atoms)),
        ("radius", radius, (batch, atoms)),
    ):
        if value.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for x {list(x.shape)}, but is {list(value.shape)}")
        check_device(name, value, "x", x)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be fp32 or fp64, but is {x.dtype}: call .float() first")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True = keep, but is {mask.dtype}: pass mask > 0.5")
