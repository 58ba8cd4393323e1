import pytest
import torch
from biases import KINDS, make_bias
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pairformer_fast.bias import factorize
from pairformer_fast.bias.randomised import factorize_randomised, orthogonalised
from pairformer_fast.bias.svd import decompose


def centred(bias):
    return bias.double() - bias.double().mean(-1, keepdim=True)


def frobenius(bias, factors):
    phi_q, phi_k = factors[:2]
    return torch.linalg.vector_norm(centred(bias) - phi_q.double() @ phi_k.double().mT, dim=(-2, -1))


def assert_near_optimal(bias, rank, within=1.05, **options):
    best = torch.linalg.svdvals(centred(bias))[..., rank:].square().sum(-1).sqrt()
    found = frobenius(bias, factorize_randomised(bias, None, rank, **options))
    rounding = 1e-5 * torch.linalg.vector_norm(centred(bias), dim=(-2, -1)) + 1e-6 * bias.abs().amax((-2, -1))
    assert (found <= within * best + rounding).all()


@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [17, 96])
def test_error_is_within_5_percent_of_the_least(kind, tokens, rank):
    assert_near_optimal(make_bias(kind, 2, 2, tokens), rank)


@pytest.mark.parametrize("rank", [4, 8, 16, 24])
def test_error_on_trained_biases_cold_and_from_the_recycle_before(trained_biases, recycled_biases, rank):
    assert len(trained_biases) == len(recycled_biases) >= 4
    for before, bias in zip(trained_biases, recycled_biases, strict=True):
        assert_near_optimal(before, rank)
        assert_near_optimal(bias, rank)
        assert_near_optimal(bias, rank, start=factorize_randomised(before, None, rank).phi_k)


@pytest.mark.parametrize("rank", [4, 16, 24])
def test_error_in_bf16_on_trained_biases(trained_biases, recycled_biases, rank):
    """There the operands of the power iteration and the factors are rounded, too."""
    for before, bias in zip(trained_biases, recycled_biases, strict=True):
        before, bias = before.bfloat16(), bias.bfloat16()
        assert_near_optimal(before, rank)
        assert_near_optimal(bias, rank, start=factorize_randomised(before, None, rank).phi_k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_a_bias_of_transposed_or_permuted_memory_has_the_same_factors(trained_biases, dtype, masked):
    bias = trained_biases[0].to(dtype)
    mask = (torch.arange(bias.shape[-1]) < 90).unsqueeze(0) if masked else None
    expected = factorize_randomised(bias, mask, 16)
    channels_last = bias.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    product = expected.phi_q.double() @ expected.phi_k.double().mT
    for same in (bias.mT.contiguous().mT, channels_last):
        found = factorize_randomised(same, mask, 16)
        assert found.phi_q.dtype == found.phi_k.dtype == dtype
        gap = found.phi_q.double() @ found.phi_k.double().mT - product
        assert gap.norm() < 0.02 * product.norm()


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_padding_and_means_of_rows_in_bf16_cost_no_accuracy(offset):
    generator = torch.Generator().manual_seed(0)
    tokens, kept = 120, 90
    left, right = torch.randn(2, 1, 2, tokens, tokens, generator=generator)
    rows = offset * torch.randn(1, 2, tokens, 1, generator=generator)
    bias = (left * torch.arange(1, tokens + 1) ** -1.0 @ right + rows).bfloat16()
    keep = (torch.arange(tokens) < kept).unsqueeze(0)
    within = bias[..., :kept, :kept]
    best = torch.linalg.svdvals(centred(within))[..., 8:].square().sum(-1).sqrt()
    found = factorize_randomised(bias, keep, 8)
    factors = [x[..., :kept, :] for x in found[:2]]
    assert (frobenius(within, factors) <= 1.05 * best).all()


def test_a_warm_start_is_used(trained_biases):
    """From its own factors a bias is decomposed better than from a random sketch, with an iteration less."""
    bias = trained_biases[-1]
    exact = decompose(bias, None).truncate(24)[1]
    cold, warm = (frobenius(bias, factorize_randomised(bias, None, 24, start=x)) for x in (None, exact))
    best = frobenius(bias, decompose(bias, None).truncate(24))
    assert (warm - best).max() < 0.05 * (cold - best).min()


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
def test_useless_columns_of_a_warm_start_become_random(fill):
    """The iteration that a warm start saves is missing then: 10 % instead of 5 %."""
    bias = make_bias("random", 1, 2, 63)
    for width in (8, 100):
        assert_near_optimal(bias, 8, within=1.1, start=torch.full((1, 2, 63, width), fill))


@pytest.mark.parametrize("start", [torch.ones(1, 2, 16, 4), torch.ones(1, 1, 17, 4), torch.ones(2, 17, 4)])
def test_a_warm_start_of_other_tokens_or_heads_is_an_error(start):
    with pytest.raises(ValueError, match=r"start must be \[B, H, N, \*\] = \[1, 2, 17, '\*'\]"):
        factorize_randomised(make_bias("random", 1, 2, 17), None, 4, start=start)


def test_rank_below_1_is_an_error():
    with pytest.raises(ValueError, match="rank must be 1 or more"):
        factorize_randomised(make_bias("random", 1, 2, 17), None, 0)


def test_seeds_repeat_and_the_global_generator_is_left_alone():
    bias = make_bias("random", 1, 2, 96)
    state = torch.get_rng_state()
    first = factorize_randomised(bias, None, 8, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(factorize_randomised(bias, None, 8, seed=5).phi_q, first.phi_q)
    assert not torch.equal(factorize_randomised(bias, None, 8, seed=6).phi_q, first.phi_q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 17, 40])
def test_a_rank_of_n_or_more_is_exact(kind, tokens, dtype):
    bias = make_bias(kind, 2, 2, tokens, dtype=dtype)
    error = frobenius(bias, factorize_randomised(bias, None, 2 * tokens))
    assert (error <= 50 * torch.finfo(dtype).eps * torch.linalg.vector_norm(bias.double(), dim=(-2, -1))).all()


def test_rank_is_that_of_the_bias_and_pairs_of_columns_have_one_length():
    bias = torch.cat([make_bias(kind, 1, 1, 63) for kind in ("rank_deficient", "constant_rows", "random")], dim=1)
    phi_q, phi_k, rank = factorize_randomised(bias, None, 8)
    assert rank.tolist() == [[2, 0, 8]]
    assert phi_q.shape == phi_k.shape == (1, 3, 63, 8)
    lengths = phi_q.norm(dim=-2)
    assert (lengths > 0).sum(-1).tolist() == [[2, 0, 8]]
    torch.testing.assert_close(lengths[0, 2], phi_k.norm(dim=-2)[0, 2])


@settings(max_examples=30, deadline=None)
@given(
    true_rank=st.integers(0, 8),
    decay=st.floats(0.0, 1.0),
    magnitude=st.sampled_from([1e-30, 1.0, 1e4, 1e30]),
    constant=st.sampled_from([0.0, 100.0]),
    tokens=st.integers(64, 90),
    seed=st.integers(0, 2**16),
)
def test_biases_of_low_rank_come_back_whatever_their_size(true_rank, decay, magnitude, constant, tokens, seed):
    """Singular values down to 1e-7 of the largest: the small ones are lost to rounding, 0.3 % of the norm at most."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, 1, 1, tokens, true_rank, generator=generator, dtype=torch.float64)
    values = 10 ** (-decay * torch.arange(true_rank))
    bias = (magnitude * (constant + left * values @ right.mT)).float()
    norm = torch.linalg.vector_norm(centred(bias), dim=(-2, -1))
    found = factorize_randomised(bias, None, 8)
    assert (frobenius(bias, found) <= 3e-3 * norm + 1e-5 * bias.abs().amax()).all()
    assert found.rank.item() <= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_masked_by_the_lowest_number_give_finite_factors(dtype):
    bias = make_bias("random", 1, 2, 80, dtype=dtype)
    bias[..., ::3] = torch.finfo(dtype).min
    found = factorize_randomised(bias, None, 8)
    assert found.phi_q.isfinite().all()
    assert found.phi_k.isfinite().all()
    assert (found.rank > 0).all()


def test_a_bias_that_is_not_finite_is_refused_with_its_place():
    bias = make_bias("random", 1, 2, 63)
    bias[0, 1, 4, 5] = torch.nan
    with pytest.raises(ValueError, match=r"bias has 1 NaN or infinite .* \[0, 1, 4, 5\]"):
        factorize(bias, "randomised", rank=8)


@example(kind="random", tokens=1, padding=3, rank=2, keep_share=0.5, fill=0.0, scale=1e-20, dtype=torch.float64, seed=0)
@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 40),
    padding=st.integers(0, 6),
    rank=st.integers(1, 24),
    keep_share=st.sampled_from([1.0, 0.5, 0.0]),
    fill=st.sampled_from([0.0, 1e30, float("nan"), float("inf")]),
    scale=st.sampled_from([1e-38, 1e-20, 1.0, 1e30]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_what_is_in_the_padding_never_matters_and_nothing_is_ever_nan(
    kind, tokens, padding, rank, keep_share, fill, scale, dtype, seed
):
    size = tokens + padding
    bias = (make_bias(kind, 1, 2, size, seed, torch.float64) * scale).to(dtype)
    keep = torch.rand(1, size, generator=torch.Generator().manual_seed(seed)) < keep_share
    pairs = (keep[:, :, None] & keep[:, None, :]).unsqueeze(1)
    zeroed, filled = (factorize_randomised(bias.masked_fill(~pairs, x), keep, rank) for x in (0.0, fill))
    for one, other in zip(zeroed[:2], filled[:2], strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()
        assert one.dtype == dtype
        assert not one.masked_fill(keep[:, None, :, None], 0).any()


def test_basis_of_numerically_dependent_columns_spans_them():
    """Condition 1e7 and more, where fp32's Gram matrix is singular and plain Cholesky fails."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(3, 200, 4, generator=generator)
    columns = torch.cat([few, few @ torch.randn(3, 4, 4, generator=generator), 1e-7 * few.flip(-1)], dim=-1)
    columns[1] = 0
    basis = orthogonalised(columns)
    assert basis.isfinite().all()
    assert not basis[1].any()
    overlap = basis.mT @ basis
    assert torch.linalg.eigvalsh(overlap).amax() < 1 + 1e-5
    left = few - basis @ (basis.mT @ few.double())
    assert left[0].norm() < 1e-4 * few[0].norm()

    graded = torch.randn(200, 8, generator=generator) * torch.logspace(0, -5, 8)
    basis = orthogonalised(graded)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(8).double(), atol=0.02, rtol=0)
