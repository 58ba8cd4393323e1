"""What the checks of every host hold accelerated models against."""

import torch
from torch import nn

from pairformer_fast import AttentionConfig

DENSE = AttentionConfig(bias="dense")


def full_rank(n: int) -> AttentionConfig:
    return AttentionConfig(bias="svd", rank=n)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, relative to what is expected."""
    return float(((found - expected).norm() / expected.norm()).detach())


def attention_around_a_node(module: nn.Module, z: torch.Tensor, ending: bool) -> torch.Tensor:
    """AlphaFold 2's Algorithms 13 and 14 as they are written, with b_jk and b_ki; z ``[N, N, C]``."""
    heads, mha = module.no_heads, module.mha
    z = module.layer_norm(z)
    q, k, v, g = (getattr(mha, f"linear_{x}")(z).unflatten(-1, (heads, -1)) for x in "qkvg")
    b, scale = module.linear(z), q.shape[-1] ** -0.5
    if ending:
        logits = torch.einsum("ijhc,kjhc->ijkh", q, k) * scale + b.transpose(0, 1)[:, None]
        attended = torch.einsum("ijkh,kjhc->ijhc", logits.softmax(2), v)
    else:
        logits = torch.einsum("ijhc,ikhc->ijkh", q, k) * scale + b[None]
        attended = torch.einsum("ijkh,ikhc->ijhc", logits.softmax(2), v)
    return mha.linear_o((attended * g.sigmoid()).flatten(-2))
