"""OpenFold3 0.5: SwiGLU transitions outside whole pair blocks.

Those of the MSA stack, of the single representation, of the diffusion module's conditioning, and of pair blocks that
stay OpenFold3's. The residual, in place or not, stays with the caller.
"""

from __future__ import annotations

from typing import Any

from openfold3.core.model.layers.transition import ReLUTransition, SwiGLUTransition
from openfold3.core.model.primitives import LayerNorm, Linear, SwiGLU
from torch import Tensor, nn

from pairformer_fast.bias import Configured
from pairformer_fast.config import Backend
from pairformer_fast.integrations.acceleration import foreign_part
from pairformer_fast.kernels.transition import runs_triton
from pairformer_fast.model.primitives import FEW_TOKENS, transform
from pairformer_fast.model.replay import intervened

WIDEST = 256
"""Channels up to which the kernel's tiles have more than 16 rows, for each of which it reads all weights."""

FEW_ROWS = 4096
"""Rows whose tiles, of 64, occupy less than half of an H100."""


class FastSwiGLUTransition(Configured, SwiGLUTransition):
    """Transition without a hidden layer in memory where the kernel is taken.

    With ``backend: auto`` that is so on a GPU for many rows of up to 256 channels: the MSA and the pair representation.
    Few or wider rows, such as the single representation with its 384 channels, are computed by plain PyTorch with
    products by cuBLAS, as in OpenFold3. All else, such as an MSA on a CPU, is OpenFold3's code, which works in chunks.
    """

    swiglu: Any

    def forward(self, x: Tensor, mask: Tensor | None = None, *limits: Any, **chunks: Any) -> Tensor:
        """Update of a representation, in its dtype; limits of chunks and checkpoints have no effect with the kernel.

        Parameters
        ----------
        x : Tensor
            ``[*, N, C]``.
        mask : Tensor, optional
            Broadcastable to ``[*, N]``, 1 = keep.

        Returns
        -------
        Tensor
            ``[*, N, C]``, without the residual.
        """
        backend, channels = self.config.backend, x.shape[-1]
        rows = x.reshape(-1, *x.shape[-3:]) if x.ndim > 2 else x[None]
        if backend is Backend.AUTO and (channels > WIDEST or rows.numel() < FEW_ROWS * channels):
            backend = FEW_TOKENS
        elif not runs_triton(rows, self.swiglu.linear_a.weight, backend):
            return super().forward(x, mask, *limits, **chunks)
        keep = None if mask is None else (mask != 0).expand(x.shape[:-1]).reshape(rows.shape[:-1])
        return transform(self, rows, keep, residual=False, backend=backend).view(x.shape)


_KNOWN = {SwiGLUTransition, SwiGLU, Linear, LayerNorm, nn.SiLU}
"""What such a transition is made of."""


def is_transition(module: nn.Module) -> bool:
    """Whether ``module`` is a transition of OpenFold3 that has no condition."""
    return isinstance(module, (SwiGLUTransition, ReLUTransition))


def transition_obstacle(module: nn.Module) -> str | None:
    """Why such a transition cannot be swapped; None if it can."""
    if isinstance(module, FastSwiGLUTransition):
        return "accelerated already; restore it first, or set another config with set_attention"
    if isinstance(module, ReLUTransition):
        return "ReLU transitions of OpenFold3 are not supported"
    if type(module) is not SwiGLUTransition:
        return "a subclass, which may compute something else"
    inner = foreign_part(module, _takes)
    if not inner:
        return None if inner is None else "its forward was replaced on the instance"
    return f"its {inner} is not OpenFold3's own, has hooks, or is of a kind that is not known here"


def _takes(part: nn.Module) -> bool:
    """Whether the operation can stand for a part: no offset in a linear layer, a scale in the layer norm, no hooks."""
    if type(part) not in _KNOWN:
        return False
    if isinstance(part, SwiGLUTransition):
        return True
    return not intervened(part) and has_kernel_parameters(part)


def has_kernel_parameters(layer: nn.Module) -> bool:
    """Whether a layer has what the operations take: no offset in a linear layer, and a scale in a layer norm."""
    if isinstance(layer, Linear):
        return layer.bias is None and layer.precision is None
    return not isinstance(layer, LayerNorm) or layer.weight is not None
