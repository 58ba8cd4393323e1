import re

import pytest
import torch
from biases import KINDS, make_bias, make_qkv, total_variation

from pairformer_fast.bias import MissingFactorNetworksError, PairBiasAttention, certify, policy
from pairformer_fast.bias.costs import FORMS, AttentionCosts, shipped
from pairformer_fast.bias.methods import RANK_LADDER
from pairformer_fast.bias.policy import LARGEST_LOSS, LARGEST_RANK_SHARE, factorize, keeps_dense
from pairformer_fast.bias.probe import Probe
from pairformer_fast.bias.svd import decompose
from pairformer_fast.config import AttentionConfig, Backend, BiasMethod

EASY, HARD = (2.0, 3.0, 4.0), (2.0, 3.0, 1000.0)
"""Decays of heads that all need few columns, and of which the last needs nearly all."""


def graded_bias(tokens=63, decays=(2.0, 3.0, 6.0), seed=0):
    """One head for each decay length of the singular values: the longer, the higher the rank it needs."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, 1, len(decays), tokens, tokens, generator=generator)
    values = torch.exp(-torch.arange(tokens) / torch.tensor(decays)[:, None])
    bias = torch.linalg.qr(left).Q * values[None, :, None, :] @ torch.linalg.qr(right).Q
    return 2 * bias / bias.std(dim=(-2, -1), keepdim=True)


def keep_all(q):
    return torch.ones(q.shape[:-2], dtype=torch.bool)


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("shape", [(1, 63, 63, 3, 8), (1, 63, 3, 8)], ids=["triangle", "single"])
def test_search_finds_the_least_rank_per_head(shape, certified):
    bias, (q, k, _) = graded_bias(), make_qkv(*shape)
    config = AttentionConfig(bias="svd", tolerance=0.05, certified=certified)
    outcome = factorize(bias, config, q, k, keep_all(q))

    error = outcome.factors.certificate.bound if certified else outcome.probed.mean
    assert (error <= config.tolerance).all()
    ranks = outcome.factors.rank[0].tolist()
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]
    lower = torch.tensor([[max([r for r in RANK_LADDER if r < rank], default=0) for rank in ranks]])
    below = decompose(bias, None).truncate(lower)
    error_below = certify(bias, *below, None).bound if certified else Probe(q, k, bias, None).error(*below).mean
    assert (error_below > config.tolerance).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 17])
def test_search_always_meets_the_tolerance(kind, tokens):
    """Where no useful rank does, the bias is the dense one."""
    bias, (q, k, _) = make_bias(kind, 2, 3, tokens), make_qkv(2, 5, tokens, 3, 8)
    outcome = factorize(bias, AttentionConfig(bias="svd", tolerance=0.01), q, k, keep_all(q))
    if outcome.factors is None:
        assert outcome.for_attention is bias
        assert outcome.reason == f"no head is within the tolerance at a rank up to {tokens // 2}, half of the tokens"
    else:
        assert (outcome.probed.mean <= 0.01).all()
        assert (outcome.factors.rank <= tokens * LARGEST_RANK_SHARE).all()
    assert (outcome.factors is None) == (tokens == 1 or kind in ("random", "huge", "banded", "block_sparse"))


@pytest.mark.parametrize(
    ("method", "certified"), [("svd", False), ("svd", True), ("structured", False), ("randomised", True)]
)
@pytest.mark.parametrize("shape", [(1, 63, 63, 3, 8), (1, 63, 3, 8)], ids=["triangle", "single"])
def test_a_head_that_misses_the_tolerance_is_dense_and_the_others_have_factors(shape, method, certified):
    bias, (q, k, v) = graded_bias(decays=HARD), make_qkv(*shape)
    module = PairBiasAttention().eval()
    exact = module(q, k, v, bias, None)
    module.reset()
    module.config = AttentionConfig(backend="torch", bias=method, tolerance=0.05, certified=certified)
    out, outcome = module(q, k, v, bias, None), factorize(bias, module.config, q, k, None)
    factors = outcome.factors
    assert factors.dense_heads.tolist() == [[False, False, True]]
    torch.testing.assert_close(out[..., 2, :], exact[..., 2, :], atol=1e-5, rtol=0)
    assert (out - exact)[..., :2, :].abs().amax() > 1e-3

    (report,) = module.report
    assert (report.choice, report.dense_heads, report.reason) == ("factors", (2,), None)
    assert 0 < max(report.rank[:2]) <= 31 < report.rank[2] == 63
    assert factors.rank[0, 2] == 0
    assert factors.phi_q.shape[-1] <= max(report.rank[:2])
    assert report.eps[2] == report.bound[2] == report.probed_max[2] == 0
    assert max(report.bound if certified else report.probed_mean) <= 0.05
    assert min(report.probed_mean[:2]) > 0


def test_heads_are_dense_in_the_batch_entry_that_needs_it():
    bias, (q, k, _) = torch.cat([graded_bias(decays=HARD), graded_bias(decays=EASY)]), make_qkv(2, 63, 63, 3, 8)
    factors = factorize(bias, AttentionConfig(bias="svd", tolerance=0.05), q, k, None).factors
    assert factors.dense_heads.tolist() == [[False, False, True], [False, False, False]]
    assert factors.certificate.eps[1].min() > 0


def test_fixed_rank_is_taken_and_clipped_to_the_tokens():
    bias, (q, k, _) = make_bias("random", 1, 2, 17), make_qkv(1, 17, 17, 2, 8)
    assert factorize(bias, AttentionConfig(bias="svd", rank=3), q, k, None).factors.rank.tolist() == [[3, 3]]
    clipped = factorize(bias, AttentionConfig(bias="svd", rank=500), q, k, None).factors
    assert clipped.phi_q.shape[-1] <= 17
    assert clipped.certificate.bound.max() < 1e-4


def attention_of(form, tokens, heads=3):
    rows = (2,) if form == "triangle" else ()
    return make_qkv(1, *rows, tokens, heads, 8)[:2]


@pytest.mark.parametrize("form", FORMS.values())
@pytest.mark.parametrize("backend", [Backend.TORCH, Backend.TRITON])
def test_auto_is_dense_by_the_shipped_costs_which_factors_do_not_beat(form, backend):
    costs = shipped()["gpu" if backend is Backend.TRITON else "cpu"]
    config = AttentionConfig(bias="auto", backend=backend)
    for tokens in (64, 100, 128, 256, 512, 1024):
        q, k = attention_of(form, tokens, heads=1)
        assert keeps_dense(config, q)
        outcome = factorize(torch.zeros(1, 1, tokens, tokens), config, q, k, None)
        assert outcome.factors is None
        assert f"{form} attention of {tokens} tokens with factors of rank" in outcome.reason
        assert f"making them {costs.making(form, tokens):.2f} (measured on {costs.device})" in outcome.reason
    for tokens in getattr(costs, form).dense:
        ranks = [rank for rank in RANK_LADDER if rank <= max(costs.by_rank)]
        least = min(costs.factors(form, tokens, rank) for rank in ranks) + costs.making(form, tokens)
        assert least > 1 or costs.making(form, tokens) > LARGEST_LOSS


def test_auto_is_dense_where_nothing_was_measured():
    (q, k), bias = attention_of("triangle", 63), graded_bias()
    for config in (AttentionConfig(backend="reference"), AttentionConfig(rank=16, backend="reference")):
        outcome = factorize(bias, config, q, k, None)
        assert outcome.for_attention is bias
        assert outcome.reason == "what factors cost with backend 'reference' on cpu was not measured"


@pytest.fixture
def cheap(monkeypatch):
    """Set what attention with factors, with dense tiles, and making factors cost, relative to the dense bias."""

    def use(factors=0.8, mixed=0.9, making=0.005, by_rank=None):
        times = {"dense": {64: 1.0}, "factors": {64: factors}, "mixed": {64: mixed}, "making": {64: making}}
        table = shipped()["cpu"].model_dump() | {"triangle": times, "single": times, "device": "a machine"}
        table |= {"by_rank": by_rank or {4: 1.0, 32: 1.0}, "by_share": {0.0: 1.0, 0.25: 1.0, 1.0: 1.0}}
        monkeypatch.setattr(policy, "measured_costs", lambda *_: AttentionCosts.model_validate(table))
        policy._by_costs.cache_clear()

    yield use
    policy._by_costs.cache_clear()


def test_auto_takes_the_least_rank_per_head_where_factors_pay(cheap):
    cheap()
    q, k, _ = make_qkv(1, 63, 63, 3, 8)
    config = AttentionConfig(bias="auto", tolerance=0.05)
    outcome = factorize(graded_bias(decays=EASY), config, q, k, keep_all(q))
    assert outcome.for_attention is outcome.factors
    assert outcome.probed.mean.max() <= 0.05
    ranks = outcome.factors.rank[0].tolist()
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1] <= 31
    assert not keeps_dense(config, q)


def test_auto_keeps_a_head_dense_only_if_that_pays(cheap):
    bias, (q, k, _) = graded_bias(decays=HARD), make_qkv(1, 63, 63, 3, 8)
    config = AttentionConfig(bias="auto", tolerance=0.05)
    cheap(mixed=0.9)
    assert factorize(bias, config, q, k, None).factors.dense_heads.tolist() == [[False, False, True]]
    cheap(mixed=1.1)
    dense = factorize(bias, config, q, k, None)
    assert dense.for_attention is bias
    assert dense.reason.startswith(
        "33% of the heads miss the tolerance, and with these dense attention would take 1.10"
    )


@pytest.mark.parametrize(
    ("costs", "reason"),
    [
        (
            {"factors": 0.99, "making": 0.02},
            "with factors of rank 4 would take 0.99 .* making them 0.02 .measured on a machine",
        ),
        ({"factors": 0.8, "making": 0.01}, "would take 0.80 .* making them 0.01 .*a search of 5 ranks .* more than 3%"),
    ],
)
def test_auto_loses_no_more_than_it_may(cheap, costs, reason, monkeypatch):
    cheap(**costs)
    monkeypatch.setattr(policy, "candidates", lambda *_, **__: pytest.fail("factors were made"))
    q, k, _ = make_qkv(1, 63, 63, 3, 8)
    outcome = factorize(graded_bias(decays=EASY), AttentionConfig(bias="auto"), q, k, None)
    assert outcome.factors is None
    assert re.search(reason, outcome.reason)


def test_auto_tries_only_ranks_that_pay(cheap):
    """Rank 16 and more take longer than the dense bias, and the last head needs them."""
    cheap(by_rank={4: 0.5, 8: 0.5, 16: 1.3, 32: 1.0, 64: 1.0})
    q, k, _ = make_qkv(1, 63, 63, 3, 8)
    config = AttentionConfig(bias="auto", tolerance=0.05)
    outcome = factorize(graded_bias(decays=(2.0, 2.0, 20.0)), config, q, k, None)
    assert outcome.factors.phi_q.shape[-1] <= 8
    assert outcome.factors.dense_heads.tolist() == [[False, False, True]]


def test_auto_keeps_the_dense_bias_if_a_fixed_rank_misses_the_tolerance_or_cannot_pay(cheap):
    cheap()
    bias, (q, k, _) = graded_bias(), make_qkv(1, 63, 63, 3, 8)
    assert factorize(bias, AttentionConfig(bias="auto", rank=1), q, k, None).factors is None
    assert factorize(bias, AttentionConfig(bias="auto", rank=60), q, k, None).factors is None
    assert factorize(bias, AttentionConfig(bias="auto", rank=24, tolerance=0.5), q, k, None).factors is not None


def test_dense_and_learned():
    bias, (q, k, _) = graded_bias(), make_qkv(1, 63, 63, 3, 8)
    assert factorize(bias, AttentionConfig(bias=BiasMethod.DENSE), q, k, None).for_attention is bias
    for tokens in (63, 1):
        one = bias[..., :tokens, :tokens], *(x[:, :, :tokens] for x in (q, k))
        with pytest.raises(MissingFactorNetworksError):
            factorize(one[0], AttentionConfig(bias="learned"), *one[1:], None)
    with pytest.raises(ValueError, match=r"no factor networks.*'svd', 'auto' or 'dense'") as caught:
        factorize(bias, AttentionConfig(bias="learned"), q, k, None)
    assert isinstance(caught.value, MissingFactorNetworksError | LookupError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_bias_is_an_error_with_its_place(value):
    bias, (q, k, _) = make_bias("random", 1, 2, 17), make_qkv(1, 17, 17, 2, 8)
    bias[0, 1, 4, 5] = value
    with pytest.raises(ValueError, match=r"bias has 1 NaN or infinite .* \[0, 1, 4, 5\]"):
        factorize(bias, AttentionConfig(bias="svd"), q, k, None)
    mask = keep_all(q)
    mask[..., 5] = False
    assert factorize(bias, AttentionConfig(bias="svd", rank=8), q, k, mask).factors.phi_k.isfinite().all()


@pytest.mark.parametrize("method", ["svd", "randomised"])
@pytest.mark.parametrize("shape", [(2, 9, 9, 2, 8), (2, 9, 2, 8)], ids=["triangle", "single"])
def test_all_masked_works(method, shape):
    bias, (q, k, _) = make_bias("random", 2, 2, 9), make_qkv(*shape)
    outcome = factorize(bias, AttentionConfig(bias=method), q, k, ~keep_all(q))
    assert outcome.factors.rank.tolist() == [[0, 0], [0, 0]]
    assert outcome.probed.max.max() == 0
    assert outcome.factors.certificate.eps.max() == 0


@pytest.mark.parametrize("rank", [1, 4])
def test_probe_of_a_whole_small_problem_is_exact(rank):
    bias, (q, k, _) = make_bias("random", 2, 3, 17), make_qkv(2, 7, 17, 3, 8)
    mask = torch.rand(2, 7, 17, generator=torch.Generator().manual_seed(3)) < 0.8
    mask[..., :2] = True
    phi_q, phi_k = decompose(bias, mask).truncate(rank)
    moved = total_variation(q, k, bias, phi_q @ phi_k.mT, mask)
    probed = Probe(q, k, bias, mask).error(phi_q, phi_k)
    torch.testing.assert_close(probed.max.double(), moved.amax((1, 3)), atol=1e-5, rtol=0)
    # 7 rows leave 36 queries a row, more than the 17 there are: every query is in the sample.
    torch.testing.assert_close(probed.mean.double(), moved.mean((1, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(probed.std.double(), moved.std((1, 3), correction=0), atol=1e-5, rtol=0)


def test_probe_sample_is_close_to_the_whole_and_ignores_padding():
    bias, (q, k, _) = graded_bias(tokens=96), make_qkv(1, 96, 96, 3, 8)
    valid = torch.arange(96) < 60
    mask = (valid[:, None] & valid)[None]
    phi_q, phi_k = decompose(bias, mask).truncate(8)
    whole = total_variation(q, k, bias, phi_q @ phi_k.mT, mask)[:, :60, :, :60]
    probed = Probe(q, k, bias, mask).error(phi_q, phi_k)
    torch.testing.assert_close(probed.mean.double(), whole.mean((1, 3)), atol=0.0, rtol=0.2)
    assert (probed.max <= whole.amax((1, 3)) + 1e-6).all()
    again = Probe(q, k, bias, mask).error(phi_q, phi_k)
    assert torch.equal(again.mean, probed.mean)


def test_factors_keep_the_dtype_of_the_bias():
    bias, (q, k, _) = (
        make_bias("random", 1, 2, 17, dtype=torch.bfloat16),
        make_qkv(1, 17, 17, 2, 8, dtype=torch.bfloat16),
    )
    factors = factorize(bias, AttentionConfig(bias="svd", rank=4), q, k, None).factors
    assert factors.phi_q.dtype == factors.phi_k.dtype == torch.bfloat16


@pytest.mark.parametrize("certified", [False, True])
def test_autocast_does_not_lower_precision(certified):
    bias, (q, k, _) = graded_bias(), make_qkv(1, 63, 63, 3, 8)
    config = AttentionConfig(bias="svd", tolerance=0.05, certified=certified)
    want = factorize(bias, config, q, k, None)
    with torch.autocast("cpu", torch.bfloat16):
        got = factorize(bias, config, q, k, None)
    assert torch.equal(got.factors.phi_q, want.factors.phi_q)
    assert torch.equal(got.probed.mean, want.probed.mean)
