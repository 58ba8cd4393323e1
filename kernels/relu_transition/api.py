"""Public function of the operation: checks and dispatch."""

from __future__ import annotations

from torch import Tensor

from pairformer_fast.config import Backend
from pairformer_fast.kernels.backend import compute_dtype
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.relu_transition import operator, reference
from pairformer_fast.kernels.transition.api import check_inputs, takes_hidden


def relu_transition(
    x: Tensor,
    norm: NormParameters,
    weight_1: Tensor,
    offset_1: Tensor,
    weight_2: Tensor,
    offset_2: Tensor,
    mask: Tensor | None = None,
    *,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """Update of a transition, ``mask * (relu(y w_1^T + o_1) w_2^T + o_2)`` of ``y = layer_norm(x)``.

    Differentiable in ``x`` and all parameters. Products run in the dtype of autocast where it is on, else in that of
    ``x``, and are summed in fp32. The hidden layer is never in memory with Triton, in neither direction: the backward
    pass computes it again.

    Parameters
    ----------
    x : Tensor
        ``[B, I, J, C]`` or ``[B, N, C]``, floating point, any strides but the last.
    norm : NormParameters
    weight_1, offset_1 : Tensor
        ``[hidden, C]`` and ``[hidden]``, floating point.
    weight_2, offset_2 : Tensor
        ``[C, hidden]`` and ``[C]``, floating point.
    mask : Tensor, optional
        Bool, ``x.shape[:-1]``, True = keep; the update of other tokens is zero.
    backend : Backend
        ``auto`` takes Triton where :func:`runs_triton` says so, and plain PyTorch elsewhere.

    Returns
    -------
    Tensor
        Shape and dtype of ``x``, laid out as ``torch.empty_like(x)``; without the residual.

    Raises
    ------
    TypeError, ValueError
        If shapes, dtypes or devices do not fit together or to the backend.
    RuntimeError
        If ``backend`` is ``triton`` and cannot run here.

    Notes
    -----
    Source: AF2 Algorithms 9 and 15.
    """
    parameters = {
        "weight_1": (("hidden", "C"), weight_1),
        "offset_1": (("hidden",), offset_1),
        "weight_2": (("C", "hidden"), weight_2),
        "offset_2": (("C",), offset_2),
    }
    check_inputs(x, norm, parameters, mask)
    compute = compute_dtype(x)
    if not runs_triton(x, weight_1, backend):
        return reference.relu_transition(x, norm, weight_1, offset_1, weight_2, offset_2, mask, compute)
    inputs = x, norm.weight, norm.bias, weight_1, offset_1, weight_2, offset_2
    return operator.relu_transition_forward(*inputs, mask, norm.eps, compute)


def runs_triton(x: Tensor, weight_1: Tensor, backend: Backend) -> bool:
    """Whether Triton computes the update of ``x``.

    With ``auto`` that is so on CUDA for bf16, fp16 and fp32 up to 512 channels where all channels are multiples of 8.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`relu_transition` about the backend.
    """
    return takes_hidden(backend, x, "weight_1", weight_1)
