import pytest
import torch
from biases import make_bias, make_qkv, total_variation

from pairformer_fast.bias import certify
from pairformer_fast.bias.structured import (
    added,
    alibi,
    inner_product,
    outer_sum,
    relative_position,
    squared_distance,
)
from pairformer_fast.bias.toeplitz import toeplitz
from pairformer_fast.kernels.flash_bias import Factors, flash_bias_attention


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_exact(factors, dense, rank):
    assert factors.phi_q.shape[-1] == factors.phi_k.shape[-1] == rank
    product = factors.phi_q @ factors.phi_k.mT
    assert product.shape == dense.shape
    torch.testing.assert_close(product, dense, rtol=0, atol=1e-12 * max(1.0, dense.abs().max().item()))


@pytest.mark.parametrize("tokens", [1, 2, 17, 300])
@pytest.mark.parametrize("batch", [1, 3])
def test_alibi(tokens, batch):
    slopes = torch.tensor([-0.5, 2**-8, 0.3, 0.0], dtype=torch.float64)
    i = torch.arange(tokens).double()
    dense = slopes[:, None, None] * (i[:, None] - i)
    assert_exact(alibi(slopes, tokens, batch), dense.expand(batch, -1, -1, -1), 2)


def test_alibi_is_exact_in_bf16_up_to_512_tokens():
    i = torch.arange(512).double()
    factors = alibi(torch.tensor([-0.25]).bfloat16(), 512)
    assert torch.equal(factors.phi_q.double() @ factors.phi_k.double().mT, (-0.25 * (i[:, None] - i))[None, None])


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 64), (3, 17)])
def test_squared_distance(channels, batch, tokens):
    points, weight = 20 * draw(batch, tokens, channels), draw(4, seed=1)
    square = (points[:, :, None] - points[:, None]).square().sum(-1)
    assert_exact(squared_distance(points, weight), weight[:, None, None] * square[:, None], channels + 2)


def test_squared_distance_far_from_the_origin_keeps_its_digits():
    points, weight = 1000 + 10 * draw(1, 40, 3), torch.ones(1, dtype=torch.float64)
    square = (points[:, :, None] - points[:, None]).square().sum(-1)
    moved = squared_distance(points.float(), weight.float())
    rounded = (points.float().double()[:, :, None] - points.float().double()[:, None]).square().sum(-1)
    error = (moved.phi_q.double() @ moved.phi_k.double().mT - rounded[:, None]).abs().max()
    assert error < 1e-5 * square.max()  # without centring 1e-6 of the squared norms, which are 500 times larger


def test_squared_distance_ignores_padding():
    points, weight = draw(2, 12, 3), draw(2, seed=1)
    mask = torch.arange(12)[None] < torch.tensor([[12], [7]])
    padded = points.masked_fill(~mask[..., None], torch.nan)
    factors = squared_distance(padded, weight, mask)
    alone = squared_distance(points[1:, :7], weight)
    torch.testing.assert_close(factors.phi_q[1:, :, :7], alone.phi_q)
    torch.testing.assert_close(factors.phi_k[1:, :, :7], alone.phi_k)
    assert not factors.phi_q[1, :, 7:].any()
    assert not factors.phi_k[1, :, 7:].any()


def test_products_of_features():
    a, b = draw(2, 3, 17), draw(2, 3, 17, seed=1)
    assert_exact(outer_sum(a, b), a[..., :, None] + b[..., None, :], 2)

    u, v = draw(2, 3, 17, 5), draw(2, 3, 17, 5, seed=1)
    assert_exact(inner_product(u, v), torch.einsum("bhic,bhjc->bhij", u, v), 5)
    assert_exact(
        inner_product(u[:, 0], v[:, 0], draw(4)), torch.einsum("bic,bjc,h->bhij", u[:, 0], v[:, 0], draw(4)), 5
    )
    assert_exact(
        inner_product(u, v, draw(3, 5, seed=2)), torch.einsum("bhic,bhjc,hc->bhij", u, v, draw(3, 5, seed=2)), 5
    )


def test_sums_of_closed_forms_go_through_attention():
    slopes, points = torch.tensor([-0.5, 0.3], dtype=torch.float64), draw(2, 17, 3)
    parts = alibi(slopes, 17, 2), squared_distance(points, slopes)
    dense = sum(part.phi_q @ part.phi_k.mT for part in parts)
    assert_exact(added(*parts), dense, 7)
    q, k, v = make_qkv(2, 4, 17, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(flash_bias_attention(q, k, v, added(*parts)), flash_bias_attention(q, k, v, dense))
    with pytest.raises(ValueError, match="neither a table"):
        added(parts[0], Factors(parts[0].phi_q, parts[0].phi_k, table=draw(2, 3)))


@pytest.mark.parametrize("arguments", [(torch.ones(2, 3), 4), (torch.ones(2, dtype=torch.int64), 4)])
def test_slopes_of_the_wrong_kind(arguments):
    with pytest.raises(ValueError, match=r"slopes must be floating point \[H\]"):
        alibi(*arguments)


@pytest.mark.parametrize("width", [0, 1, 8, 40])
@pytest.mark.parametrize("tokens", [1, 9, 33])
def test_a_table_and_constants_per_row_leave_nothing(width, tokens):
    table = draw(3, 2 * width + 1)
    bias = toeplitz(table, tokens) + 100 * draw(2, 3, tokens, 1, seed=1)
    mask = torch.rand(2, 5, tokens, generator=torch.Generator().manual_seed(0)) < 0.5
    found, rest = relative_position(bias, width, mask)
    nothing = torch.zeros(2, 3, tokens, 1, dtype=torch.float64)
    assert certify(rest, nothing, nothing, mask).eps.max() < 1e-10
    assert certify(bias, nothing, nothing, mask, found).eps.max() < 1e-10


def test_table_is_the_least_squares_solution():
    bias, mask = draw(2, 3, 15, 15), torch.arange(15)[None] < torch.tensor([[15], [11]])
    bias[1, :, 11:] = torch.nan
    table, rest = relative_position(bias, 4, mask)

    def loss(t):
        total = 0.0
        for entry, size in enumerate((15, 11)):
            left = bias[entry, :, :size, :size] - toeplitz(t, size)
            total = total + (left - left.mean(-1, keepdim=True)).square().sum()
        return total

    best = table.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(best), best)
    assert gradient.abs().max() < 1e-9 < 1 < loss(torch.zeros_like(table)) - loss(table)
    assert not rest[1, :, 11:].any()
    assert not rest[1, :, :, 11:].any()
    torch.testing.assert_close(rest[0] + toeplitz(table, 15), bias[0])


def test_certificate_covers_factors_beside_a_table():
    bias = make_bias("random", 1, 2, 12, dtype=torch.float64)
    table, rest = relative_position(bias, 3)
    q, k, _ = make_qkv(1, 2, 12, 2, 8)
    phi_q = phi_k = torch.zeros(1, 2, 12, 1, dtype=torch.float64)
    certificate = certify(bias, phi_q, phi_k, None, table)
    torch.testing.assert_close(certificate.eps_row, (rest.amax(-1) - rest.amin(-1)) / 2)
    moved = total_variation(q, k, bias, toeplitz(table, 12)[None], torch.ones(1, 2, 12, dtype=torch.bool))
    assert (moved.amax((1, 3)) <= certificate.bound).all()


def test_negative_width_is_an_error():
    with pytest.raises(ValueError, match="width must be 0 or more"):
        relative_position(make_bias("random", 1, 1, 4), -1)
