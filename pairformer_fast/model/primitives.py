"""Building blocks shared by the modules of the Pairformer; names and initialisation follow OpenFold3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pairformer_fast.bias import Configured
from pairformer_fast.config import Backend
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.transition import transition

FEW_TOKENS = Backend.REFERENCE
"""What computes the single representation's linear layers: for N tokens PyTorch's products are faster than kernels that
go through N^2, which would leave most of a GPU idle."""


def linear(c_in: int, c_out: int, *, bias: bool = False, init: str = "default") -> nn.Linear:
    """Linear layer with one of AlphaFold's initialisations.

    Parameters
    ----------
    c_in, c_out : int
        Channels.
    bias : bool
        Whether the layer has an offset.
    init : {"default", "relu", "glorot", "gating", "final"}
        ``default`` is LeCun normal, ``relu`` He normal, ``gating`` weights 0 and offset 1, ``final`` all 0.
    """
    layer = nn.Linear(c_in, c_out, bias=bias)
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.fill_(1.0 if init == "gating" else 0.0)
        match init:
            case "default":
                nn.init.trunc_normal_(layer.weight, std=c_in**-0.5)
            case "relu":
                nn.init.trunc_normal_(layer.weight, std=(2 / c_in) ** 0.5)
            case "glorot":
                nn.init.xavier_uniform_(layer.weight)
            case "gating" | "final":
                layer.weight.zero_()
            case _:
                raise ValueError(f"unknown init {init!r}")
    return layer


class Lookup(nn.Embedding):
    """Embedding whose gradient is a matrix product: the same on every run, and fit for a CUDA graph."""

    def forward(self, index: Tensor) -> Tensor:
        """Rows of the table, ``[...]`` int64 to ``[..., C]``."""
        one_hot = index[..., None] == torch.arange(self.num_embeddings, device=index.device)
        return one_hot.to(self.weight.dtype) @ self.weight


class SharedDropout(nn.Module):
    """Dropout whose mask is shared along one axis of the pair representation (AF3 Algorithm 17).

    Parameters
    ----------
    rate : float
        Probability of zeroing.
    shared_dim : int
        Axis that shares the mask: -3 for row-wise, -2 for column-wise dropout.
    """

    def __init__(self, rate: float, shared_dim: int) -> None:
        super().__init__()
        self.rate = rate
        self.shared_dim = shared_dim

    def forward(self, z: Tensor) -> Tensor | None:
        """What to multiply an update of ``z [..., N, N, C]`` with, broadcastable to it; None but in training."""
        if not self.training or self.rate == 0:
            return None
        shape = list(z.shape)
        shape[self.shared_dim] = 1
        return nn.functional.dropout(z.new_ones(shape), self.rate)


class SwiGLU(nn.Module):
    """Weights of swish(linear_a(x)) * linear_b(x)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.linear_a = linear(c_in, c_out, init="relu")
        self.linear_b = linear(c_in, c_out)


class Transition(Configured):
    """Layer norm, SwiGLU, projection (AF3 Algorithm 11).

    Parameters
    ----------
    c : int
        Channels of input and output.
    n : int
        Widening factor of the hidden layer.
    """

    def __init__(self, c: int, n: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(c)
        self.swiglu = SwiGLU(c, n * c)
        self.linear_out = linear(n * c, c, init="final")

    def forward(self, x: Tensor, mask: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Add the update to ``x [..., C]``; it is zero where the bool ``mask [...]`` is False.

        ``out``, such as x itself, is written to if given; without gradients only.
        """
        backend = FEW_TOKENS if x.ndim == 3 else self.config.backend
        return transform(self, x, mask, out=out, backend=backend)


def transform(
    module: Any,
    x: Tensor,
    mask: Tensor | None,
    *,
    residual: bool = True,
    out: Tensor | None = None,
    backend: Backend,
) -> Tensor:
    """What :meth:`Transition.forward` does, with the weights of a module of ours or of OpenFold3.

    Without ``residual`` the result is the update alone.
    """
    a, b, last = module.swiglu.linear_a.weight, module.swiglu.linear_b.weight, module.linear_out.weight
    norm = NormParameters.of(module.layer_norm)
    return transition(x, norm, a, b, last, mask, residual=residual, out=out, backend=backend)
