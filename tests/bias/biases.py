"""Biases and weights shared by the tests of this folder."""

import torch
from torch import Tensor

KINDS = ["random", "banded", "block_sparse", "rank_deficient", "huge", "constant", "constant_rows"]


def make_bias(kind: str, batch: int, heads: int, tokens: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    shape = (batch, heads, tokens, tokens)
    index = torch.arange(tokens)
    match kind:
        case "random":
            bias = draw(*shape)
        case "banded":
            bias = draw(batch, heads, 1, 1) * 5 * ((index[:, None] - index).abs() <= 2)
        case "block_sparse":
            bias = 4 * draw(*shape) * (((index[:, None] // 4) * 7 + index // 4) % 3 == 0)
        case "rank_deficient":
            bias = draw(batch, heads, tokens, 2) @ draw(batch, heads, 2, tokens)
        case "huge":
            bias = draw(*shape) * 1e4
        case "constant":
            bias = torch.full(shape, 1234.5)
        case "constant_rows":
            bias = (100 * draw(batch, heads, tokens, 1)).expand(shape).clone()
    return bias.to(dtype)


def make_qkv(*shape: int, seed: int = 1, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator).to(dtype) for _ in range(3))


def attention_weights(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Weights ``[B, I, H, N, N]`` in fp64 of the triangle layout, zero where masked."""
    logits = torch.einsum("binhd,bimhd->bihnm", q.double(), k.double()) * q.shape[-1] ** -0.5
    dropped = ~mask[:, :, None, None, :]
    logits = (logits + bias.double()[:, None]).masked_fill(dropped, -torch.inf)
    return logits.softmax(-1).masked_fill(dropped, 0)


def total_variation(q: Tensor, k: Tensor, bias: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """``[B, I, H, N]``."""
    return (attention_weights(q, k, bias, mask) - attention_weights(q, k, other, mask)).abs().sum(-1) / 2
