"""Backward pass: edges and product are made again, then Triton between products by cuBLAS, a chunk of rows at a time.

With ``P`` the padded tokens (``triton_forward.py``), and C_hidden no more than C, it holds at most 7 tensors of
``P x P x C`` in the dtype of the products at N = 640 and above: both edges, their product, the gradient of the gate,
1/2 of an edge, and what a chunk needs. Once the edges are done with, the gradient of z takes their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
from torch import Tensor

from pairformer_fast.config import Backend
from pairformer_fast.kernels.launching import on_device, padded, precision, tf32
from pairformer_fast.kernels.layer_norm import layer_norm_backward
from pairformer_fast.kernels.triangle_multiplication.parameters import TriangleWeights
from pairformer_fast.kernels.triangle_multiplication.triton_backward_kernels import (
    edges_backward_kernel,
    update_backward_kernel,
)
from pairformer_fast.kernels.triangle_multiplication.triton_common import Tiles, aligned
from pairformer_fast.kernels.triangle_multiplication.triton_forward import multiply, project
from pairformer_fast.kernels.weight_gradient import WeightGradient

STACKED = ("a", "a_gate", "b", "b_gate", "gate")
"""Weights of the projections of the normalised z, in the order in which their gradients lie side by side."""

CHUNKS = 2
"""Parts of the rows, and of the channels, that are worked on one after the other."""

CHUNK_TOKENS = 65536
"""Pairs of tokens of the smallest chunk, enough for every multiprocessor."""

SHARES = 32
"""Parts of a chunk whose products are summed apart; divides the tokens of every chunk."""


def update_tiles(channels: int, hidden: int, dtype: torch.dtype) -> Tiles:
    """Tiles of ``update_backward_kernel``."""
    if tf32(dtype) and max(channels, hidden) <= 128:
        return Tiles(32, 32, 4, 1)
    if dtype == torch.float32:
        return Tiles(32, 16, 8, 1)
    return Tiles(64 if max(channels, hidden) <= 128 else 32, min(64, padded(channels)), 8, 1)


def edges_tiles(hidden: int, dtype: torch.dtype) -> Tiles:
    """Tiles of ``edges_backward_kernel``."""
    if tf32(dtype) and hidden <= 128:
        return Tiles(64, 64, 4, 1)
    if dtype == torch.float32:
        return Tiles(32, 16, 8, 1)
    return Tiles(64, min(64, padded(hidden)), 8, 1)


def update_backward(
    dy: Tensor,
    z: Tensor,
    product: Tensor,
    weights: TriangleWeights,
    dropout: Tensor | None,
    dgate: Tensor,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn rows of the product of one batch entry into its gradient.

    Parameters
    ----------
    dy, z, dropout : Tensor
        ``[R, N, C]``.
    product : Tensor
        ``[C_hidden, >= R, P]``, rows of planes.
    dgate : Tensor
        ``[>= R, P, C]``, contiguous, filled with the gradient of the gate before its sigmoid.

    Returns
    -------
    dupdate, normalised : Tensor
        ``[tokens, C]`` gradient of the output projection, and ``[tokens, C_hidden]`` its input.
    dnorm : Tensor
        fp32 ``[2, programs, C_hidden]``: shares of the gradients of weight and bias of ``norm_out``.
    """
    rows, tokens, channels = z.shape
    hidden, padded_rows, size = product.shape
    tiles = tiles or update_tiles(channels, hidden, product.dtype)
    count = padded_rows * size
    blocks = triton.cdiv(count, tiles.tokens)
    dupdate, normalised = (product.new_empty(count, width) for width in (channels, hidden))
    shares = torch.empty(2, blocks, hidden, dtype=torch.float32, device=z.device)
    norm_in, norm_out = weights.norm_in, weights.norm_out
    with on_device(z):
        update_backward_kernel[(blocks,)](
            dy,
            *dy.stride()[:2],
            z,
            *z.stride()[:2],
            product,
            product.stride(0),
            dropout,
            *((0, 0, 0) if dropout is None else dropout.stride()),
            dgate,
            dupdate,
            normalised,
            shares,
            norm_in.weight,
            norm_in.bias,
            norm_out.weight,
            norm_out.bias,
            weights.out,
            weights.gate,
            weights.offsets,
            rows,
            tokens,
            size,
            count,
            C=channels,
            H=hidden,
            BLOCK_C=padded(channels),
            BLOCK_H=padded(hidden),
            BLOCK_O=tiles.channels,
            BLOCK_T=tiles.tokens,
            EPS_IN=norm_in.eps,
            EPS_OUT=norm_out.eps,
            HAS_BIAS_IN=norm_in.bias is not None,
            HAS_BIAS_OUT=norm_out.bias is not None,
            PRECISION=precision(product.dtype),
            STAGES=tiles.stages,
            num_warps=tiles.warps,
        )
    return dupdate, normalised, shares


def edges_backward(
    z: Tensor,
    mask: Tensor,
    weights: TriangleWeights,
    da: Tensor,
    db: Tensor,
    dgate: Tensor,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalised rows ``z [R, N, C]`` of one batch entry and the gradients of their projections.

    ``da``, ``db`` are ``[C_hidden, >= R, P]``, ``dgate`` is that of :func:`update_backward`. Returns ``[tokens, C]``
    and ``[tokens, 4 C_hidden + C]``, for a, a_gate, b, b_gate and gate.
    """
    rows, tokens, channels = z.shape
    hidden, padded_rows, size = da.shape
    tiles = tiles or edges_tiles(hidden, da.dtype)
    count = padded_rows * size
    x, gradients = (da.new_empty(count, width) for width in (channels, 4 * hidden + channels))
    flags, norm = mask.view(torch.uint8), weights.norm_in
    with on_device(z):
        edges_backward_kernel[(triton.cdiv(count, tiles.tokens),)](
            z,
            *z.stride()[:2],
            flags,
            *flags.stride(),
            norm.weight,
            norm.bias,
            weights.a,
            weights.a_gate,
            weights.b,
            weights.b_gate,
            weights.offsets,
            da,
            db,
            da.stride(0),
            dgate,
            x,
            gradients,
            rows,
            tokens,
            size,
            count,
            C=channels,
            H=hidden,
            BLOCK_C=padded(channels),
            BLOCK_O=tiles.channels,
            BLOCK_T=tiles.tokens,
            EPS=norm.eps,
            HAS_BIAS=norm.bias is not None,
            PRECISION=precision(da.dtype),
            STAGES=tiles.stages,
            num_warps=tiles.warps,
        )
    return x, gradients


def edge_gradients(dproduct: Tensor, room: Tensor, b: Tensor, incoming: bool) -> None:
    """Replace both edges by their gradients, some channels at a time.

    ``dproduct`` and ``b`` are planes ``[B C_hidden, P, P]``; ``room`` has more of them, of which the last hold a. The
    gradient of a fills the first, always over channels of a that are no longer needed.
    """
    planes = b.shape[0]
    step = room.shape[0] - planes
    for start in range(0, planes, step):
        stop = min(planes, start + step)
        d, a, da, other = dproduct[start:stop], room[start + step : stop + step], room[start:stop], b[start:stop]
        if incoming:
            torch.bmm(other, d.mT, out=da)
            torch.bmm(a, d, out=other)
        else:
            torch.bmm(d, other, out=da)
            torch.bmm(d.mT, a, out=other)


def backward(
    dy: Tensor,
    z: Tensor,
    mask: Tensor,
    weights: TriangleWeights,
    dropout: Tensor | None,
    incoming: bool,
    residual: bool,
    compute: torch.dtype,
) -> dict[str, Tensor]:
    """Gradients by the names of ``operator.DIFFERENTIABLE``: that of z in its dtype, the others in fp32."""
    batch, tokens, _, channels = z.shape
    hidden, size = weights.a.shape[0], aligned(tokens)
    shape = batch, hidden, size, size
    stacked = torch.cat([getattr(weights, name).to(compute) for name in STACKED])
    sizes = [hidden] * 4 + [channels]
    matrices = dict(zip(STACKED, stacked.split(sizes), strict=True)) | {"out": weights.out.to(compute).contiguous()}
    cast = replace(weights, **matrices)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    scale = None if dropout is None else dropout.expand(z.shape)

    with torch.autocast(z.device.type, enabled=False):
        room = z.new_empty(batch * hidden + triton.cdiv(batch * hidden, CHUNKS), size, size, dtype=compute)
        a, b = room[-batch * hidden :].view(shape), z.new_empty(shape, dtype=compute)
        project(z, mask, cast, a, b)
        product = multiply(a, b, incoming, 0, size)
        # Holds the gradient of the gate first, and then, chunk by chunk, that of the normalised z.
        dx = z.new_empty(batch, size, size, channels, dtype=compute)
        dout, dnorm_out, doffset = _through_update(dy, z, product, cast, scale, dx)
        edge_gradients(product.view(-1, size, size), room, b.view(-1, size, size), incoming)
        del product
        dstacked, doffsets = _through_edges(z, mask, cast, stacked, room[: batch * hidden].view(shape), b, dx)
        del room, a, b
        dx = dx[:, :tokens, :tokens]
        dz, *dnorm_in = layer_norm_backward(z, weights.norm_in, dx, dy if residual else None, backend=Backend.TRITON)
    gradients = {"z": dz, "out": dout}
    gradients |= {name: x.clone() for name, x in zip(STACKED, dstacked.split(sizes), strict=True)}
    for name, pair in (("norm_in", dnorm_in), ("norm_out", dnorm_out)):
        gradients |= {f"{name}_weight": pair[0].clone(), f"{name}_bias": pair[1].clone()}
    if weights.offsets is not None:
        gradients["offsets"] = torch.cat([torch.stack(sums).sum(0) for sums in (doffsets, doffset)])
    return gradients


def _through_update(
    dy: Tensor, z: Tensor, product: Tensor, weights: TriangleWeights, dropout: Tensor | None, dgate: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of ``out``, of both parameters of ``norm_out``, and shares ``[C]`` of that of the offset, if there are.

    The rest as :func:`update_backward`.
    """
    channels, hidden = weights.out.shape
    dout = WeightGradient(channels, hidden, SHARES, z.device)
    dnorm_out, doffset = [], []
    for i, rows, padded_rows in _chunks(z, product):
        scale = None if dropout is None else dropout[i, rows]
        dupdate, normalised, dnorm = update_backward(
            dy[i, rows], z[i, rows], product[i, :, padded_rows], weights, scale, dgate[i, padded_rows]
        )
        dout.add(dupdate, normalised)
        dnorm_out.append(dnorm)
        if weights.offsets is not None:
            doffset.append(dupdate.sum(0, dtype=torch.float32))
    return dout.total(), torch.cat(dnorm_out, 1).sum(1), doffset


def _through_edges(
    z: Tensor, mask: Tensor, weights: TriangleWeights, stacked: Tensor, da: Tensor, db: Tensor, dx: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of the ``stacked`` weights, and shares ``[4 C_hidden + C]`` of that of their offsets, if there are.

    ``dx`` is the gradient of the gate and becomes that of the normalised z.
    """
    dstacked = WeightGradient(len(stacked), z.shape[-1], SHARES, z.device)
    doffsets = []
    for i, rows, padded_rows in _chunks(z, da):
        planes = da[i, :, padded_rows], db[i, :, padded_rows]
        x, gradients = edges_backward(z[i, rows], mask[i, rows], weights, *planes, dx[i, padded_rows])
        dstacked.add(gradients, x)
        if weights.offsets is not None:
            doffsets.append(gradients.sum(0, dtype=torch.float32))
        torch.mm(gradients, stacked, out=dx[i, padded_rows].view(-1, z.shape[-1]))
    return dstacked.total(), doffsets


def _chunks(z: Tensor, planes: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Batch entry, rows of z, and rows of planes of each chunk."""
    tokens, size = z.shape[1], planes.shape[-1]
    step = min(size, aligned(max(triton.cdiv(size, CHUNKS), CHUNK_TOKENS // size)))
    for i in range(z.shape[0]):
        for start in range(0, size, step):
            yield i, slice(start, min(tokens, start + step)), slice(start, min(size, start + step))
