"""Factors of a pair bias together with what is known about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pairformer_fast.bias.certificate import Certificate
from pairformer_fast.kernels.flash_bias import Factors


@dataclass(frozen=True, eq=False)
class BiasFactors(Factors):
    """Low-rank pair bias, ``bias = phi_q @ phi_k.mT`` plus the table, if there is one, up to a constant per row.

    Heads of which every tile is dense keep the bias itself.

    Attributes
    ----------
    phi_q, phi_k : Tensor
        ``[B, H, N, R]`` with R the largest rank; heads of lower rank have zero columns at the end.
    rank : Tensor
        ``[B, H]`` int64, number of columns in use (0 if nothing of a head's bias is left to them, or it is dense).
    certificate : Certificate
        Bound on the change of the attention weights.
    """

    rank: Tensor
    certificate: Certificate

    @property
    def dense_heads(self) -> Tensor:
        """Bool ``[B, H]``, True for heads that keep the bias itself."""
        if self.dense_tiles is None:
            return torch.zeros_like(self.rank, dtype=torch.bool)
        return self.dense_tiles.all(-1).all(-1)
