"""Public function of the operation: checks and dispatch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pairformer_fast.config import Backend
from pairformer_fast.kernels.backend import check_device, compute_dtype, takes_triton
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm.api import check_norm
from pairformer_fast.kernels.transition import operator, reference

MOST_CHANNELS = 512
"""Most channels that the Triton kernels hold on chip."""

VECTOR = 8
"""Channels and hidden channels of the Triton kernels are multiples of this."""


def transition(
    x: Tensor,
    norm: NormParameters,
    a_weight: Tensor,
    b_weight: Tensor,
    out_weight: Tensor,
    mask: Tensor | None = None,
    *,
    residual: bool = True,
    out: Tensor | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """SwiGLU transition, ``x + mask * ((silu(y a^T) * (y b^T)) out^T)`` of ``y = layer_norm(x)``.

    Differentiable in ``x`` and all parameters. Products run in the dtype of autocast where it is on, else in that of
    ``x``, and are summed in fp32. The hidden layer is never in memory with Triton, in neither direction: the backward
    pass computes it again. For a while it needs three tensors ``[tokens, C]`` in the dtype of the products, and sums of
    the gradients of the weights over 264 / (hidden / 64) parts of the tokens in fp32.

    Parameters
    ----------
    x : Tensor
        ``[B, I, J, C]`` or ``[B, N, C]``, floating point, any strides but the last.
    norm : NormParameters
    a_weight, b_weight : Tensor
        ``[hidden, C]``, floating point; a is the gate.
    out_weight : Tensor
        ``[C, hidden]``, floating point.
    mask : Tensor, optional
        Bool, ``x.shape[:-1]``, True = keep; the update of other tokens is zero.
    residual : bool
        Whether ``x`` is added; if not, the result is the update alone.
    out : Tensor, optional
        Shape and dtype of ``x``, where the result is written and no gradient is needed; may be ``x`` itself.
    backend : Backend
        ``auto`` takes Triton on CUDA for bf16, fp16 and fp32 up to 512 channels where all channels are multiples of 8,
        and plain PyTorch elsewhere.

    Returns
    -------
    Tensor
        Shape and dtype of ``x``; ``out`` where it is given.

    Raises
    ------
    TypeError, ValueError
        If shapes, dtypes or devices do not fit together or to the backend.
    RuntimeError
        If ``out`` is given where a gradient is needed, or ``backend`` is ``triton`` and cannot run here.

    Notes
    -----
    Source: AF3 Algorithm 11.
    """
    parameters = {
        "a_weight": (("hidden", "C"), a_weight),
        "b_weight": (("hidden", "C"), b_weight),
        "out_weight": (("C", "hidden"), out_weight),
    }
    check_inputs(x, norm, parameters, mask)
    inputs = (x, norm.weight, norm.bias, a_weight, b_weight, out_weight)
    if out is not None:
        _check_out(out, x)
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
            raise RuntimeError(
                "out cannot be given where a gradient is needed; call under torch.no_grad(), or leave out None"
            )
    compute = compute_dtype(x)
    if not _takes_triton(Backend(backend), x, out, a_weight):
        result = reference.transition(x, norm, a_weight, b_weight, out_weight, mask, residual, compute)
        return result if out is None else out.copy_(result)
    if out is None:
        return operator.transition_forward(*inputs, mask, norm.eps, residual, compute)
    operator.transition_into(out, *inputs, mask, norm.eps, residual, compute)
    return out


def runs_triton(x: Tensor, a_weight: Tensor, backend: Backend) -> bool:
    """Whether Triton computes the transition of ``x``, where the result is a new tensor.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`transition` about the backend.
    """
    return takes_hidden(backend, x, "a_weight", a_weight)


def _takes_triton(backend: Backend, x: Tensor, out: Tensor | None, a_weight: Tensor) -> bool:
    takes = runs_triton(x, a_weight, backend)
    if not takes or out is None or out.stride(-1) == 1:
        return takes
    if backend is Backend.AUTO:
        return False
    raise ValueError(f"backend 'triton' needs out with contiguous channels, but got strides {out.stride()}")


def takes_hidden(backend: Backend, x: Tensor, name: str, weight: Tensor) -> bool:
    """Whether Triton computes a transition of ``x`` whose first weight is ``weight [hidden, C]``, called ``name``.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`pairformer_fast.kernels.backend.takes_triton`, and ValueError for odd channels.
    """
    odd = any(size % VECTOR for size in weight.shape)
    if backend is Backend.AUTO and odd:
        return False
    takes = takes_triton(backend, x, MOST_CHANNELS)
    if takes and odd:
        raise ValueError(
            f"backend 'triton' takes channels in multiples of {VECTOR}, but {name} is {list(weight.shape)}; choose "
            "backend 'reference'"
        )
    return takes


def check_inputs(
    x: Tensor, norm: NormParameters, parameters: Mapping[str, tuple[tuple[str, ...], Tensor]], mask: Tensor | None
) -> None:
    """Raise TypeError or ValueError unless the arguments of a transition fit together.

    ``parameters`` are dimensions and tensors by name, ``[hidden, C]`` first, which says how wide the hidden layer is.
    """
    if x.ndim not in (3, 4):
        raise ValueError(f"x must be [B, I, J, C] or [B, N, C], but got shape {list(x.shape)}")
    check_norm("x", x, norm)
    channels = x.shape[-1]
    first, (_, weight) = next(iter(parameters.items()))
    if weight.ndim != 2 or weight.shape[1] != channels or not weight.shape[0]:
        raise ValueError(f"{first} must be [hidden, C] = [hidden, {channels}], but got {list(weight.shape)}")
    sizes = {"C": channels, "hidden": weight.shape[0]}
    for name, (dimensions, tensor) in parameters.items():
        shape = [sizes[dimension] for dimension in dimensions]
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be [{', '.join(dimensions)}] = {shape} to fit x and {first}, but got {list(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, but got {tensor.dtype}")
        check_device(name, tensor, "x", x)
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be torch.bool, but got {mask.dtype}; convert 0/1 masks by mask > 0.5")
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask must be {list(x.shape[:-1])} to fit x, but got {list(mask.shape)}")
    check_device("mask", mask, "x", x)


def _check_out(out: Tensor, x: Tensor) -> None:
    if out.shape != x.shape:
        raise ValueError(f"out must have the shape of x, {list(x.shape)}, but got {list(out.shape)}")
    if out.dtype != x.dtype:
        raise TypeError(f"out must have the dtype of x, {x.dtype}, but got {out.dtype}")
    check_device("out", out, "x", x)
