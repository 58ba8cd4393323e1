import math

import pytest
import torch
from biases import KINDS, attention_weights, make_bias, make_qkv, total_variation
from hypothesis import given, settings
from hypothesis import strategies as st

from pairformer_fast.bias import certify
from pairformer_fast.bias.certificate import TILE
from pairformer_fast.bias.svd import decompose


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 20),
    rank=st.integers(1, 20),
    keep_share=st.sampled_from([1.0, 0.7, 0.2, 0.0]),
    scale=st.sampled_from([0.0, 1.0, 10.0]),
    seed=st.integers(0, 2**16),
)
def test_observed_change_never_exceeds_the_bound(kind, tokens, rank, keep_share, scale, seed):
    bias = make_bias(kind, 2, 3, tokens, seed)
    q, k, _ = make_qkv(2, 3, tokens, 3, 4, seed=seed)
    mask = torch.rand(2, 3, tokens, generator=torch.Generator().manual_seed(seed)) < keep_share
    phi_q, phi_k = decompose(bias, mask).truncate(rank)

    certificate = certify(bias, phi_q, phi_k, mask)
    moved = total_variation(scale * q, k, bias, phi_q.double() @ phi_k.double().mT, mask)  # [B, I, H, N]
    moved = moved.masked_fill(~mask.any(1)[:, None, None, :], 0).nan_to_num(0)
    assert (moved.amax(1) <= torch.tanh(certificate.eps_row / 2) + 1e-9).all()
    assert (moved.amax((1, 3)) <= certificate.bound + 1e-9).all()


@pytest.mark.parametrize("eps", [1e-3, 0.5, 3.0])
def test_bound_is_attained_by_two_keys(eps):
    """Log-odds of -eps before and +eps after the change: a smaller bound would be wrong."""
    bias = torch.tensor([[0.0, eps], [0.0, eps]], dtype=torch.float64)[None, None]
    changed = torch.tensor([[0.0, -eps], [0.0, -eps]], dtype=torch.float64)[None, None]
    zero, mask = torch.zeros(1, 1, 2, 1, 1), torch.ones(1, 1, 2, dtype=torch.bool)
    certificate = certify(bias, changed, torch.eye(2).double()[None, None], mask)
    assert certificate.eps.item() == pytest.approx(eps)
    assert certificate.bound.item() == pytest.approx(math.tanh(eps / 2))
    assert total_variation(zero, zero, bias, changed, mask).max().item() == pytest.approx(math.tanh(eps / 2))


def test_constant_per_row_is_free():
    bias = make_bias("constant_rows", 1, 2, 9, dtype=torch.float64)
    nothing = torch.zeros(1, 2, 9, 1, dtype=torch.float64)
    assert certify(bias, nothing, nothing, None).eps.max() < 1e-12


def test_rows_have_their_own_eps():
    bias = torch.zeros(1, 1, 4, 4)
    bias[0, 0, 2, 1] = 6.0
    nothing = torch.zeros(1, 1, 4, 1)
    assert certify(bias, nothing, nothing, None).eps_row[0, 0].tolist() == [0, 0, 3, 0]


def test_masked_keys_and_padded_queries_do_not_count():
    bias = torch.zeros(1, 1, 4, 4)
    bias[..., 3] = torch.nan
    bias[..., 3, :] = torch.inf
    nothing = torch.zeros(1, 1, 4, 1)
    mask = torch.tensor([[True, True, True, False]])
    assert certify(bias, nothing, nothing, mask).eps_row.tolist() == [[[0, 0, 0, 0]]]
    assert certify(bias, nothing, nothing, torch.zeros_like(mask)).eps.item() == 0


def test_swapped_heads_are_detected():
    bias = make_bias("random", 1, 2, 17)
    phi_q, phi_k = decompose(bias, None).truncate(17)
    assert certify(bias, phi_q, phi_k, None).bound.max() < 1e-4
    assert certify(bias, phi_q.flip(1), phi_k.flip(1), None).bound.min() > 0.5


def test_certificate_covers_factors_rounded_to_bf16():
    bias = make_bias("random", 1, 2, 17, dtype=torch.bfloat16)
    phi_q, phi_k = decompose(bias, None).truncate(17)
    assert phi_q.dtype == torch.bfloat16
    q, k, _ = make_qkv(1, 2, 17, 2, 8)
    mask = torch.ones(1, 2, 17, dtype=torch.bool)
    certificate = certify(bias, phi_q, phi_k, mask)
    moved = total_variation(q, k, bias, phi_q.double() @ phi_k.double().mT, mask)
    assert 1e-4 < moved.max() <= certificate.bound.max()
    assert attention_weights(q, k, bias, mask).sum(-1).allclose(torch.ones(()).double())


@pytest.mark.parametrize("tokens", [1, 64, 150])
@pytest.mark.parametrize("keep_share", [1.0, 0.5, 0.0])
def test_eps_of_a_tile_is_the_farthest_from_the_middle_of_its_rows(tokens, keep_share):
    bias, nothing = make_bias("random", 2, 2, tokens), torch.zeros(2, 2, tokens, 1)
    keep = torch.rand(2, tokens, generator=torch.Generator().manual_seed(0)) < keep_share
    kept = bias.double().masked_fill(~(keep[:, :, None] & keep[:, None, :]).unsqueeze(1), torch.nan)
    certificate = certify(kept.nan_to_num(1e9), nothing, nothing, keep)
    for b, h in ((0, 0), (1, 1)):
        rows = [row[row.isfinite()] for row in kept[b, h]]
        middle = torch.stack([(row.max() + row.min()) / 2 if len(row) else torch.zeros(()).double() for row in rows])
        distance = (kept[b, h] - middle[:, None]).abs().nan_to_num(0)
        want = [[tile.max() for tile in line.split(TILE, dim=1)] for line in distance.split(TILE)]
        torch.testing.assert_close(certificate.eps_tile[b, h], torch.tensor(want).double())
    torch.testing.assert_close(certificate.eps_tile.amax((-2, -1)), certificate.eps)
    if keep_share == 1:
        torch.testing.assert_close(certify(bias, nothing, nothing, None).eps_tile, certificate.eps_tile)


def test_a_tile_left_to_the_factors_moves_no_weights_by_more_than_its_bound():
    bias = make_bias("block_sparse", 1, 2, 130, dtype=torch.float64)
    q, k, _ = make_qkv(1, 2, 130, 2, 4)
    factors = decompose(bias, None).truncate(8)
    product = factors[0] @ factors[1].mT
    certificate = certify(bias, *factors, None)
    residual = bias - product
    middle = (residual.amax(-1, keepdim=True) + residual.amin(-1, keepdim=True)) / 2
    mask = torch.ones(1, 2, 130, dtype=torch.bool)
    for row in range(3):
        for column in range(3):
            tile = (..., slice(row * TILE, (row + 1) * TILE), slice(column * TILE, (column + 1) * TILE))
            mixed = (bias - middle).clone()
            mixed[tile] = product[tile]
            moved = total_variation(q, k, bias, mixed, mask).amax((1, 3))
            assert (moved > 0).all()
            assert (moved <= torch.tanh(certificate.eps_tile[..., row, column] / 2) + 1e-9).all()
