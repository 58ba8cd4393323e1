"""PyTorch's scaled_dot_product_attention, with the factors as further columns of q and k.

``softmax(q k^T / sqrt(D) + phi_q phi_k^T) v`` is plain attention of ``[q / sqrt(D), phi_q]`` and ``[k, phi_k]``, which
the flash kernels take because no table of logits is passed. They want one head width for q, k and v, a multiple of 8 on
CUDA: v is padded by zeros. (With a narrower v a CPU leaves the flash kernel for a two to three times slower path.)

A key mask becomes one more column, 1 on the side of q and a large negative number on that of k for dropped keys. It may
differ between rows, never needs an N x N table per row, and leaves rows without any key finite.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH_MULTIPLE = 8


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, factors: tuple[Tensor, Tensor] | None, mask: Tensor | None
) -> Tensor:
    """Attention in the dtype of q; arguments in the triangle layout of the api.

    On a CPU the values of the mask choose the cheapest form (none if every key is kept). On other devices only shapes
    do, since reading values there would wait for the device.
    """
    batch, rows, _, _, dim = q.shape
    if bias is not None and batch > 1 and rows > 1:
        # One table per batch entry is broadcast over the rows; a batch of tables would have to be copied per row.
        masks = [None] * batch if mask is None else mask.split(1)
        entries = zip(q.split(1), k.split(1), v.split(1), bias.split(1), masks, strict=True)
        return torch.cat([attention(q, k, v, bias, None, mask) for q, k, v, bias, mask in entries])
    if mask is not None and mask.device.type == "cpu" and mask.all():
        mask = None

    columns = []
    # Biases come as permuted views of the pair representation; CUDA's fused kernels want unit strides along the keys.
    table = None if bias is None else bias.contiguous()
    if factors is not None:
        phi_q, phi_k = factors
        columns.append((_as_columns(phi_q, rows), _as_columns(phi_k, rows)))
    if mask is not None:
        if table is not None and _same_keys(mask):
            table = table.masked_fill(~mask.any(1)[:, None, None, :], _never(q.dtype))
        elif table is None and factors is None:
            table = _penalty(mask, q.dtype).flatten(0, 1)[:, None, None, :]
        else:
            columns.append(_mask_columns(mask, q))

    scale = dim**-0.5
    if columns:
        q, k, v = _append(q * scale, k, v, columns)
        scale = 1.0
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=table, scale=scale)
    out = out.transpose(1, 2)[..., :dim].unflatten(0, (batch, rows))
    return out if mask is None else out.masked_fill(~mask.any(-1)[:, :, None, None, None], 0)


def _as_columns(phi: Tensor, rows: int) -> Tensor:
    """``[B, H, N, R]`` to a view ``[B, I, N, H, R]``."""
    return phi.transpose(1, 2).unsqueeze(1).expand(-1, rows, -1, -1, -1)


def _mask_columns(mask: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:-1], 1)
    return q.new_ones(1).expand(shape), _penalty(mask, q.dtype)[..., None, None].expand(shape)


def _append(q: Tensor, k: Tensor, v: Tensor, columns: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    dim = q.shape[-1]
    width = dim + sum(of_q.shape[-1] for of_q, _ in columns)
    filler = q.new_zeros(1).expand(*q.shape[:-1], -width % WIDTH_MULTIPLE)
    q = torch.cat([q, *(of_q for of_q, _ in columns), filler], dim=-1)
    k = torch.cat([k, *(of_k for _, of_k in columns), filler], dim=-1)
    return q, k, F.pad(v, (0, q.shape[-1] - dim))


def _same_keys(mask: Tensor) -> bool:
    """Whether all rows that keep any key keep the same keys, as in a padded batch."""
    if mask.shape[1] == 1:
        return True
    if mask.device.type != "cpu":
        return False
    return bool(((mask == mask.any(1, keepdim=True)) | ~mask.any(-1, keepdim=True)).all())


def _penalty(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, _never(dtype))


def _never(dtype: torch.dtype) -> float:
    """Logit whose exponential is zero beside any other, finite in ``dtype`` even after a dot product."""
    return -3e4 if dtype == torch.float16 else -1e30
