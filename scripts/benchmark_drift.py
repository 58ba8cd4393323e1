"""How the error of bf16 grows over a stack of Pairformer blocks, with our kernels and with plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from benchmark_block_problem import PRODUCTION, random_weights
from benchmark_rows import machine
from torch import Tensor

from pairformer_fast.bias import set_attention
from pairformer_fast.config import AttentionConfig, BiasMethod
from pairformer_fast.model.pairformer import PairformerBlock

WAYS = {
    "pairformer_fast dense": AttentionConfig(bias=BiasMethod.DENSE),
    "plain PyTorch": AttentionConfig.reference(),
}


@torch.no_grad()
def drift_rows(tokens: int, blocks: int, device: torch.device, commit: str | None) -> list[dict[str, Any]]:
    """Rows with the relative errors of s and z after each block, in bf16, against plain PyTorch in fp32.

    Every block has weights of its own; they are rounded to bf16 for the fp32 run too, so that only the computation
    differs.
    """
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(1, tokens, PRODUCTION.c_s, generator=generator).to(device)
    z = torch.randn(1, tokens, tokens, PRODUCTION.c_z, generator=generator).to(device)
    mask = torch.ones(1, tokens, dtype=torch.bool, device=device)
    masks = mask, mask[:, :, None] & mask[:, None, :]
    exact, rounded = (PairformerBlock(PRODUCTION).eval().to(device) for _ in range(2))
    rounded.to(torch.bfloat16)
    true: tuple[Tensor, Tensor] = s, z
    found = {name: (s.bfloat16(), z.bfloat16()) for name in WAYS}
    rows, origin = [], machine(commit)
    for index in range(blocks):
        rounded.load_state_dict(random_weights(PRODUCTION, seed=index))
        exact.load_state_dict(rounded.state_dict())
        true = exact(*true, *masks)
        for name, config in WAYS.items():
            set_attention(rounded, config)
            found[name] = rounded(*found[name], *masks)
            errors = [_relative(x, y) for x, y in zip(found[name], true, strict=True)]
            row = {"suite": "drift", "op": "pairformer_stack", "impl": name, "direction": "fwd", "n": tokens}
            row |= {"batch": 1, "dtype": "bfloat16", "block": index + 1, "rel_error": max(errors)}
            rows.append({**row, "error_s": errors[0], "error_z": errors[1], **origin})
    return rows


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())
