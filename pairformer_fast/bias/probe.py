"""Measured effect of factors on a small sample of attention weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pairformer_fast.bias.certificate import kept_tokens
from pairformer_fast.bias.toeplitz import toeplitz

SAMPLED_ROWS = 8
SAMPLED_PAIRS = 256
"""Sampled (row, query) pairs per head and batch entry."""


@dataclass(frozen=True, eq=False)
class ProbedError:
    """Total variation (0 to 1) between attention weights of the dense bias and of its factors.

    Attributes
    ----------
    mean, std, max : Tensor
        ``[B, H]``, over the sampled queries.
    """

    mean: Tensor
    std: Tensor
    max: Tensor


class Probe:
    """Attention weights of sampled queries with the dense bias, to compare factors of any rank with.

    The sample is the same for the same mask: rows that keep some key, and queries that are not padding, evenly spread.

    Parameters
    ----------
    q, k : Tensor
        ``[B, I, N, H, D]`` or ``[B, N, H, D]``.
    bias : Tensor
        ``[B, H, N, N]``.
    mask : Tensor, optional
        Bool ``[B, I, N]`` or ``[B, N]``, True = keep.
    """

    def __init__(self, q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None) -> None:
        keep = kept_tokens(mask, bias)
        if q.ndim == 4:
            q, k = q.unsqueeze(1), k.unsqueeze(1)
            mask = None if mask is None else mask.unsqueeze(1)
        if mask is None:
            mask = torch.ones(q.shape[:3], dtype=torch.bool, device=q.device)
        rows = spread(mask.any(-1), SAMPLED_ROWS)
        self._queries = spread(keep, SAMPLED_PAIRS // rows.shape[1])
        self._entry = torch.arange(q.shape[0], device=q.device)[:, None]
        dtype = torch.promote_types(q.dtype, torch.float32)
        sampled_q = q[self._entry[..., None], rows[:, :, None], self._queries[:, None, :]].to(dtype)
        sampled_k = k[self._entry, rows].to(dtype)
        self._dropped = ~mask[self._entry, rows][:, :, None, None, :]
        self._logits = torch.einsum("bsqhd,bsnhd->bshqn", sampled_q, sampled_k) * q.shape[-1] ** -0.5
        self._exact = self._weights(self._rows_of(bias))

    def error(self, phi_q: Tensor, phi_k: Tensor, table: Tensor | None = None) -> ProbedError:
        """Error of the factors ``[B, H, N, R]``, with a table ``[H, 2 W + 1]`` of relative positions beside them."""
        dtype = self._logits.dtype
        bias = self._rows_of(phi_q).to(dtype) @ phi_k.to(dtype).mT
        if table is not None:
            bias = bias + self._rows_of(toeplitz(table.to(dtype), phi_k.shape[-2]).expand(len(phi_k), -1, -1, -1))
        approximate = self._weights(bias)
        variation = (approximate - self._exact).abs().sum(-1) / 2
        over = (1, 3)
        return ProbedError(variation.mean(over), variation.std(over, correction=0), variation.amax(over))

    def _rows_of(self, table: Tensor) -> Tensor:
        """``[B, H, N, X]`` to ``[B, H, Q, X]`` at the sampled queries."""
        return table.transpose(1, 2)[self._entry, self._queries].transpose(1, 2)

    def _weights(self, bias: Tensor) -> Tensor:
        logits = (self._logits + bias.unsqueeze(1)).masked_fill(self._dropped, torch.finfo(self._logits.dtype).min)
        return logits.softmax(-1).masked_fill(self._dropped, 0)


def spread(valid: Tensor, size: int) -> Tensor:
    """At most ``size`` indices ``[B, S]``, evenly spread over the true entries of ``valid`` ``[B, L]``."""
    size = min(size, valid.shape[1])
    valid_first = torch.argsort(~valid, dim=1, stable=True)
    position = torch.arange(size, device=valid.device) * valid.sum(1, keepdim=True) // size
    return valid_first.gather(1, position)
