"""The block on a GPU in bf16 and fp32, at production's widths and others, against fp64."""

from dataclasses import replace

import pytest
import torch

from pairformer_fast.bias import set_attention
from pairformer_fast.config import AttentionConfig, Backend, PairformerConfig
from pairformer_fast.model.pairformer import PairformerBlock
from tests.model.test_pairformer import NO_GRADIENT, randomised

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA GPU here: run `make gpu-test` where there is one"
    ),
]

PRODUCTION = PairformerConfig(no_blocks=1)
WIDTHS = [
    pytest.param({}, torch.float32, id="4 x 32, C_z 128, fp32"),
    pytest.param({}, torch.bfloat16, id="4 x 32, C_z 128, bf16"),
    pytest.param({"c_z": 64, "c_hidden_mul": 64, "c_hidden_pair_att": 16}, torch.bfloat16, id="4 x 16, C_z 64, bf16"),
    pytest.param({"c_z": 256, "no_heads_pair": 8}, torch.bfloat16, id="8 x 32, C_z 256, bf16"),
]
NOISE = 2.0
"""Error of ours in units of that of plain PyTorch in the same dtype."""


def run(block: PairformerBlock, given: tuple[torch.Tensor, ...], compute: torch.dtype, backend: Backend) -> dict:
    """Results and gradients of a masked problem with products in ``compute``."""
    s, z, mask, pair_mask = given
    set_attention(block, AttentionConfig(backend=backend, bias="dense"))
    leaves = [s.clone().requires_grad_(), z.clone().requires_grad_(), *block.parameters()]
    with torch.autocast("cuda", torch.bfloat16, enabled=compute == torch.bfloat16):
        out_s, out_z = block(leaves[0], leaves[1], mask, pair_mask)
    loss = (out_s * mask[..., None]).sin().sum() + (out_z * pair_mask[..., None]).sin().sum()
    names = ["ds", "dz", *(name for name, _ in block.named_parameters())]
    found = dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))
    return found | {"s": out_s.detach() * mask[..., None], "z": out_z.detach() * pair_mask[..., None]}


def problem(config: PairformerConfig, tokens: int, batch: int) -> tuple[torch.Tensor, ...]:
    """s, z and masks with holes; the last of several entries ends in padding."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    s = torch.randn(batch, tokens, config.c_s, generator=generator, device="cuda")
    z = torch.randn(batch, tokens, tokens, config.c_z, generator=generator, device="cuda")
    mask = torch.rand(batch, tokens, generator=generator, device="cuda") < 0.85
    mask[-1, tokens - tokens // 4 :] = False
    mask[:, 0] = True
    return s, z, mask, mask[:, :, None] & mask[:, None, :]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize(("widths", "compute"), WIDTHS)
@pytest.mark.parametrize(("tokens", "batch"), [(1, 2), (7, 1), (33, 3), (100, 2), (257, 1)])
def test_masked_block_is_as_exact_as_plain_pytorch(widths, tokens, batch, compute):
    config = PRODUCTION.model_copy(update=widths)
    block = randomised(PairformerBlock(config))
    given = problem(config, tokens, batch)
    ours, plain = (run(block, given, compute, backend) for backend in (Backend.TRITON, Backend.REFERENCE))
    s, z, *masks = given
    exact = run(block.double(), (s.double(), z.double(), *masks), torch.float64, Backend.REFERENCE)
    largest = max(float(gradient.norm()) for name, gradient in exact.items() if name.startswith("d"))
    for name, expected in exact.items():
        if name == NO_GRADIENT or float(expected.norm()) < 1e-6 * largest:
            continue
        floor = 1e-6 if compute == torch.float32 else 2e-3
        assert error(ours[name], expected) < NOISE * error(plain[name], expected) + floor, name


@pytest.mark.parametrize("tokens", [511, 999])
def test_production_block_in_training_against_another_implementation_in_fp64(script, tokens):
    module = script("benchmark_block_problem")
    case = replace(module.Case("test", "fwdbwd", tokens), dtype=torch.float32)
    # fp64 at any size
    made = type("Exact", (module.Problem,), {"exact": torch.float64})(case, torch.device("cuda"))
    blocks = script("benchmark_block_implementations").BLOCKS
    ours = next(one for one in blocks if one.name == "pairformer_fast dense")
    errors = made.errors(ours.prepare(made).run())
    assert errors.pop("worst parameter") < 0.05, errors
    assert max(errors.values()) < 0.02, errors
