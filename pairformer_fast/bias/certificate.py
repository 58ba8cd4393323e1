"""Guaranteed bound on what a factorised bias does to attention weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pairformer_fast.bias.toeplitz import toeplitz

TILE = 64
"""Edge of the tiles that the kernels can keep dense beside factors."""


@dataclass(frozen=True, eq=False)
class Certificate:
    """How far the factors are from the bias, as softmax sees it.

    Attributes
    ----------
    eps_row : Tensor
        ``[B, H, N]`` fp64, half the range of ``bias - phi_q @ phi_k.mT`` (and the table, if there is one) along each
        row, over kept keys; zero for rows of padding.
    eps_tile : Tensor
        ``[B, H, T, T]`` fp64 with T = ceil(N / :data:`TILE`), the farthest that the residual is within a tile from the
        middle of its row's range; the largest of a head is its ``eps``. If only this tile were left to the factors and
        all others were exact, up to the same constant per row, no attention weights would move by more than
        tanh(eps_tile / 2).
    """

    eps_row: Tensor
    eps_tile: Tensor

    @property
    def eps(self) -> Tensor:
        """``[B, H]`` fp64, largest ``eps_row`` of each head."""
        return self.eps_row.amax(-1)

    @property
    def bound(self) -> Tensor:
        """``[B, H]`` fp64, tanh(eps / 2): no attention weights of the head differ by more in total variation."""
        return torch.tanh(self.eps / 2)


def kept_tokens(mask: Tensor | None, bias: Tensor) -> Tensor:
    """Tokens ``[B, N]`` that some row keeps as a key; the others are padding.

    Parameters
    ----------
    mask : Tensor, optional
        Bool ``[B, I, N]`` or ``[B, N]``, True = keep.
    bias : Tensor
        ``[B, H, N, N]``.
    """
    if mask is None:
        return torch.ones(bias.shape[0], bias.shape[-1], dtype=torch.bool, device=bias.device)
    return mask.any(1) if mask.ndim == 3 else mask


def kept_pairs(keep: Tensor) -> Tensor:
    """``[B, 1, N, N]``, True where both tokens of ``keep [B, N]`` are kept."""
    return (keep[:, :, None] & keep[:, None, :]).unsqueeze(1)


def certify(
    bias: Tensor, phi_q: Tensor, phi_k: Tensor, mask: Tensor | None, table: Tensor | None = None
) -> Certificate:
    r"""Bound the change of attention weights when ``bias`` is replaced by ``phi_q @ phi_k.mT`` (and a table).

    Let l be the logits of one query with the bias and l + d with the factors, so d = c + e with a constant c and
    \|e\| <= eps, eps being half the range of d over kept keys. Softmax ignores c. For a set S of keys let p and p' be
    its weights before and after. The odds p / (1 - p) are a ratio of sums of exponentials, each scaled by a factor
    between exp(-eps) and exp(eps), hence they change by a factor of at most exp(2 eps). With log-odds x and
    x + 2 eps, the gap sigmoid(x + 2 eps) - sigmoid(x) is largest at x = -eps, where it is
    sigmoid(eps) - sigmoid(-eps) = tanh(eps / 2). Total variation is the largest gap over all sets S, so it is at most
    tanh(eps / 2), and two keys with d = +-eps attain it. Dropping further keys in some row only narrows the range of
    d: one certificate holds for every row of triangle attention.

    Parameters
    ----------
    bias : Tensor
        ``[B, H, N, N]``, finite where both tokens are kept.
    phi_q, phi_k : Tensor
        ``[B, H, N, R]``.
    mask : Tensor, optional
        Bool ``[B, I, N]`` or ``[B, N]``, True = keep. Tokens that no row keeps are padding: they count neither as
        query nor as key.
    table : Tensor, optional
        ``[H, 2 W + 1]``, what is added to the factors by relative position (see
        :class:`~pairformer_fast.kernels.flash_bias.Factors`).

    Returns
    -------
    Certificate
        Computed in fp64.
    """
    residual = torch.baddbmm(
        bias.double().flatten(0, 1), phi_q.double().flatten(0, 1), phi_k.double().mT.flatten(0, 1), alpha=-1
    ).view(bias.shape)
    if table is not None:
        residual -= toeplitz(table.double(), bias.shape[-1])
    keep = None if mask is None else kept_tokens(mask, bias)
    return _ranges(residual, keep)


def _ranges(residual: Tensor, keep: Tensor | None) -> Certificate:
    """Certificate of a residual ``[B, H, N, N]``, ``keep [B, N]``."""
    fill = -residual.shape[-1] % TILE

    def segments(dropped_value: float) -> Tensor:
        table = residual if keep is None else residual.masked_fill(~keep[:, None, None, :], dropped_value)
        return pad(table, (0, fill), value=dropped_value).unflatten(-1, (-1, TILE))

    highest, lowest = segments(-torch.inf).amax(-1), segments(torch.inf).amin(-1)  # [B, H, N, T]
    top, bottom = highest.amax(-1), lowest.amin(-1)
    middle = ((top + bottom) / 2)[..., None]
    eps_row, distance = (top - bottom) / 2, torch.maximum(highest - middle, middle - lowest).clamp(min=0)
    if keep is not None:
        padding = ~keep[:, None, :]
        eps_row, distance = eps_row.masked_fill(padding, 0), distance.masked_fill(padding[..., None], 0)
    return Certificate(eps_row, pad(distance, (0, 0, 0, fill)).unflatten(-2, (-1, TILE)).amax(-2))
