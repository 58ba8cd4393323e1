import pytest
import torch
from biases import KINDS, make_bias
from hypothesis import given, settings
from hypothesis import strategies as st

from pairformer_fast.bias.svd import decompose


def centred(bias):
    return bias.double() - bias.double().mean(-1, keepdim=True)


@pytest.mark.parametrize("tokens", [1, 17, 63])
@pytest.mark.parametrize("kind", KINDS)
def test_truncation_is_optimal_at_every_rank(kind, tokens):
    """Eckart-Young: the squared residual is the tail of the squared singular values."""
    bias = make_bias(kind, 2, 2, tokens, dtype=torch.float64)
    spectrum = decompose(bias, None)
    values = torch.linalg.svdvals(centred(bias))
    scale = bias.abs().max() * tokens
    torch.testing.assert_close(spectrum.values, values, atol=1e-8 * scale, rtol=0)
    for rank in {1, 4, tokens // 2 + 1, tokens}:
        phi_q, phi_k = spectrum.truncate(rank)
        residual = torch.linalg.vector_norm(centred(bias) - phi_q @ phi_k.mT, dim=(-2, -1))
        best = values[..., rank:].square().sum(-1).sqrt()
        torch.testing.assert_close(residual, best, atol=1e-8 * scale, rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_is_the_bias_in_fp32(kind):
    bias = make_bias(kind, 2, 3, 63)
    phi_q, phi_k = decompose(bias, None).truncate(63)
    product = phi_q.double() @ phi_k.double().mT
    torch.testing.assert_close(product, centred(bias), atol=1e-6 * bias.abs().max().item(), rtol=0)


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_stays_low_rank(rank):
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 1, 2, 17, rank, generator=generator)
    bias = factors[0] @ factors[1].mT
    spectrum = decompose(bias, None)
    assert spectrum.rank.tolist() == [[rank, rank]]
    phi_q, phi_k = spectrum.truncate(17)
    assert phi_q.shape == phi_k.shape == (1, 2, 17, rank)
    torch.testing.assert_close(phi_q @ phi_k.mT, centred(bias).float(), atol=1e-5, rtol=0)


def test_constant_rows_have_rank_zero_and_finite_factors():
    spectrum = decompose(make_bias("constant_rows", 1, 2, 17), None)
    assert spectrum.rank.tolist() == [[0, 0]]
    phi_q, phi_k = spectrum.truncate(8)
    assert phi_q.shape == (1, 2, 17, 1)
    assert not phi_q.any()
    assert not phi_k.any()


def test_factors_share_the_singular_values_evenly():
    phi_q, phi_k = decompose(make_bias("random", 1, 2, 17), None).truncate(5)
    torch.testing.assert_close(phi_q.norm(dim=-2), phi_k.norm(dim=-2))


def test_ranks_per_head_leave_zero_columns():
    spectrum = decompose(make_bias("random", 1, 2, 17), None)
    phi_q, phi_k = spectrum.truncate(torch.tensor([[2, 6]]))
    assert phi_q.shape[-1] == phi_k.shape[-1] == 6
    assert not phi_q[0, 0, :, 2:].any()
    assert torch.equal(phi_q[0, 0, :, :2], spectrum.truncate(2)[0][0, 0])
    assert torch.equal(phi_k[0, 1], spectrum.truncate(6)[1][0, 1])


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 12),
    padding=st.integers(1, 6),
    rank=st.integers(1, 12),
    fill=st.sampled_from([0.0, 1e6, float("nan")]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_padding_never_changes_the_valid_part(kind, tokens, padding, rank, fill, dtype, seed):
    bias = make_bias(kind, 1, 2, tokens, seed, dtype)
    padded = torch.full((1, 2, tokens + padding, tokens + padding), fill, dtype=dtype)
    padded[..., :tokens, :tokens] = bias
    mask = torch.arange(tokens + padding)[None] < tokens

    alone, beside = decompose(bias, None), decompose(padded, mask)
    assert torch.equal(alone.rank, beside.rank)
    phi_q, phi_k = beside.truncate(rank)
    assert not phi_q[..., tokens:, :].any()
    assert not phi_k[..., tokens:, :].any()

    gap = (
        alone.values[..., min(rank, tokens) - 1] - torch.nn.functional.pad(alone.values, (0, 1))[..., min(rank, tokens)]
    )
    distinct = (gap > 1e-3 * alone.values[..., 0])[..., None, None]
    want_q, want_k = alone.truncate(rank)
    difference = phi_q[..., :tokens, :] @ phi_k[..., :tokens, :].mT - want_q @ want_k.mT
    # Between equal singular values the truncated part is not unique; everywhere else it must agree.
    assert (difference.abs() * distinct).max() <= 10 * torch.finfo(dtype).eps ** 0.75 * bias.abs().max()
