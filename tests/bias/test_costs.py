import json

import pytest
import torch
from biases import make_bias, make_qkv

from pairformer_fast.bias import PairBiasAttention, collect_reports
from pairformer_fast.bias.attention import BiasReport
from pairformer_fast.bias.costs import AttentionCosts, predicted_cost
from pairformer_fast.bias.policy import factorize
from pairformer_fast.config import AttentionConfig, Backend


@pytest.fixture
def costs():
    return AttentionCosts.shipped()


def test_the_table_is_what_the_script_makes_of_the_benchmark(costs, script, repository):
    made = script("make_attention_costs")
    rows = json.loads((repository / costs.source).read_text(encoding="utf-8"))
    assert AttentionCosts.model_validate(made.costs(rows)) == costs


def test_measured_points_come_back(costs, repository):
    rows = json.loads((repository / costs.source).read_text(encoding="utf-8"))

    def ms(section, impl, n):
        (row,) = (
            row
            for row in rows
            if (row.get("section"), row["impl"], row.get("n"), row.get("direction")) == (section, impl, n, "fwd")
        )
        return row["ms_median"]

    for form, section, n in (("triangle", "targets", 1024), ("triangle", "sizes", 256), ("single", "single", 2048)):
        dense = ms(section, "pairformer_fast dense", n)
        factors, mixed = (ms(section, f"pairformer_fast {kind}", n) / dense for kind in ("factors", "mixed"))
        assert costs.factors(form, n, 32) == pytest.approx(factors, rel=1e-3)
        assert costs.mixed(form, n, 32, 0.25) == pytest.approx(mixed, rel=1e-3)


def test_between_and_beyond_what_is_measured(costs):
    low, between, high = (costs.factors("triangle", n, 32) for n in (1024, 1500, 2048))
    assert high < between < low
    assert costs.factors("triangle", 10**6, 32) == costs.factors("triangle", 4096, 32)
    assert costs.factors("triangle", 1, 1) == costs.factors("triangle", 256, 8)
    assert (
        costs.factors("triangle", 1024, 32) < costs.factors("triangle", 1024, 48) < costs.factors("triangle", 1024, 64)
    )
    assert costs.factors("triangle", 1024, 97) is None
    assert costs.mixed("triangle", 1024, 97, 0.5) is None


def test_auto_misses_nothing_by_keeping_the_dense_bias_on_gpus(costs):
    """The policy's reasons: dense tiles never pay in triangle attention, factors leave no time below 2048 tokens."""
    for n in costs.triangle.dense:
        assert min(costs.mixed("triangle", n, 16, share) for share in (0.0, 0.1, 0.5, 1.0)) > 1
        left = costs.triangle.dense[n] - costs.triangle.factors[n]
        assert left < 0.11 if n <= 1024 else left > 1.5


def test_reports_predict_where_the_kernels_of_the_table_run():
    bias, (q, k, _) = make_bias("random", 1, 2, 17), make_qkv(1, 17, 17, 2, 8)
    outcome = factorize(bias, AttentionConfig(bias="svd", rank=3), q, k, None)
    assert 0.9 < BiasReport.of(outcome, Backend.TRITON, q).predicted_cost < 1
    assert BiasReport.of(outcome, Backend.TORCH, q).predicted_cost is None
    dense = factorize(bias, AttentionConfig(bias="dense"), q, k, None)
    assert BiasReport.of(dense, Backend.TRITON, q).predicted_cost == 1
    single = torch.empty(1, 2048, 16, 24)
    assert predicted_cost(Backend.TRITON, single, 32) == pytest.approx(0.73, abs=0.01)

    module = PairBiasAttention().eval()
    module(q, k, q, bias, None)
    assert collect_reports(module)[0]["predicted_cost"] is None
