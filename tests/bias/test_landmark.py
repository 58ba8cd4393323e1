import pytest
import torch
from biases import KINDS, make_bias

from pairformer_fast.bias import BiasLines, certify, factorize_lines
from pairformer_fast.bias.landmark import COLUMNS_PER_RANK, ROWS_PER_RANK, SAMPLED_ROWS, Landmarks, decompose_lines
from pairformer_fast.bias.svd import decompose
from pairformer_fast.kernels.flash_bias import flash_bias_attention

CHOICES = list(Landmarks)


def keep_all(bias):
    return torch.ones(bias.shape[0], bias.shape[-1], dtype=torch.bool)


def frobenius(bias, phi_q, phi_k):
    residual = bias.double() - phi_q.double() @ phi_k.double().mT
    return torch.linalg.vector_norm(residual - residual.mean(-1, keepdim=True), dim=(-2, -1))


def test_lines_of_a_dense_bias():
    bias, tokens = make_bias("random", 2, 3, 9), torch.tensor([[4, 0], [8, 4]])
    lines = BiasLines.of(bias)
    for entry in range(2):
        assert torch.equal(lines.rows(tokens)[entry], bias[entry][:, tokens[entry]])
        assert torch.equal(lines.columns(tokens)[entry], bias[entry][:, :, tokens[entry]])


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("rank", [2, 5])
def test_a_bias_of_low_rank_is_found_from_few_lines(choice, rank):
    bias = make_bias("rank_deficient", 2, 3, 96, dtype=torch.float64) + make_bias("constant_rows", 2, 3, 96).double()
    factors = factorize_lines(BiasLines.of(bias), keep_all(bias), rank, choice)
    assert factors.rank.tolist() == [[2] * 3] * 2
    assert factors.phi_q.shape == factors.phi_k.shape == (2, 3, 96, 2)
    assert certify(bias, factors.phi_q, factors.phi_k, None).eps.max() < 1e-10
    assert factors.sampled_eps.max() < 1e-10


@pytest.mark.parametrize(("choice", "limit"), [("leverage", 1.9), ("even", 2.2)])
@pytest.mark.parametrize("rank", [8, 16])
def test_error_on_trained_biases_is_near_the_least(trained_biases, choice, limit, rank):
    for bias in trained_biases:
        factors = factorize_lines(BiasLines.of(bias), keep_all(bias), rank, choice)
        assert factors.phi_q.shape[-1] == rank
        least = frobenius(bias, *decompose(bias, None).truncate(rank))
        assert (frobenius(bias, factors.phi_q, factors.phi_k) < limit * least).all()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", KINDS)
def test_more_landmarks_than_tokens_are_exact(kind, choice):
    bias = make_bias(kind, 2, 2, 17)
    spectrum, landmarks = decompose_lines(BiasLines.of(bias), keep_all(bias), 5, choice)
    assert landmarks.shape == (2, 17)
    for found, want in zip(spectrum.truncate(17), decompose(bias, None).truncate(17), strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_bias_is_never_formed(choice):
    bias, asked = make_bias("random", 1, 2, 200), []
    dense = BiasLines.of(bias)

    def record(lines):
        def ask(tokens):
            asked.append(tokens.shape[1])
            return lines(tokens)

        return ask

    factorize_lines(BiasLines(record(dense.rows), record(dense.columns)), keep_all(bias), 4, choice)
    assert max(asked) <= 4 * max(ROWS_PER_RANK, COLUMNS_PER_RANK)
    assert sum(asked) <= 4 * (2 * COLUMNS_PER_RANK + ROWS_PER_RANK) + SAMPLED_ROWS


@pytest.mark.parametrize("choice", CHOICES)
def test_lines_of_a_pair_representation_are_projected_where_they_are_read(choice):
    generator = torch.Generator().manual_seed(0)
    z, weight = torch.randn(2, 200, 200, 6, generator=generator), torch.randn(3, 6, generator=generator)
    projected = []

    def project(lines):
        projected.append(lines.shape[1])
        return torch.nn.functional.linear(torch.nn.functional.layer_norm(lines, (6,)), weight)

    bias = project(z).permute(0, 3, 1, 2)
    lines, dense = BiasLines.projected(z, project), BiasLines.of(bias)
    tokens = torch.tensor([[4, 0], [199, 4]])
    torch.testing.assert_close(lines.rows(tokens), dense.rows(tokens))
    torch.testing.assert_close(lines.columns(tokens), dense.columns(tokens))
    projected.clear()
    factors = factorize_lines(lines, keep_all(bias), 4, choice)
    assert sum(projected) <= 4 * (2 * COLUMNS_PER_RANK + ROWS_PER_RANK) + SAMPLED_ROWS
    certificate = certify(bias, factors.phi_q, factors.phi_k, None)
    of_rows = certificate.eps_row.take_along_dim(factors.sampled_rows[:, None], dim=2)
    torch.testing.assert_close(factors.sampled_eps, of_rows, atol=1e-4, rtol=0)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_empty_entries(kind, choice):
    """Entries of 40, 8 (no more than landmarks), 1 and no tokens, with NaN around them."""
    bias, keep = make_bias(kind, 4, 2, 40), torch.arange(40)[None] < torch.tensor([[40], [8], [1], [0]])
    padded = bias.masked_fill(~(keep[:, :, None] & keep[:, None, :]).unsqueeze(1), torch.nan)
    factors = factorize_lines(BiasLines.of(padded), keep, 4, choice)
    alone = factorize_lines(BiasLines.of(bias[1:2, :, :8, :8]), keep[1:2, :8], 4, choice)
    for phi in (factors.phi_q, factors.phi_k):
        assert phi.isfinite().all()
        assert not phi.masked_fill(keep[:, None, :, None], 0).any()
    assert factors.rank[2:].tolist() == [[0, 0], [0, 0]]
    scale = 1 + bias.abs().max()
    found = certify(padded, factors.phi_q, factors.phi_k, keep)
    want = certify(bias[1:2, :, :8, :8], alone.phi_q, alone.phi_k, None)
    torch.testing.assert_close(found.eps[1:2], want.eps, atol=1e-4 * scale.item(), rtol=0)
    assert found.eps[2:].max() == 0


def test_sampled_error_is_that_of_the_rows_named():
    bias, keep = make_bias("block_sparse", 2, 3, 90), torch.arange(90)[None] < torch.tensor([[90], [60]])
    factors = factorize_lines(BiasLines.of(bias), keep, 6)
    certificate = certify(bias, factors.phi_q, factors.phi_k, keep)
    torch.testing.assert_close(
        factors.sampled_eps, certificate.eps_row.take_along_dim(factors.sampled_rows[:, None], dim=2)
    )
    assert keep.gather(1, factors.sampled_rows).all()
    _, landmarks = decompose_lines(BiasLines.of(bias), keep, 6)
    assert not (factors.sampled_rows[:, :, None] == landmarks[:, None]).any()
    assert (factors.sampled_eps.amax(-1) > 0.3 * certificate.eps).all()


@pytest.mark.parametrize("choice", CHOICES)
def test_repeats_bitwise_and_feeds_attention(choice):
    bias = make_bias("block_sparse", 1, 2, 80, dtype=torch.bfloat16)
    one, other = (factorize_lines(BiasLines.of(bias), keep_all(bias), 4, choice) for _ in range(2))
    assert torch.equal(one.phi_q, other.phi_q)
    assert one.phi_q.dtype == torch.bfloat16
    q = torch.ones(1, 3, 80, 2, 8, dtype=torch.bfloat16)
    dense = (one.phi_q.float() @ one.phi_k.float().mT).bfloat16()
    torch.testing.assert_close(flash_bias_attention(q, q, q, one), flash_bias_attention(q, q, q, dense))


def test_bad_input():
    bias = make_bias("random", 1, 2, 80)
    with pytest.raises(ValueError, match="rank must be 1 or more"):
        factorize_lines(BiasLines.of(bias), keep_all(bias), 0)
    with pytest.raises(ValueError, match=r"keep must be bool \[B, N\]"):
        factorize_lines(BiasLines.of(bias), keep_all(bias).float(), 4)
    with pytest.raises(ValueError, match="'random' is not a valid Landmarks"):
        factorize_lines(BiasLines.of(bias), keep_all(bias), 4, "random")
    with pytest.raises(ValueError, match="NaN or infinite between kept tokens"):
        factorize_lines(BiasLines.of(bias.masked_fill(bias == bias[0, 0, 0, 0], torch.inf)), keep_all(bias), 4)
