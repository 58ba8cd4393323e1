"""Models whose attention takes its bias from factor networks."""

import logging

import pytest
import torch

from pairformer_fast.bias import FactorNetworks, FactorsError, MissingFactorNetworksError, attach_factors, set_attention
from pairformer_fast.bias.learned import side_file
from pairformer_fast.config import AttentionConfig, Backend
from pairformer_fast.kernels.backend import HAS_TRITON
from pairformer_fast.model import attention, slabs
from pairformer_fast.model.factors import attention_sizes, factor_networks, load_factors
from pairformer_fast.model.pairformer import PairformerBlock
from pairformer_fast.model.tokens import token_means
from tests.kernels.cases import DEVICE
from tests.model.test_pairformer import SIZES, SMALL, inputs, randomised, relative

LEARNED = AttentionConfig(bias="learned")


@pytest.fixture
def block() -> PairformerBlock:
    return randomised(PairformerBlock(SMALL))


@pytest.fixture
def networks(block) -> FactorNetworks:
    torch.manual_seed(0)
    made = factor_networks(block, 6, hidden=16).to(DEVICE)
    attach_factors(block, made)
    set_attention(block, LEARNED)
    return made


def test_features_are_means_over_kept_tokens(block):
    _, z, mask, _ = inputs(17)
    norm = block.attn_pair_bias.layer_norm_z
    found = token_means(z, norm, mask, Backend.AUTO)
    y = norm(z).double()
    for b in range(len(z)):
        rows, columns = y[b][:, mask[b]].mean(1), y[b][mask[b]].mean(0)
        torch.testing.assert_close(found[b].double(), torch.cat([rows, columns], -1), atol=1e-5, rtol=1e-5)


def test_networks_fit_all_attentions(block, networks):
    assert attention_sizes(block) == {
        "pair_stack.tri_att_start.mha.core": (64, 2),
        "pair_stack.tri_att_end.mha.core": (64, 2),
        "attn_pair_bias.mha.core": (112, 4),
    }
    assert {shape.rank for shape in networks.shapes.values()} == {6}


def test_no_bias_is_projected_and_the_weights_for_it_get_no_gradient(block, networks, monkeypatch):
    planes = []
    original = attention.layer_norm_linear

    def watched(z, norm, weight, planar_weight=None, **options):
        planes.append(planar_weight)
        return original(z, norm, weight, planar_weight, **options)

    monkeypatch.setattr(attention, "layer_norm_linear", watched)
    s, z, mask, pair_mask = inputs(9)
    s.requires_grad_()
    z.requires_grad_()
    out_s, out_z = block(s, z, mask, pair_mask)
    assert planes == [None] * 3
    (out_s[mask].square().sum() + out_z[pair_mask].square().sum()).backward()
    for name, parameter in networks.named_parameters():
        assert parameter.grad.isfinite().all(), name
        # A constant in all factors of the keys is one per query, which softmax ignores.
        assert parameter.grad.any() or "phi_k.4.bias" in name, name
    without = [name for name, parameter in block.named_parameters() if parameter.grad is None]
    assert [name for name in without if "tri_mul" not in name] == [
        "pair_stack.tri_att_start.linear_z.weight",
        "pair_stack.tri_att_end.linear_z.weight",
        "attn_pair_bias.linear_z.weight",
    ]
    assert z.grad[pair_mask].any(-1).all()


def test_padding_does_not_reach_other_tokens(block, networks):
    s, z, mask, _ = inputs(9, batch=1)
    mask[:] = True
    mask[:, 7:] = False
    pair_mask = mask[:, :, None] & mask[:, None]
    with torch.no_grad():
        padded = block(s, z, mask, pair_mask)
        alone = block(s[:, :7], z[:, :7, :7], mask[:, :7], pair_mask[:, :7, :7])
    assert relative(padded[0][:, :7], alone[0]) < 1e-5
    assert relative(padded[1][:, :7, :7], alone[1]) < 1e-5


def test_slabs_change_nothing(block, networks, monkeypatch, caplog):
    s, z, mask, pair_mask = inputs(130, batch=1)
    with torch.no_grad():
        whole = block(s, z, mask, pair_mask)
        monkeypatch.setattr(slabs, "SMALLEST_BYTES", 1)
        slabs._rows.cache_clear()
        with caplog.at_level(logging.INFO, logger=slabs.__name__):
            cut = block(s, z, mask, pair_mask)
    slabs._rows.cache_clear()
    assert "slabs of 64 rows" in caplog.text
    assert relative(cut[0], whole[0]) < 1e-5
    assert relative(cut[1], whole[1]) < 1e-5


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")
def test_kernels_give_the_gradients_of_the_reference(block, networks):
    _, z, _, pair_mask = inputs(SIZES[0])
    update, network = block.pair_stack.tri_att_end, networks["pair_stack.tri_att_end.mha.core"]
    results = {}
    for backend in (Backend.REFERENCE, Backend.TRITON):
        set_attention(block, AttentionConfig(backend=backend, bias="learned"))
        out = update(z, pair_mask)
        loss = (out * pair_mask[..., None]).sin().sum()
        results[backend] = [out.detach(), *torch.autograd.grad(loss, list(network.parameters()))]
    names = ["z", *(name for name, _ in network.named_parameters())]
    for name, want, got in zip(names, *results.values(), strict=True):
        if name != "phi_k.4.bias":
            assert relative(got, want) < 1e-4, name


def test_a_model_without_networks_refuses(block):
    set_attention(block, LEARNED)
    with pytest.raises(MissingFactorNetworksError, match="no factor networks"), torch.no_grad():
        block(*inputs(5))


def test_a_side_file_of_another_model_is_refused(block, networks, tmp_path):
    path = side_file(tmp_path / "model.safetensors")
    networks.save(path)
    loaded = load_factors(path, block)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    wider = PairformerBlock(SMALL.model_copy(update={"c_s": 64}))
    with pytest.raises(FactorsError, match=r"1 attentions; attn_pair_bias.mha.core has .* \(128, 4\) .* \(112, 4\)"):
        load_factors(path, wider)
