"""What is measured of one pair bias, against biases whose answers are known."""

import pytest
import torch

from pairformer_fast.bias import BiasFactors, PairBiasAttention, certify, observed_decisions
from pairformer_fast.config import AttentionConfig, Backend, BiasMethod
from pairformer_fast.inference.bias_inspection import TILE, AttentionInspection, inspect_decision, tile_maps

TOKENS, HEADS = 150, 2
EVERY_METHOD = (BiasMethod.SVD, BiasMethod.RANDOMISED, BiasMethod.STRUCTURED, BiasMethod.LANDMARK)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inspect(table, methods=(BiasMethod.SVD,), mask=None, **config) -> AttentionInspection:
    """Inspection of one call of attention with 5 rows."""
    core, found = PairBiasAttention().eval(), []
    core.config = AttentionConfig(backend=Backend.TORCH, **config)
    heads, tokens = table.shape[1:3]
    q, k, v = (draw(1, 5, tokens, heads, 8, seed=seed) for seed in (1, 2, 3))
    with torch.no_grad(), observed_decisions(core, lambda _, decision: found.append(decision)):
        core(q, k, v, table, mask)
    return inspect_decision("core", found[0], methods)


def low_rank(rank: int) -> torch.Tensor:
    return draw(1, HEADS, TOKENS, rank) @ draw(1, HEADS, rank, TOKENS, seed=4) / rank**0.5


def test_a_bias_of_rank_three_shows_it():
    result = inspect(low_rank(3), EVERY_METHOD, bias="svd", tolerance=0.01)
    assert (result.name, result.tokens, result.heads, result.choice) == ("core", TOKENS, HEADS, "factors")
    assert result.factors.rank == result.used.rank == [3, 3]
    for spectrum in result.spectrum:
        assert len(spectrum.values) == len(spectrum.energy) == TOKENS
        assert spectrum.values[2] > 1e3 * spectrum.values[3]
        assert spectrum.energy[1] < 0.99 < spectrum.energy[2] == pytest.approx(1)
    at_four = [rung for rung in result.ladder if rung.at == 4]
    assert [rung.method for rung in at_four] == list(EVERY_METHOD)
    exact = [rung for rung in at_four if rung.method is not BiasMethod.STRUCTURED]
    assert max(max(rung.probed_max + rung.bound) for rung in exact) < 1e-4
    assert not any(flag for tile_map in result.tiles for row in tile_map.dense for flag in row)
    assert result.dense_share == 0


def test_energy_and_values_are_those_of_the_row_centred_bias():
    bias = draw(1, HEADS, TOKENS, TOKENS)
    result = inspect(bias + 50 * draw(1, HEADS, TOKENS, 1), bias="svd", rank=4)
    exact = torch.linalg.svdvals((bias - bias.mean(-1, keepdim=True))[0].double())
    torch.testing.assert_close(torch.tensor([s.values for s in result.spectrum]).double(), exact, rtol=1e-4, atol=1e-3)
    share = exact.square().cumsum(-1) / exact.square().sum(-1, keepdim=True)
    torch.testing.assert_close(torch.tensor([s.energy for s in result.spectrum]).double(), share, rtol=1e-4, atol=0)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_the_bound_is_never_below_the_observed_error(masked):
    keep = torch.ones(1, 5, TOKENS, dtype=torch.bool)
    keep[..., -20:] = not masked
    bias = 2 * draw(1, HEADS, TOKENS, TOKENS)
    bias[:, :, 40:60] *= 5
    result = inspect(bias, EVERY_METHOD, keep, bias="svd", rank=8)
    assert [rung.at for rung in result.ladder] == [4, 8, 16, 32, 64, 128] * len(EVERY_METHOD)
    for quality in (result.used, result.factors, *result.ladder):
        for mean, most, bound in zip(quality.probed_mean, quality.probed_max, quality.bound, strict=True):
            assert 0 < mean <= most <= bound + 1e-6
        assert quality.bound == pytest.approx(torch.tensor(quality.eps).div(2).tanh().tolist(), abs=1e-6)
    svd = [rung.probed_mean[0] for rung in result.ladder if rung.method is BiasMethod.SVD]
    assert svd == sorted(svd, reverse=True)
    assert result.ladder[1].model_dump(exclude={"method", "at"}) == result.factors.model_dump()


def spiked() -> tuple[torch.Tensor, BiasFactors]:
    """A bias of rank 2 with two spikes that its factors lack, and the factors."""
    phi_q, phi_k = draw(1, 1, TOKENS, 2).double(), draw(1, 1, TOKENS, 2, seed=4).double()
    bias = phi_q @ phi_k.mT
    bias[0, 0, 10, 70] += 3
    bias[0, 0, 140, 5] += 0.1
    rank = torch.full((1, 1), 2)
    return bias, BiasFactors(phi_q, phi_k, rank, certify(bias, phi_q, phi_k, None))


def test_tiles_above_the_tolerance_are_flagged():
    bias, factors = spiked()
    (tile_map,) = tile_maps(bias, factors, None, 0.1)
    spikes = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    torch.testing.assert_close(torch.tensor(tile_map.deviation), spikes, atol=1e-6, rtol=0)
    assert tile_map.dense == (spikes > 1).tolist()
    assert tile_maps(bias, factors, None, 0.02)[0].dense == (spikes > 0).tolist()
    assert not any(map(any, tile_maps(bias, factors, None, 1.0)[0].dense))


def test_padding_has_no_part_in_the_tiles():
    bias, factors = spiked()
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    mask[:, 70] = False
    bias[:, :, :, 70] = torch.nan
    (tile_map,) = tile_maps(bias, factors, mask, 0.1)
    assert torch.tensor(tile_map.deviation)[0].max() < 1e-6
    assert not any(map(any, tile_map.dense))


def test_flagged_tiles_kept_dense_bring_the_certificate_within_the_tolerance():
    bias, tolerance = draw(1, HEADS, TOKENS, TOKENS) * torch.linspace(0, 1, TOKENS)[:, None].pow(2), 0.2
    result = inspect(bias, bias="svd", rank=16, tolerance=tolerance)
    assert 0 < result.dense_share < 1
    centred = (bias - bias.mean(-1, keepdim=True)).double()
    left, values, right = torch.linalg.svd(centred)
    residual = (left[..., 16:] * values[..., None, 16:]) @ right[..., 16:, :]
    flags = torch.tensor([tile_map.dense for tile_map in result.tiles])
    dense = flags.repeat_interleave(TILE, 1).repeat_interleave(TILE, 2)[:, :TOKENS, :TOKENS]
    mixed = torch.where(dense, residual.median(-1, keepdim=True).values, residual)
    bound = torch.tanh((mixed.amax(-1) - mixed.amin(-1)).max() / 4)
    assert tolerance / 2 < bound <= tolerance


def test_a_dense_bias_is_judged_by_the_factors_in_its_place():
    bias = draw(1, HEADS, 70, 70) * 3
    result = inspect(bias, bias="auto", tolerance=0.01)
    assert (result.choice, result.factors_method) == ("dense", BiasMethod.RANDOMISED)
    assert result.dense_heads == [0, 1]
    assert result.reason.startswith("triangle attention of 70 tokens with factors of rank")
    assert (
        f"making them {result.predicted_cost.making:.2f} (measured on {result.predicted_cost.device})" in result.reason
    )
    assert result.used.rank == [70, 70]
    assert result.used.eps == [0, 0]
    assert min(result.factors.rank) > 35
    assert max(result.factors.probed_mean) <= 0.01
    dense = inspect(bias, bias="dense")
    assert (dense.choice, dense.reason, dense.factors_method) == ("dense", "asked for", BiasMethod.SVD)
    assert max(dense.factors.probed_mean) <= 0.1
    assert dense.dense_share > 0


def test_heads_that_stay_dense_are_named_and_judged_by_the_factors_in_their_place():
    bias = torch.cat([low_rank(3)[:, :1], 3 * draw(1, 1, TOKENS, TOKENS)], dim=1)
    result = inspect(bias, bias="svd", tolerance=0.05)
    assert (result.choice, result.dense_heads, result.reason) == ("factors", [1], None)
    assert result.used.rank == [3, TOKENS]
    assert result.used.eps[1] == 0
    assert result.factors.rank[0] == 3
    assert result.factors.rank[1] > TOKENS / 2
    assert max(result.factors.probed_mean) <= 0.05


def test_a_table_belongs_to_the_factors():
    index = torch.arange(TOKENS)
    band = -((index[:, None] - index).abs().clamp(max=32) * 1.0).expand(1, HEADS, -1, -1).contiguous()
    result = inspect(band, [BiasMethod.STRUCTURED], bias="structured", rank=4)
    assert result.factors_method is BiasMethod.STRUCTURED
    assert torch.tensor([tile_map.deviation for tile_map in result.tiles]).max() < 1e-3
    assert result.dense_share == 0


def test_few_tokens_and_constant_biases():
    for tokens in (1, 3):
        result = inspect(torch.full((1, HEADS, tokens, tokens), 7.0), bias="svd")
        assert [rung.at for rung in result.ladder] == [tokens]
        assert all(spectrum.energy == [1.0] * tokens for spectrum in result.spectrum)
        assert (result.factors.rank, result.dense_share) == ([0, 0], 0)


def test_observers_see_decisions_in_evaluation_mode_while_the_block_lasts():
    model = torch.nn.ModuleDict({"a": PairBiasAttention(), "b": PairBiasAttention()}).eval()
    q, bias, seen = draw(1, 9, HEADS, 8), draw(1, HEADS, 9, 9), []

    def attend():
        with torch.no_grad():
            return [core(q, q, q, bias, None) for core in model.values()]

    before = attend()
    with observed_decisions(model, lambda name, decision: seen.append((name, decision))):
        assert all(map(torch.equal, attend(), before))
        model["b"].train()
        attend()
    attend()
    with pytest.raises(RuntimeError, match="stop"), observed_decisions(model, lambda *_: None):
        raise RuntimeError("stop")
    assert not any(core._observer for core in model.values())
    assert [name for name, _ in seen] == ["a", "b", "a"]
    assert seen[0][1].outcome.bias is bias
    assert seen[0][1].report == model["a"].report[1]


def test_batches_and_broken_biases_are_refused():
    core, found = PairBiasAttention().eval(), []
    q = draw(2, 9, HEADS, 8)
    with torch.no_grad(), observed_decisions(core, lambda _, decision: found.append(decision)):
        core(q, q, q, draw(2, HEADS, 9, 9), None)
        core(q[:1], q[:1], q[:1], torch.full((1, HEADS, 9, 9), torch.inf), None)
    with pytest.raises(ValueError, match="batch of one"):
        inspect_decision("core", found[0], [BiasMethod.SVD])
    with pytest.raises(ValueError, match="NaN or infinite"):
        inspect_decision("core", found[1], [BiasMethod.SVD])
