"""PyTorch's scaled_dot_product_attention, with the factors as further columns of q and k.

``softmax(q k^T / sqrt(D) + phi_q phi_k^T) v`` is plain attention of ``[q / sqrt(D), phi_q]`` and ``[k, phi_k]``, which
the flash kernels take because no table of logits is passed. They want one head width for q, k and v, a multiple of 8 on
CUDA: v is padded by zeros. (With a narrower v a CPU leaves the flash kernel for a two to three times slower path.)

A key mask becomes one more column, 1 on the side of q and a large negative number on that of k for dropped keys. It may
differ between rows, never needs an N x M table per row, and leaves rows without any key finite.

A table over offsets, dense tiles or a pair mask have no such form: the bias is then one dense table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pairformer_fast.kernels.flash_bias.terms import BiasTerms

WIDTH_MULTIPLE = 8


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: BiasTerms,
    mask: Tensor | None,
    pair_mask: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """Attention in the dtype of q; arguments in the triangle layout of the api.

    On a CPU the values of the mask choose the cheapest form (none if every key is kept). On other devices only shapes
    do, since reading values there would wait for the device.
    """
    mask = _restricting(mask)
    if terms.table is None and terms.dense_tiles is None and pair_mask is None:
        out = _attend(q, k, v, terms, mask)
    else:
        table = terms.additive(torch.promote_types(q.dtype, torch.float32))
        out = _attend(q, k, v, BiasTerms(dense=_pair_table(table, pair_mask, q.dtype)), mask)
    if pair_mask is not None:
        out = out.masked_fill(~_any_key(mask, pair_mask)[..., None, None], 0)
    elif mask is not None:
        out = out.masked_fill(~mask.any(-1)[:, :, None, None, None], 0)
    return out if gate is None else gate.sigmoid() * out


def _attend(q: Tensor, k: Tensor, v: Tensor, terms: BiasTerms, mask: Tensor | None) -> Tensor:
    batch, rows, _, _, dim = q.shape
    if terms.dense is not None and batch > 1 and rows > 1:
        # One table per batch entry is broadcast over the rows; a batch of tables would have to be copied per row.
        masks = [None] * batch if mask is None else [_restricting(entry) for entry in mask.split(1)]
        entries = zip(q.split(1), k.split(1), v.split(1), terms.dense.split(1), masks, strict=True)
        return torch.cat([_attend(q, k, v, BiasTerms(dense=table), mask) for q, k, v, table, mask in entries])

    columns = []
    # Biases come as permuted views of the pair representation; CUDA's fused kernels want unit strides along the keys.
    table = None if terms.dense is None else terms.dense.contiguous()
    if terms.phi_q is not None and terms.phi_k is not None:
        columns.append((_as_columns(terms.phi_q, rows), _as_columns(terms.phi_k, rows)))
    if mask is not None:
        if table is not None and _same_keys(mask):
            table = table.masked_fill(~mask.any(1)[:, None, None, :], _never(q.dtype))
        elif table is None and not columns:
            table = _penalty(mask, q.dtype).flatten(0, 1)[:, None, None, :]
        else:
            columns.append(_mask_columns(mask, q, k))

    scale = dim**-0.5
    if columns:
        q, k, v = _append(q * scale, k, v, columns)
        scale = 1.0
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=table, scale=scale)
    return out.transpose(1, 2)[..., :dim].unflatten(0, (batch, rows))


def _pair_table(bias: Tensor | None, pair_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Bias and pair mask as one table of ``dtype``, ``[B, H, N, M]`` or ``[B, 1, N, M]``."""
    if pair_mask is None:
        return None if bias is None else bias.to(dtype)
    if bias is None:
        return _penalty(pair_mask, dtype).unsqueeze(1)
    return bias.to(dtype).masked_fill(~pair_mask.unsqueeze(1), _never(dtype))


def _any_key(mask: Tensor | None, pair_mask: Tensor) -> Tensor:
    """Which queries see a key, ``[B, I, N]`` or ``[B, 1, N]``; without an ``N x M`` table per row."""
    if mask is None:
        return pair_mask.any(-1).unsqueeze(1)
    return mask.float() @ pair_mask.float().mT > 0


def _restricting(mask: Tensor | None) -> Tensor | None:
    """The mask, or None where it is cheap to see that every key is kept."""
    return None if mask is None or (mask.device.type == "cpu" and mask.all()) else mask


def _as_columns(phi: Tensor, rows: int) -> Tensor:
    """``[B, H, N, R]`` to a view ``[B, I, N, H, R]``."""
    return phi.transpose(1, 2).unsqueeze(1).expand(-1, rows, -1, -1, -1)


def _mask_columns(mask: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    of_q = q.new_ones(1).expand(*q.shape[:-1], 1)
    return of_q, _penalty(mask, q.dtype)[..., None, None].expand(*k.shape[:-1], 1)


def _append(q: Tensor, k: Tensor, v: Tensor, columns: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    dim = q.shape[-1]
    width = dim + sum(of_q.shape[-1] for of_q, _ in columns)
    filler = q.new_zeros(1)
    q = torch.cat([q, *(of_q for of_q, _ in columns), filler.expand(*q.shape[:-1], -width % WIDTH_MULTIPLE)], dim=-1)
    k = torch.cat([k, *(of_k for _, of_k in columns), filler.expand(*k.shape[:-1], -width % WIDTH_MULTIPLE)], dim=-1)
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
