"""The Pairformer block: slabs, work in place, gradients, and what reaches the attention cores."""

import logging

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from pairformer_fast.bias import collect_reports, set_attention
from pairformer_fast.config import AttentionConfig, Backend, PairformerConfig
from pairformer_fast.kernels.backend import HAS_TRITON
from pairformer_fast.model import slabs
from pairformer_fast.model.pairformer import PairformerBlock, PairformerStack
from tests.kernels.cases import DEVICE

SIZES = (17, 33, 130) if torch.cuda.is_available() else (5,)
"""Triton's interpreter is slow."""

# A constant added to all logits of a query: softmax ignores it, so this gradient is zero but for rounding.
NO_GRADIENT = "attn_pair_bias.layer_norm_z.bias"

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")

SMALL = PairformerConfig(
    c_s=48,
    c_z=32,
    c_hidden_mul=32,
    c_hidden_pair_att=16,
    no_heads_pair=2,
    c_hidden_pair_bias=16,
    no_heads_pair_bias=4,
    transition_n=2,
    no_blocks=2,
)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Output projections begin at zero, which would hide half of a block."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if "layer_norm" in name and name.endswith("weight"):
                parameter += 1
    return module.eval().to(DEVICE)


@pytest.fixture(scope="module")
def block() -> PairformerBlock:
    return randomised(PairformerBlock(SMALL))


def inputs(tokens: int, batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    s = torch.randn(batch, tokens, SMALL.c_s, generator=generator)
    z = torch.randn(batch, tokens, tokens, SMALL.c_z, generator=generator)
    mask = torch.rand(batch, tokens, generator=generator) < 0.8
    mask[:, 0] = True
    return tuple(x.to(DEVICE) for x in (s, z, mask, mask[:, :, None] & mask[:, None, :]))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_slabs_change_nothing_and_are_logged(block, monkeypatch, caplog):
    s, z, mask, pair_mask = inputs(130, batch=1)
    with torch.no_grad():
        whole = block(s, z, mask, pair_mask)
        monkeypatch.setattr(slabs, "SMALLEST_BYTES", 1)
        slabs._rows.cache_clear()
        with caplog.at_level(logging.INFO, logger=slabs.__name__):
            cut = block(s, z, mask, pair_mask)
    slabs._rows.cache_clear()
    assert "slabs of 64 rows" in caplog.text
    assert relative(cut[0], whole[0]) < 1e-6
    assert relative(cut[1], whole[1]) < 1e-6


def test_slabs_shrink_where_little_memory_is_free(monkeypatch, caplog):
    z = torch.empty(1, 2048, 2048, 128, dtype=torch.bfloat16, device="meta")
    found = []
    with torch.no_grad(), caplog.at_level(logging.INFO, logger=slabs.__name__):
        for free in (2**36, 2**30, 2**20, None):
            monkeypatch.setattr(slabs, "free_bytes", lambda _, free=free: free)
            found.append(slabs.rows_at_a_time(z, 512))
    assert found == [256, 256, 64, 256]
    assert "slabs of 64 rows, 64 MiB" in caplog.text


def test_nothing_is_cut_where_gradients_are_wanted(monkeypatch):
    monkeypatch.setattr(slabs, "SMALLEST_BYTES", 1)
    z = torch.zeros(1, 130, 130, 8)
    assert slabs.rows_at_a_time(z, 8) is None
    with torch.no_grad():
        assert slabs.rows_at_a_time(z, 8) == 64
    slabs._rows.cache_clear()


def test_the_pair_representation_of_the_caller_stays_unless_it_is_given_away(block):
    s, z, mask, pair_mask = inputs(17)
    kept = z.clone()
    with torch.no_grad():
        expected = block(s, z, mask, pair_mask)
        assert torch.equal(z, kept)
        found = block(s, z, mask, pair_mask, out=z)
    assert found[1].data_ptr() == z.data_ptr()
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


def test_a_stack_leaves_its_input_and_equals_its_blocks():
    stack = randomised(PairformerStack(SMALL))
    s, z, mask, pair_mask = inputs(17)
    kept = z.clone()
    with torch.no_grad():
        found = stack(s, z, mask, pair_mask)
        for member in stack.blocks:
            s, z = member(s, z, mask, pair_mask)
    assert torch.equal(inputs(17)[1], kept)
    assert torch.equal(found[0], s)
    assert torch.equal(found[1], z)


@needs_triton
@pytest.mark.parametrize("tokens", [1, *SIZES])
def test_kernels_give_the_gradients_of_the_reference(block, tokens):
    s, z, mask, pair_mask = inputs(tokens)
    results = {}
    for backend in (Backend.REFERENCE, Backend.TRITON):
        set_attention(block, AttentionConfig(backend=backend, bias="dense"))
        leaves = [s.clone().requires_grad_(), z.clone().requires_grad_(), *block.parameters()]
        out_s, out_z = block(leaves[0], leaves[1], mask, pair_mask)
        loss = (out_s * mask[..., None]).sin().sum() + (out_z * pair_mask[..., None]).sin().sum()
        results[backend] = [out_s.detach(), out_z.detach(), *torch.autograd.grad(loss, leaves)]
    set_attention(block, AttentionConfig.reference())
    names = ["s", "z", "ds", "dz", *(name for name, _ in block.named_parameters())]
    for name, want, got in zip(names, results[Backend.REFERENCE], results[Backend.TRITON], strict=True):
        if name == NO_GRADIENT or want.abs().max() < 1e-5:
            assert got.abs().max() < 1e-4, name
        else:
            assert relative(got, want) < 5e-5, name


@needs_triton
def test_auto_keeps_the_dense_bias_where_factors_do_not_pay(block):
    s, z, mask, pair_mask = inputs(SIZES[0])
    with torch.no_grad():
        for backend in (Backend.TRITON, Backend.TORCH, Backend.REFERENCE):
            set_attention(block, AttentionConfig(backend=backend, tolerance=1.0))
            block(s, z, mask, pair_mask)
            assert {report["choice"] for report in collect_reports(block)} == {"dense"}
    set_attention(block, AttentionConfig.reference())


def test_dropout_is_replayed_and_keeps_the_mean():
    block = randomised(PairformerBlock(SMALL.model_copy(update={"pair_dropout": 0.5}))).train()
    s, z, mask, pair_mask = inputs(17)
    plain = block.eval()(s, z, mask, pair_mask)[1].detach()
    block.train()
    torch.manual_seed(3)
    once = block(s, z, mask, pair_mask)[1].detach()
    torch.manual_seed(3)
    again = torch.utils.checkpoint.checkpoint(block, s, z.requires_grad_(), mask, pair_mask, use_reentrant=False)[1]
    assert torch.equal(once, again.detach())
    again.sum().backward()
    assert relative(once, plain) > 0.01


def test_gradients_under_distributed_data_parallel(block, tmp_path):
    s, z, mask, pair_mask = inputs(9)
    leaves = list(block.parameters())
    expected = torch.autograd.grad(sum(x.sin().sum() for x in block(s, z, mask, pair_mask)), leaves)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        sum(x.sin().sum() for x in DistributedDataParallel(block)(s, z, mask, pair_mask)).backward()
        found = [parameter.grad for parameter in leaves]
    finally:
        torch.distributed.destroy_process_group()
        block.zero_grad()
    for want, got in zip(expected, found, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, pytest.param(Backend.TRITON, marks=needs_triton)])
def test_one_graph_of_torch_compile(block, backend):
    s, z, mask, pair_mask = inputs(SIZES[0])
    set_attention(block, AttentionConfig(backend=backend, bias="auto"))
    expected = block(s, z, mask, pair_mask)
    found = torch.compile(block, fullgraph=True, backend="aot_eager")(s, z, mask, pair_mask)
    gradient, want = (
        torch.autograd.grad(x[1].sin().sum(), block.pair_stack.tri_mul_out.linear_z.weight)[0]
        for x in (found, expected)
    )
    set_attention(block, AttentionConfig.reference())
    assert relative(found[1].detach(), expected[1].detach()) < 1e-5
    assert relative(gradient, want) < 1e-4
