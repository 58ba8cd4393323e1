import pytest
import torch
from biases import KINDS, make_bias, make_qkv, total_variation

from pairformer_fast.bias import MissingFactorNetworksError, certify
from pairformer_fast.bias.methods import RANK_LADDER
from pairformer_fast.bias.policy import factorize
from pairformer_fast.bias.probe import Probe
from pairformer_fast.bias.svd import decompose
from pairformer_fast.config import AttentionConfig, BiasMethod


def graded_bias(tokens=63, decays=(2.0, 6.0, 20.0), seed=0):
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
    bias, (q, k, _) = make_bias(kind, 2, 3, tokens), make_qkv(2, 5, tokens, 3, 8)
    outcome = factorize(bias, AttentionConfig(bias="svd", tolerance=0.01), q, k, keep_all(q))
    assert (outcome.probed.mean <= 0.01).all()
    assert (outcome.factors.rank <= tokens).all()


def test_fixed_rank_is_taken_and_clipped_to_the_tokens():
    bias, (q, k, _) = make_bias("random", 1, 2, 17), make_qkv(1, 17, 17, 2, 8)
    assert factorize(bias, AttentionConfig(bias="svd", rank=3), q, k, None).factors.rank.tolist() == [[3, 3]]
    clipped = factorize(bias, AttentionConfig(bias="svd", rank=500), q, k, None).factors
    assert clipped.phi_q.shape[-1] <= 17
    assert clipped.certificate.bound.max() < 1e-4


def test_auto_takes_factors_only_up_to_half_of_the_tokens():
    q, k, _ = make_qkv(1, 63, 63, 3, 8)
    config = AttentionConfig(bias="auto", tolerance=0.05)
    low = factorize(graded_bias(decays=(2.0, 3.0, 4.0)), config, q, k, keep_all(q))
    assert low.factors is not None
    assert low.for_attention is low.factors
    assert low.probed.mean.max() <= 0.05

    hard = graded_bias(decays=(2.0, 3.0, 1000.0))
    high = factorize(hard, config, q, k, keep_all(q))
    assert high.factors is None
    assert high.for_attention is hard
    assert factorize(hard, AttentionConfig(bias="svd", tolerance=0.05), q, k, None).factors.rank.max() > 31


def test_auto_keeps_the_dense_bias_if_a_fixed_rank_misses_the_tolerance_or_cannot_pay():
    bias, (q, k, _) = graded_bias(), make_qkv(1, 63, 63, 3, 8)
    assert factorize(bias, AttentionConfig(bias="auto", rank=1), q, k, None).factors is None
    assert factorize(bias, AttentionConfig(bias="auto", rank=60), q, k, None).factors is None
    assert factorize(bias, AttentionConfig(bias="auto", rank=24, tolerance=0.5), q, k, None).factors is not None


def test_dense_and_learned():
    bias, (q, k, _) = graded_bias(), make_qkv(1, 63, 63, 3, 8)
    assert factorize(bias, AttentionConfig(bias=BiasMethod.DENSE), q, k, None).for_attention is bias
    with pytest.raises(ValueError, match=r"no factor networks.*'svd', 'auto' or 'dense'") as caught:
        factorize(bias, AttentionConfig(bias="learned"), q, k, None)
    assert isinstance(caught.value, MissingFactorNetworksError | LookupError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["svd", "auto"])
def test_non_finite_bias_is_an_error_with_its_place(method, value):
    bias, (q, k, _) = make_bias("random", 1, 2, 17), make_qkv(1, 17, 17, 2, 8)
    bias[0, 1, 4, 5] = value
    with pytest.raises(ValueError, match=r"bias has 1 NaN or infinite .* \[0, 1, 4, 5\]"):
        factorize(bias, AttentionConfig(bias=method), q, k, None)
    mask = keep_all(q)
    mask[..., 5] = False
    assert factorize(bias, AttentionConfig(bias="svd"), q, k, mask).factors.phi_k.isfinite().all()


@pytest.mark.parametrize("method", ["svd", "auto"])
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
