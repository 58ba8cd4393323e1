import pytest
import torch
from biases import KINDS, make_bias, make_qkv, total_variation
from hypothesis import given, settings
from hypothesis import strategies as st

from pairformer_fast.bias import MissingFactorNetworksError, PairBiasAttention, factorize
from pairformer_fast.bias.methods import RANK_LADDER
from pairformer_fast.bias.probe import Probe
from pairformer_fast.bias.randomised import factorize_randomised
from pairformer_fast.bias.svd import decompose
from pairformer_fast.bias.toeplitz import toeplitz
from pairformer_fast.config import AttentionConfig
from pairformer_fast.kernels.flash_bias import flash_bias_attention

METHODS = ["svd", "randomised", "structured", "landmark"]


def dense(factors):
    """What attention sees, in fp64."""
    product = factors.phi_q.double() @ factors.phi_k.double().mT
    return product if factors.table is None else product + toeplitz(factors.table.double(), product.shape[-1])


@settings(max_examples=150, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 40),
    rank=st.integers(1, 50),
    keep_share=st.sampled_from([1.0, 0.7, 0.2, 0.0]),
    fill=st.sampled_from([None, float("nan")]),
    seed=st.integers(0, 2**16),
)
def test_the_bound_holds_for_every_method(method, kind, tokens, rank, keep_share, fill, seed):
    bias = make_bias(kind, 2, 3, tokens, seed)
    q, k, _ = make_qkv(2, 2, tokens, 3, 4, seed=seed)
    mask = torch.rand(2, 2, tokens, generator=torch.Generator().manual_seed(seed)) < keep_share
    keep = mask.any(1)
    inside = (keep[:, :, None] & keep[:, None, :]).unsqueeze(1)
    given_bias = bias if fill is None else bias.masked_fill(~inside, fill)

    factors = factorize(given_bias, method, rank=rank, mask=mask, seed=seed)
    assert factors.phi_q.isfinite().all()
    assert factors.phi_k.isfinite().all()
    assert (factors.rank <= min(rank, tokens)).all()
    moved = total_variation(q, k, bias, dense(factors), mask).nan_to_num(0)
    moved = moved.masked_fill(~keep[:, None, None, :], 0).amax(1)
    assert (moved <= torch.tanh(factors.certificate.eps_row / 2) + 1e-9).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 17, 40])
def test_the_full_rank_is_the_bias(method, kind, tokens):
    bias = make_bias(kind, 2, 3, tokens)
    factors = factorize(bias, method, rank=500)
    assert (factors.certificate.eps <= 2e-5 * bias.abs().max()).all()


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_tolerance_is_met_at_the_least_rank_of_the_ladder(method, certified, trained_biases):
    bias, (q, k, _) = trained_biases[2], make_qkv(1, 106, 106, 4, 8)
    options = {"certified": True} if certified else {"q": q, "k": k}
    tolerance = 0.3 if certified else 0.05

    def error(factors):
        if certified:
            return factors.certificate.bound
        return Probe(q, k, bias, None).error(factors.phi_q, factors.phi_k, factors.table).mean

    factors = factorize(bias, method, tolerance=tolerance, **options)
    assert (error(factors) <= tolerance).all()
    assert {*factors.rank.flatten().tolist()} <= {*RANK_LADDER, *decompose(bias, None).rank.flatten().tolist()}
    for head, rank in enumerate(factors.rank[0].tolist()):
        below = max((r for r in RANK_LADDER if r < rank), default=None)
        if below is not None:
            assert error(factorize(bias, method, rank=below))[0, head] > tolerance


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tolerance_is_met_on_every_kind_of_bias(method, kind):
    bias, (q, k, _) = make_bias(kind, 2, 3, 40), make_qkv(2, 5, 40, 3, 8)
    factors = factorize(bias, method, tolerance=0.01, q=q, k=k)
    moved = total_variation(q, k, bias, dense(factors), torch.ones(2, 5, 40, dtype=torch.bool))
    assert (moved.mean((1, 3)) <= 0.01 + 1e-4).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("config", [{"rank": 6}, {"tolerance": 0.02}, {"tolerance": 0.2, "certified": True}])
def test_attention_with_every_method_reports_what_it_did(method, config):
    q, k, v = make_qkv(2, 64, 64, 3, 8)
    bias, mask = make_bias("rank_deficient", 2, 3, 64), torch.ones(2, 64, 64, dtype=torch.bool)
    mask[1, :, 50:] = False
    module = PairBiasAttention().eval()
    module.config = AttentionConfig(bias=method, **config)
    with torch.no_grad():
        out = module(q, k, v, bias, mask)
    (report,) = module.report
    assert report.choice == "factors"
    options = {key: value for key, value in config.items() if key != "tolerance" or "certified" in config}
    if "tolerance" in config and "certified" not in config:
        assert max(report.probed_mean) <= config["tolerance"]
        options |= {"tolerance": config["tolerance"], "q": q, "k": k}
    factors = factorize(bias, method, mask=mask, **options)
    assert report.rank == tuple(factors.rank.amax(0).tolist())
    torch.testing.assert_close(report.eps, tuple(factors.certificate.eps.amax(0).tolist()))
    torch.testing.assert_close(out, flash_bias_attention(q, k, v, dense(factors).float(), mask), atol=1e-4, rtol=1e-4)
    assert all(probed <= bound + 1e-5 for probed, bound in zip(report.probed_max, report.bound, strict=True))


@settings(max_examples=80, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 40),
    padding=st.integers(1, 6),
    rank=st.integers(1, 12),
    fill=st.sampled_from([1e30, float("nan"), float("inf")]),
    seed=st.integers(0, 2**16),
)
def test_what_is_in_the_padding_never_reaches_the_factors(method, kind, tokens, padding, rank, fill, seed):
    bias, keep = make_bias(kind, 1, 2, tokens + padding, seed), torch.arange(tokens + padding)[None] < tokens
    outside = ~(keep[:, :, None] & keep[:, None, :]).unsqueeze(1)
    zeroed, filled = (factorize(bias.masked_fill(outside, x), method, rank=rank, mask=keep) for x in (0.0, fill))
    for name in ("phi_q", "phi_k", "rank", "table"):
        one, other = getattr(zeroed, name), getattr(filled, name)
        assert one is other is None or torch.equal(one, other), name
    assert torch.equal(zeroed.certificate.eps_row, filled.certificate.eps_row)
    assert torch.equal(zeroed.certificate.eps_tile, filled.certificate.eps_tile)
    for phi in (filled.phi_q, filled.phi_k):
        assert not phi[:, :, tokens:].any()


@pytest.mark.parametrize("method", METHODS)
def test_factors_alone_refuse_a_gradient_of_the_bias_too(method):
    bias = make_bias("random", 1, 2, 40).requires_grad_()
    with pytest.raises(RuntimeError, match=r"pass no gradient to the bias.*detach"):
        factorize(bias, method, rank=4)
    with torch.no_grad():
        within = factorize(bias, method, rank=4)
    assert torch.equal(factorize(bias.detach(), method, rank=4).phi_q, within.phi_q)
    assert not within.phi_q.requires_grad


def test_randomised_factors_alone_refuse_a_gradient_of_the_bias():
    with pytest.raises(RuntimeError, match="pass no gradient to the bias"):
        factorize_randomised(make_bias("random", 1, 2, 40).requires_grad_(), None, 4)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_the_bias_are_refused(method):
    q, k, v = make_qkv(1, 9, 9, 2, 8)
    module = PairBiasAttention()
    module.config = AttentionConfig(bias=method)
    with pytest.raises(RuntimeError, match=f"bias method '{method}'.*dense.*no_grad"):
        module(q, k, v, make_bias("random", 1, 2, 9).requires_grad_(), None)


def test_a_table_takes_relative_position_off_the_factors():
    position = torch.arange(80)
    band = 6.0 * torch.exp(-(position[:, None] - position).abs() / 4.0)
    bias = band + make_bias("rank_deficient", 1, 2, 80)
    plain, whole, narrow = (
        factorize(bias, "svd", rank=2),
        factorize(bias, "structured", rank=2),
        factorize(bias, "structured", rank=2, width=3),
    )
    assert whole.certificate.eps.max() < 0.2 * plain.certificate.eps.min()
    assert whole.certificate.eps.max() < 0.5 * narrow.certificate.eps.min()
    assert narrow.table.shape == (2, 7)


def test_a_table_moves_attention_less_on_trained_biases(trained_biases):
    q, k, _ = make_qkv(1, 106, 106, 4, 8)
    errors = {"svd": 0.0, "structured": 0.0}
    for bias in trained_biases:
        probe = Probe(q, k, bias, None)
        for method in errors:
            factors = factorize(bias, method, rank=8)
            errors[method] += probe.error(factors.phi_q, factors.phi_k, factors.table).mean.sum().item()
    assert errors["structured"] < 0.75 * errors["svd"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_dtypes_fit_attention_and_the_certificate_covers_rounding(method, dtype):
    bias, (q, k, v) = make_bias("block_sparse", 1, 2, 60, dtype=dtype), make_qkv(1, 5, 60, 2, 8, dtype=dtype)
    factors = factorize(bias, method, rank=8)
    assert factors.phi_q.dtype == factors.phi_k.dtype == dtype
    assert flash_bias_attention(q, k, v, factors).isfinite().all()
    residual = bias.double() - dense(factors)
    torch.testing.assert_close(factors.certificate.eps_row, (residual.amax(-1) - residual.amin(-1)) / 2)


def test_randomised_takes_seed_and_warm_start():
    bias = make_bias("random", 1, 2, 96)
    first, again, other = (factorize(bias, "randomised", rank=8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.phi_q, again.phi_q)
    assert not torch.equal(first.phi_q, other.phi_q)
    warm = factorize(bias, "randomised", rank=8, start=factorize(bias, "svd", rank=8).phi_k)
    cold_error, warm_error = ((bias - dense(x)).square().sum() for x in (first, warm))
    assert warm_error < cold_error


def test_bad_requests_say_what_to_change():
    bias = make_bias("random", 1, 2, 17)
    for method in ("magic", "dense", "auto"):
        with pytest.raises(ValueError, match=f"method must be one of 'svd', 'randomised', .*, but got '{method}'"):
            factorize(bias, method, rank=4)
    with pytest.raises(MissingFactorNetworksError, match="no factor networks"):
        factorize(bias, "learned", rank=4)
    for options in ({}, {"rank": 4, "tolerance": 0.1}):
        with pytest.raises(ValueError, match="either rank or tolerance"):
            factorize(bias, "svd", **options)
    with pytest.raises(ValueError, match="rank must be 1 or more"):
        factorize(bias, "svd", rank=0)
    with pytest.raises(ValueError, match="pass them, or certified=True"):
        factorize(bias, "svd", tolerance=0.1)
    for value in (torch.nan, torch.inf, -torch.inf):
        bias[0, 1, 4, 5] = value
        for method in METHODS:
            with pytest.raises(ValueError, match=r"bias has 1 NaN or infinite .* \[0, 1, 4, 5\]"):
                factorize(bias, method, rank=4)
