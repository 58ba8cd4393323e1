"""Factor networks: their factors, their side file, and the attention that takes them."""

import json

import pytest
import torch
from torch import nn

from pairformer_fast.bias import (
    FactorNetwork,
    FactorNetworks,
    FactorsError,
    MissingFactorNetworksError,
    NetworkShape,
    PairBiasAttention,
    attach_factors,
    collect_reports,
    detach_factors,
    set_attention,
)
from pairformer_fast.bias.learned import read_shapes, side_file
from pairformer_fast.config import AttentionConfig, Backend
from pairformer_fast.kernels.flash_bias import flash_bias_attention

SHAPE = NetworkShape(channels=12, heads=3, rank=5, hidden=16, table=4)
LEARNED = AttentionConfig(bias="learned")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = PairBiasAttention()
        self.block = nn.Sequential(nn.Linear(2, 2), PairBiasAttention())


def networks(*paths: str) -> FactorNetworks:
    torch.manual_seed(0)
    return FactorNetworks(dict.fromkeys(paths or ("first", "block.1"), SHAPE))


def tokens_and_keep(batch=2, tokens=9):
    keep = torch.ones(batch, tokens, dtype=torch.bool)
    keep[1, 6:] = False
    return torch.randn(batch, tokens, SHAPE.channels, generator=torch.Generator().manual_seed(1)), keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_factors_have_heads_and_rank_and_nothing_for_padding(dtype):
    tokens, keep = tokens_and_keep()
    factors = networks()["first"](tokens, keep, dtype)
    for phi in (factors.phi_q, factors.phi_k):
        assert (phi.shape, phi.dtype) == ((2, 3, 9, 5), dtype)
        assert not phi[1, :, 6:].any()
        assert phi[:, :, :6].abs().amin((-1, -2)).min() >= 0
        assert phi[0].any(-1).all()
    assert factors.table.shape == (3, 9)


@pytest.mark.parametrize("rank", [1, 16, 96])
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_a_fresh_network_gives_a_bias_of_about_unit_size(rank, size):
    torch.manual_seed(0)
    network = FactorNetwork(NetworkShape(channels=64, heads=4, rank=rank, hidden=64))
    tokens = size * torch.randn(1, 100, 64)
    factors = network(tokens, torch.ones(1, 100, dtype=torch.bool), torch.float32)
    assert 0.4 < (factors.phi_q @ factors.phi_k.mT).std() < 2.5


def test_features_of_another_width_are_refused():
    tokens, keep = tokens_and_keep()
    with pytest.raises(ValueError, match=r"12 features, but got \[2, 9, 11\]"):
        networks()["first"](tokens[..., 1:], keep, torch.float32)


def test_the_host_model_knows_nothing_of_its_networks():
    model = Model()
    state, parameters = list(model.state_dict()), list(model.parameters())
    attach_factors(model, networks())
    assert list(model.state_dict()) == state
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    assert [name for name, _ in model.named_modules()] == ["", "first", "block", "block.0", "block.1"]
    model.double()
    assert model.first.attached.network.norm.weight.dtype == torch.float32


def test_attention_is_that_of_the_factors_and_gradients_reach_network_and_tokens():
    core, bound = PairBiasAttention(), networks("0")
    core.config = LEARNED
    attach_factors(nn.Sequential(core), bound)
    tokens, keep = tokens_and_keep()
    tokens.requires_grad_()
    q, k, v = torch.randn(3, 2, 9, 3, 8, generator=torch.Generator().manual_seed(2))
    nn.init.normal_(bound["0"].table)
    factors = core.factors(tokens, keep, q)
    out = core.attend(q, k, v, factors, keep)
    offset = (torch.arange(9)[:, None] - torch.arange(9)).clamp(-4, 4) + 4
    logits = (
        torch.einsum("bnhd,bmhd->bhnm", q, k) * 8**-0.5 + factors.phi_q @ factors.phi_k.mT + factors.table[:, offset]
    )
    weights = logits.masked_fill(~keep[:, None, None], -torch.inf).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("bhnm,bmhd->bnhd", weights, v), atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    assert all(p.grad.any() for name, p in bound.named_parameters() if "phi_k.4.bias" not in name)
    assert tokens.grad[0].any(-1).all()
    assert not tokens.grad[1, 6:].any()


def test_gradients_through_learned_factors_are_right():
    """By finite differences in fp64: of a function of the factors, with regard to tokens and all weights."""
    torch.manual_seed(0)
    network = FactorNetwork(NetworkShape(channels=4, heads=2, rank=2, hidden=3, table=2)).double()
    nn.init.normal_(network.table)
    keep = torch.tensor([[True, True, True, False]])
    names = [name for name, _ in network.named_parameters()]
    q, k, v = torch.randn(3, 1, 4, 2, 3, dtype=torch.float64)

    def attended(tokens, *weights):
        arguments = (tokens, keep, torch.float64)
        factors = torch.func.functional_call(network, dict(zip(names, weights, strict=True)), arguments)
        return flash_bias_attention(q, k, v, factors, keep, Backend.REFERENCE)

    tokens = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attended, (tokens, *network.parameters()))


def test_reports_have_rank_and_no_error():
    model = Model().eval()
    attach_factors(model, networks())
    set_attention(model, LEARNED)
    tokens, keep = tokens_and_keep()
    q = torch.randn(2, 9, 3, 8)
    model.block[1].factors(tokens, keep, q)
    (report,) = json.loads(json.dumps(collect_reports(model)))
    assert (report["name"], report["choice"], report["rank"]) == ("block.1", "factors", [5, 5, 5])
    assert [report[key] for key in ("eps", "bound", "probed_mean", "probed_std", "probed_max")] == [None] * 5
    model.train()
    model.first.factors(tokens, keep, q)
    assert len(collect_reports(model)) == 1


def test_networks_that_are_missing_or_belong_elsewhere_are_named():
    model = Model()
    with pytest.raises(MissingFactorNetworksError, match="attach_factors"):
        model.first.factors(*tokens_and_keep(), torch.randn(2, 9, 3, 8))
    with pytest.raises(FactorsError, match=r"1 of its 2 attentions have none \(such as block.1\).*\(such as other\)"):
        attach_factors(model, networks("first", "other"))
    assert model.first.attached is None
    attach_factors(model, networks())
    detach_factors(model)
    assert model.block[1].attached is None


def test_side_file_round_trip(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    path = side_file(weights)
    assert path.name == "model.factors.safetensors"
    written = networks()
    written.save(path, weights, {"steps": 3})
    assert [file.name for file in sorted(tmp_path.iterdir())] == [path.name, weights.name]
    read = FactorNetworks.load(path, weights)
    assert read.shapes == written.shapes == read_shapes(path)
    for name, value in read.state_dict().items():
        assert torch.equal(value, written.state_dict()[name]), name


def test_side_files_that_do_not_fit_are_named(tmp_path):
    path, weights = tmp_path / "x.factors.safetensors", tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="no factor networks at"):
        FactorNetworks.load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(FactorsError, match="no file of factor networks"):
        FactorNetworks.load(path)
    weights.write_bytes(b"weights")
    networks().save(path, weights)
    weights.write_bytes(b"other weights")
    with pytest.raises(FactorsError, match="of other weights than"):
        FactorNetworks.load(path, weights)
    FactorNetworks.load(path)
