import json

import pytest
import torch
from biases import make_bias, make_qkv

from pairformer_fast.bias.attention import BiasReport
from pairformer_fast.bias.costs import AttentionCosts, predicted_cost, shipped
from pairformer_fast.bias.policy import factorize
from pairformer_fast.config import AttentionConfig, Backend


@pytest.fixture(params=["gpu", "cpu"])
def costs(request):
    return shipped()[request.param]


def test_the_tables_are_what_the_script_makes_of_the_benchmarks(script):
    made = script("make_attention_costs").tables()
    assert {device: AttentionCosts.model_validate(table) for device, table in made.items()} == shipped()


def test_measured_points_come_back(costs, repository):
    rows = [row for source in costs.sources for row in json.loads((repository / source).read_text(encoding="utf-8"))]

    def ms(form, impl, n):
        """Of as many rows as N; of the only row of attention that is not triangle attention."""
        (row,) = (
            row
            for row in rows
            if row["op"] == f"{form}_attention"
            and (row["impl"], row.get("n"), row["direction"], row["dtype"]) == (impl, n, "fwd", dtype)
            and row["section"] in ("targets", "sizes", "single")
        )
        return row["ms_median"] * n / (row["rows"] or n)

    dtype = "bfloat16" if costs is shipped()["gpu"] else "float32"
    for form, n in (("triangle", 1024), ("triangle", 256), ("single", 1024)):
        dense = ms(form, "pairformer_fast dense", n)
        factors, mixed = (ms(form, f"pairformer_fast {kind}", n) / dense for kind in ("factors", "mixed"))
        assert costs.factors(form, n, 32) == pytest.approx(factors, rel=1e-3)
        assert costs.mixed(form, n, 32, 0.25) == pytest.approx(mixed, rel=1e-3)
    for form, n in (("triangle", 1024), ("single", 1024)):
        (made,) = {
            row["ms_median"]
            for row in rows
            if row["impl"] == f"pairformer_fast {costs.method}, checked and certified"
            and (row["n"], row["rank"], row.get("form", form)) == (n, 32, form)
        }
        assert costs.making(form, n) == pytest.approx(made / ms(form, "pairformer_fast dense", n), rel=1e-3)


def test_between_and_beyond_what_is_measured(costs):
    sizes, ranks = sorted(costs.triangle.dense), sorted(costs.by_rank)
    low, between, high = (costs.factors("triangle", n, 32) for n in (1024, 1500, 2048))
    assert sorted([low, between, high])[1] == between
    assert costs.factors("triangle", 10**6, 32) == costs.factors("triangle", sizes[-1], 32)
    assert costs.making("triangle", 10**6) == costs.making("triangle", sizes[-1])
    assert costs.factors("triangle", 1, 1) == costs.factors("triangle", sizes[0], int(ranks[0]))
    assert (
        costs.factors("triangle", 1024, 32) < costs.factors("triangle", 1024, 48) < costs.factors("triangle", 1024, 64)
    )
    assert costs.factors("triangle", 1024, int(ranks[-1]) + 1) is None
    assert costs.mixed("triangle", 1024, int(ranks[-1]) + 1, 0.5) is None


def test_dense_tiles_never_pay_in_triangle_attention_on_gpus():
    """What the policy says of them."""
    costs = shipped()["gpu"]
    for n in costs.triangle.dense:
        assert min(costs.mixed("triangle", n, 16, share) for share in (0.0, 0.1, 0.5, 1.0)) > 1


def test_reports_predict_by_the_table_of_what_ran():
    bias, (q, k, _) = make_bias("random", 1, 2, 17), make_qkv(1, 17, 17, 2, 8)
    outcome = factorize(bias, AttentionConfig(bias="svd", rank=3), q, k, None)
    assert 0.9 < BiasReport.of(outcome, Backend.TRITON, q).predicted_cost < 1
    assert BiasReport.of(outcome, Backend.TORCH, q).predicted_cost > 1.3
    assert BiasReport.of(outcome, Backend.REFERENCE, q).predicted_cost is None
    dense = factorize(bias, AttentionConfig(bias="dense"), q, k, None)
    for backend in (Backend.TRITON, Backend.TORCH, Backend.REFERENCE):
        assert BiasReport.of(dense, backend, q).predicted_cost == 1
    single = torch.empty(1, 2048, 16, 24)
    assert predicted_cost(Backend.TRITON, single, 32) == pytest.approx(0.73, abs=0.01)
    assert predicted_cost(Backend.TRITON, single, 32, 0.25) == pytest.approx(0.89, abs=0.01)
    assert predicted_cost(Backend.TORCH, single.to("meta"), 32) is None
