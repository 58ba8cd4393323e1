"""Biases with a known structure: closed forms that factors reproduce exactly, and the part of relative position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pairformer_fast.bias.certificate import kept_pairs, kept_tokens
from pairformer_fast.bias.toeplitz import relative_index, toeplitz
from pairformer_fast.kernels.flash_bias import Factors

NULL_SPACE = 1e-10
"""Eigenvalues of the normal equations below this share of the largest count as zero: the constant always is one."""


def alibi(slopes: Tensor, tokens: int, batch: int = 1) -> Factors:
    """Factors of rank 2 for a bias that is linear in the relative position, ``slopes[h] * (i - j)``.

    Parameters
    ----------
    slopes : Tensor
        ``[H]``, floating point.
    tokens : int
        Number of tokens N.
    batch : int
        Number of batch entries B; the factors are one tensor expanded over them.

    Returns
    -------
    Factors
        ``[B, H, N, 2]``, dtype of ``slopes``. Positions count from the middle token: they are exact in bf16 up to
        N = 512, in fp16 up to 4096.

    Notes
    -----
    Source: ALiBi (Press et al., ICLR 2022), whose bias of causal attention, ``-m * (i - j)``, is ``slopes = -m``;
    FlashBias (Wu et al., NeurIPS 2025, arXiv 2505.12044), example of an exact decomposition. The distance
    ``|i - j|`` of attention in both directions is not of low rank: give the kernel a table instead.
    """
    if slopes.ndim != 1 or not slopes.is_floating_point():
        raise ValueError(f"slopes must be floating point [H], but got {slopes.dtype} of shape {list(slopes.shape)}")
    position = torch.arange(tokens, device=slopes.device) - tokens // 2
    scaled = slopes[:, None] * position.to(slopes.dtype)
    return _expanded(outer_sum(scaled[None], -scaled[None]), batch)


def outer_sum(of_query: Tensor, of_key: Tensor) -> Factors:
    """Factors of rank 2 for ``of_query[b, h, i] + of_key[b, h, j]``.

    Parameters
    ----------
    of_query, of_key : Tensor
        ``[B, H, N]`` and ``[B, H, M]``. Softmax ignores the first, which is kept for exactness.

    Returns
    -------
    Factors
        ``[B, H, N, 2]`` and ``[B, H, M, 2]``.
    """
    phi_q = torch.stack([of_query, torch.ones_like(of_query)], dim=-1)
    return Factors(phi_q, torch.stack([torch.ones_like(of_key), of_key], dim=-1))


def inner_product(of_query: Tensor, of_key: Tensor, weight: Tensor | None = None) -> Factors:
    """Factors of rank C for the product of per-token features, ``sum_c of_query[.., i, c] of_key[.., j, c]``.

    Parameters
    ----------
    of_query, of_key : Tensor
        ``[B, H, N, C]`` and ``[B, H, M, C]``; with ``weight`` also ``[B, N, C]`` and ``[B, M, C]``, the same features
        for all heads.
    weight : Tensor, optional
        ``[H]`` or, for each channel, ``[H, C]``.

    Returns
    -------
    Factors
        ``[B, H, N, C]`` and ``[B, H, M, C]``.
    """
    if weight is None:
        return Factors(of_query, of_key)
    weight = weight[:, None, None] if weight.ndim == 1 else weight[:, None, :]
    of_query, of_key = (x.unsqueeze(1) if x.ndim == 3 else x for x in (of_query, of_key))
    phi_q = of_query * weight
    return Factors(phi_q, of_key.expand(-1, weight.shape[0], -1, -1))


def squared_distance(points: Tensor, weight: Tensor, mask: Tensor | None = None) -> Factors:
    """Factors of rank C + 2 for ``weight[h] * |points[b, i] - points[b, j]|^2``.

    ``|x - y|^2 = |x|^2 + |y|^2 - 2 x . y``, with the points around their centre, so that little cancels.

    Parameters
    ----------
    points : Tensor
        ``[B, N, C]`` in Å, floating point.
    weight : Tensor
        ``[H]`` in 1/Å^2; negative where close tokens should attend to one another.
    mask : Tensor, optional
        Bool ``[B, N]``, True = keep. Points of the others may be NaN; their factors are zero.

    Returns
    -------
    Factors
        ``[B, H, N, C + 2]``, dtype of ``points``.

    Notes
    -----
    Source: FlashBias (Wu et al., NeurIPS 2025, arXiv 2505.12044), spatial distances as an exact decomposition; the
    term of squared distances in invariant point attention (AF2 Algorithm 22, line 7) has this form.
    """
    if points.ndim != 3 or weight.ndim != 1:
        raise ValueError(
            f"points must be [B, N, C] and weight [H], but got {list(points.shape)} and {list(weight.shape)}"
        )
    keep = torch.ones_like(points[..., 0], dtype=torch.bool) if mask is None else mask
    points = points.masked_fill(~keep[..., None], 0)
    centre = points.sum(1, keepdim=True) / keep.sum(1).clamp(min=1)[:, None, None]
    points = (points - centre).masked_fill(~keep[..., None], 0)
    square = points.square().sum(-1, keepdim=True)
    one = keep[..., None].to(points.dtype)
    phi_q = torch.cat([square, one, -2 * points], dim=-1).unsqueeze(1) * weight[:, None, None].to(points.dtype)
    phi_k = torch.cat([one, square, points], dim=-1).unsqueeze(1).expand_as(phi_q)
    return Factors(phi_q, phi_k)


def added(*parts: Factors) -> Factors:
    """Factors of the sum of biases: ranks add up.

    Parameters
    ----------
    *parts : Factors
        Of the same tokens and heads, without tables and dense tiles.
    """
    if any(part.table is not None or part.dense is not None for part in parts):
        raise ValueError("parts of a sum must have neither a table nor dense tiles; add these to the result")
    return Factors(torch.cat([part.phi_q for part in parts], -1), torch.cat([part.phi_k for part in parts], -1))


class RelativePosition(NamedTuple):
    """A bias in two parts, ``bias = table[h, clip(i - j, -W, W) + W] + rest`` up to rounding.

    Attributes
    ----------
    table : Tensor
        ``[H, 2 W + 1]``, fp32 (fp64 for an fp64 bias), one for all batch entries, as the kernels take it.
    rest : Tensor
        ``[B, H, N, N]``, dtype of the bias; zero where one of the tokens is padding.
    """

    table: Tensor
    rest: Tensor


@torch.no_grad()
def relative_position(bias: Tensor, width: int, mask: Tensor | None = None) -> RelativePosition:
    r"""Split off what depends on the relative position alone.

    The table t and constants c of the rows minimise \sum_bij (bias_bij - t_clip(i - j) - c_bi)^2 of each head over
    kept tokens: softmax ignores c, so what a row has in common must not end up in the table. Eliminating c leaves
    normal equations of size 2 W + 1, the same for all heads; of their solutions (t is defined up to a constant) the
    shortest is taken. Offsets that do not occur get zero.

    Parameters
    ----------
    bias : Tensor
        ``[B, H, N, N]``, finite where both tokens are kept.
    width : int
        Largest relative position W with an entry of its own; 32 in AF3's encoding (Algorithm 3).
    mask : Tensor, optional
        Bool ``[B, I, N]`` or ``[B, N]``, True = keep. Tokens that no row keeps are padding.
    """
    if width < 0:
        raise ValueError(f"width must be 0 or more, but got {width}")
    keep = kept_tokens(mask, bias)
    pairs = kept_pairs(keep)
    table = bias.double().masked_fill(~pairs, 0)
    count = keep.sum(-1).clamp(min=1)[:, None, None]
    centred = (table - table.sum(-1, keepdim=True) / count.unsqueeze(1)).masked_fill(~pairs, 0)

    index = relative_index(bias.shape[-1], width, bias.device)
    occurrences = table.new_zeros(bias.shape[0], bias.shape[-1], 2 * width + 1)
    occurrences.scatter_add_(2, index.expand(bias.shape[0], -1, -1), pairs[:, 0].double())
    shared = torch.einsum("bio,bip->op", occurrences / count, occurrences)
    normal = occurrences.sum((0, 1)).diag() - shared
    solution = _sums_by_offset(centred.sum(0), width) @ torch.linalg.pinv(normal, rtol=NULL_SPACE, hermitian=True)

    relative = solution.to(torch.promote_types(bias.dtype, torch.float32))
    rest = (table - toeplitz(relative.double(), bias.shape[-1])).masked_fill(~pairs, 0)
    return RelativePosition(relative, rest.to(bias.dtype))


def _sums_by_offset(table: Tensor, width: int) -> Tensor:
    """``[H, 2 W + 1]`` sums of ``table [H, N, N]`` over equal clipped i - j, always in the same order.

    Mirrored, padded to rows of 2 N and read again in rows of 2 N - 1, every diagonal becomes a column.
    """
    tokens = table.shape[-1]
    skewed = pad(table.flip(-1), (0, tokens)).flatten(1)[:, : tokens * (2 * tokens - 1)]
    sums = skewed.view(-1, tokens, 2 * tokens - 1).sum(1)
    beyond = tokens - 1 - width
    if beyond <= 0:
        return pad(sums, (-beyond, -beyond))
    inner = sums[:, beyond:-beyond].clone()
    inner[:, 0] += sums[:, :beyond].sum(-1)
    inner[:, -1] += sums[:, -beyond:].sum(-1)
    return inner


def _expanded(factors: Factors, batch: int) -> Factors:
    return Factors(factors.phi_q.expand(batch, -1, -1, -1), factors.phi_k.expand(batch, -1, -1, -1))
