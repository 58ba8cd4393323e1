import pytest
import torch
from biases import KINDS, make_bias
from hypothesis import given, settings
from hypothesis import strategies as st

from pairformer_fast.bias.randomised import decompose_randomised, orthogonalised
from pairformer_fast.bias.svd import decompose


def centred(bias):
    return bias.double() - bias.double().mean(-1, keepdim=True)


def frobenius(bias, factors):
    phi_q, phi_k = factors
    return torch.linalg.vector_norm(centred(bias) - phi_q.double() @ phi_k.double().mT, dim=(-2, -1))


def assert_near_optimal(bias, rank, **options):
    best = torch.linalg.svdvals(centred(bias))[..., rank:].square().sum(-1).sqrt()
    found = frobenius(bias, decompose_randomised(bias, None, rank, **options).truncate(rank))
    rounding = 1e-5 * torch.linalg.vector_norm(centred(bias), dim=(-2, -1)) + 1e-6 * bias.abs().amax((-2, -1))
    assert (found <= 1.05 * best + rounding).all()


@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [17, 96])
def test_error_is_within_5_percent_of_the_least(kind, tokens, rank):
    assert_near_optimal(make_bias(kind, 2, 2, tokens), rank)


@pytest.mark.parametrize("rank", [4, 16, 32, 64])
def test_error_on_trained_biases_cold_and_from_the_block_before(trained_biases, rank):
    assert len(trained_biases) >= 4
    before = None
    for bias in trained_biases:
        assert_near_optimal(bias, rank)
        if before is not None:
            assert_near_optimal(bias, rank, start=decompose(before, None).truncate(rank)[1])
        before = bias


def test_a_warm_start_is_used(trained_biases):
    """From its own factors a bias is decomposed better than from a random sketch alone."""
    bias = trained_biases[-1]
    exact = decompose(bias, None).truncate(32)[1]
    cold, warm = (frobenius(bias, decompose_randomised(bias, None, 32, start=x).truncate(32)) for x in (None, exact))
    best = frobenius(bias, decompose(bias, None).truncate(32))
    assert (warm - best).max() < 0.05 * (cold - best).min()


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
def test_useless_columns_of_a_warm_start_do_no_harm(fill):
    bias = make_bias("random", 1, 2, 63)
    assert_near_optimal(bias, 8, start=torch.full((1, 2, 63, 8), fill))
    assert_near_optimal(bias, 8, start=torch.full((1, 2, 63, 100), fill))


@pytest.mark.parametrize("start", [torch.ones(1, 2, 16, 4), torch.ones(1, 1, 17, 4), torch.ones(2, 17, 4)])
def test_a_warm_start_of_other_tokens_or_heads_is_an_error(start):
    with pytest.raises(ValueError, match=r"start must be \[B, H, N, \*\] = \[1, 2, 17, '\*'\]"):
        decompose_randomised(make_bias("random", 1, 2, 17), None, 4, start=start)


def test_rank_below_1_is_an_error():
    with pytest.raises(ValueError, match="rank must be 1 or more"):
        decompose_randomised(make_bias("random", 1, 2, 17), None, 0)


def test_seeds_repeat_and_the_global_generator_is_left_alone():
    bias = make_bias("random", 1, 2, 96)
    state = torch.get_rng_state()
    first = decompose_randomised(bias, None, 8, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(decompose_randomised(bias, None, 8, seed=5).left, first.left)
    assert not torch.equal(decompose_randomised(bias, None, 8, seed=6).left, first.left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 17, 40])
def test_a_rank_of_n_or_more_is_exact(kind, tokens, dtype):
    bias = make_bias(kind, 2, 2, tokens, dtype=dtype)
    error = frobenius(bias, decompose_randomised(bias, None, 2 * tokens).truncate(2 * tokens))
    assert (error <= 50 * torch.finfo(dtype).eps * torch.linalg.vector_norm(bias.double(), dim=(-2, -1))).all()


def test_rank_and_singular_values_are_those_of_the_exact_decomposition():
    bias = torch.cat([make_bias(kind, 1, 1, 63) for kind in ("rank_deficient", "constant_rows", "random")], dim=1)
    sketched, exact = decompose_randomised(bias, None, 8), decompose(bias, None)
    assert sketched.rank.tolist() == [[2, 0, 8]]
    assert sketched.left.shape == sketched.right.shape == (1, 3, 63, 8)
    scale = bias.double().flatten(2).norm(dim=-1, keepdim=True)
    assert ((sketched.values - exact.values[..., :8])[:, :2].abs() <= 1e-6 * scale[:, :2]).all()
    phi_q, phi_k = sketched.truncate(torch.tensor([[1, 0, 3]]))
    assert phi_q.shape[-1] == 3
    assert not phi_q[0, 0, :, 1:].any()
    torch.testing.assert_close(phi_q.norm(dim=-2), phi_k.norm(dim=-2))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 12),
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
    zeroed, filled = (decompose_randomised(bias.masked_fill(~pairs, x), keep, rank) for x in (0.0, fill))
    for one, other in zip(zeroed.truncate(rank), filled.truncate(rank), strict=True):
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
    overlap = basis.double().mT @ basis.double()
    assert torch.linalg.eigvalsh(overlap).amax() < 1 + 1e-5
    left = few - basis @ (basis.mT @ few)
    assert left[0].norm() < 1e-4 * few[0].norm()

    graded = torch.randn(200, 8, generator=generator) * torch.logspace(0, -5, 8)
    basis = orthogonalised(graded).double()
    torch.testing.assert_close(basis.mT @ basis, torch.eye(8).double(), atol=0.02, rtol=0)
