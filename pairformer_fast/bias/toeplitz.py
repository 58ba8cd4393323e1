"""Tables over clipped relative positions, in the convention of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_index(tokens: int, width: int, device: torch.device) -> Tensor:
    """``[N, N]`` int64, ``clip(i - j, -W, W) + W``: the column of a table ``[H, 2 W + 1]`` that holds for i and j."""
    position = torch.arange(tokens, device=device)
    return (position[:, None] - position).clamp(-width, width) + width


def toeplitz(table: Tensor, tokens: int) -> Tensor:
    """``[H, N, N]``, what a table ``[H, 2 W + 1]`` adds to the bias; dtype of the table."""
    return table[:, relative_index(tokens, table.shape[-1] // 2, table.device)]
