"""Triangle attention of packages whose bias around the ending node is b[k, i], as in AlphaFold 2: Boltz, Protenix."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pairformer_fast.bias import PairBiasAttention
from pairformer_fast.config import Backend
from pairformer_fast.model.attention import TriangleUpdate


class NamedAsInOpenFold3:
    """A host's triangle attention, whose ``linear`` projects the pair bias, under the name that updates here read."""

    linear: nn.Module

    @property
    def linear_z(self) -> nn.Module:
        """Projection of the pair bias."""
        return self.linear


def attend_triangles(
    module: Any, z: Tensor, keep: Tensor, dropout: Tensor | None, *, ending: bool, out: Tensor | None, backend: Backend
) -> Tensor:
    """Pair representation after triangle attention: ``z`` plus its update.

    Around the ending node all is done on the transposed pair representation, its bias included: query j and key k of
    column i see b[k, j], as in AlphaFold 2, not b[j, k] as in AlphaFold 3. Transposed views are used, not copies.

    Parameters
    ----------
    module : nn.Module
        As :class:`~pairformer_fast.model.attention.TriangleUpdate` has it.
    z : Tensor
        ``[B, N, N, C_z]``.
    keep : Tensor
        Bool ``[B, N, N]``, True for keys to keep.
    dropout : Tensor, optional
        ``[B, N or 1, N or 1, C_z or 1]``, multiplies the update.
    ending : bool
        Attend around the ending node.
    out : Tensor, optional
        Where to write, such as z itself; without gradients only.
    backend : Backend

    Returns
    -------
    Tensor
        ``[B, N, N, C_z]``, or ``out``.
    """
    update = TriangleUpdate(module, False, backend)
    if not ending:
        return update(z, keep, dropout, out)
    dropout, out = (None if x is None else x.transpose(1, 2) for x in (dropout, out))
    return update(z.transpose(1, 2), keep.transpose(1, 2), dropout, out).transpose(1, 2)


def attend_rows(
    core: PairBiasAttention, q: Tensor, k: Tensor, v: Tensor, pair_bias: Tensor, mask_bias: Tensor
) -> Tensor:
    """Attention alone, with the shapes of a host.

    Parameters
    ----------
    core : PairBiasAttention
    q, k, v : Tensor
        ``[*, I, H, N, D]``, q not scaled.
    pair_bias : Tensor
        ``[*, 1, H, N, N]``.
    mask_bias : Tensor
        ``[*, I, 1, 1, N]``, 0 for keys to keep.

    Returns
    -------
    Tensor
        ``[*, I, N, H, D]``.
    """
    *batch, rows, heads, tokens, dim = q.shape
    bias = pair_bias.squeeze(-4).to(q.dtype).reshape(-1, heads, tokens, tokens)
    keep = (mask_bias == 0)[..., 0, 0, :].expand(*batch, rows, tokens).reshape(-1, rows, tokens)
    q, k, v = (x.transpose(-2, -3).reshape(-1, rows, tokens, heads, dim) for x in (q, k, v))
    return core(q, k, v, bias, keep).reshape(*batch, rows, tokens, heads, dim)
