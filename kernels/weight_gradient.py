"""Gradients of weights: products over all tokens, which a GPU has to split to be busy."""

from __future__ import annotations

import torch
from torch import Tensor


def product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Batched product with an fp32 result (fp64 for fp64), which PyTorch has for narrower operands on CUDA only."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class WeightGradient:
    """Sum of ``dy^T x`` over chunks of tokens, in fp32 and always in the same order.

    Parameters
    ----------
    outputs, inputs : int
        Shape of the weight.
    shares : int
        Parts of a chunk's tokens that are summed apart until the end: the few tiles of one product would leave most
        of a GPU idle.
    device : torch.device
    """

    def __init__(self, outputs: int, inputs: int, shares: int, device: torch.device) -> None:
        self._sums = torch.empty(shares, outputs, inputs, dtype=torch.float32, device=device)
        self._beta = 0

    def add(self, dy: Tensor, x: Tensor) -> None:
        """Take in a chunk: ``[tokens, outputs]`` and ``[tokens, inputs]``, tokens a multiple of the shares."""
        shares = len(self._sums)
        left, right = dy.view(shares, -1, dy.shape[1]).mT, x.view(shares, -1, x.shape[1])
        if x.is_cuda and x.dtype != torch.float32:
            torch.baddbmm(self._sums, left, right, out_dtype=torch.float32, beta=self._beta, out=self._sums)
        else:
            self._sums.baddbmm_(left.float(), right.float(), beta=self._beta)
        self._beta = 1

    def total(self) -> Tensor:
        """``[outputs, inputs]`` fp32, of one chunk at least."""
        return self._sums.sum(0)
