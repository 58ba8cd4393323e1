"""The benchmark of factorisations times no factors that are worse than documented, and writes rows of JSON."""

import json

import pytest
import torch


@pytest.fixture
def suite(script, monkeypatch: pytest.MonkeyPatch):
    """The suite at 192 tokens, where the exact decomposition is still measured."""
    module = script("benchmark_factorisation")
    monkeypatch.setattr(module, "SLOW_N", 192)
    return module


def test_rows_of_every_implementation(suite, meter) -> None:
    rows = list(suite.factorisation_rows((192,), torch.float32, torch.device("cpu"), meter, "abc"))
    assert len(rows) == len(suite.RANKS) * len(suite.IMPLEMENTATIONS)
    assert json.loads(json.dumps(rows)) == rows
    for row in rows:
        assert "error" not in row, row
        expected = (10.0, 10.0, "eager") if row["impl"] in suite.EAGER_ONLY else (1.0, 10.0, "graph")
        assert (row["ms_median"], row["ms_eager"], row["timing"]) == expected
        assert row["commit"] == "abc"
        assert -1e-5 < row["excess_error"] < (0.05 if row["impl"].startswith("pairformer_fast") else 0.5)
        assert suite.line(row).startswith(f"n=192 rank={row['rank']} {row['impl']} {expected[0]:g} ms as {expected[2]}")


def test_nothing_that_waits_for_the_device_is_captured(suite, meter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that fails leaves the random generator of the GPU unusable for the rows after it."""
    captured = []
    graph = meter.graph
    monkeypatch.setattr(meter, "graph", lambda call, fault: captured.append(call) or graph(call, fault))
    rows = list(suite.factorisation_rows((64,), torch.float32, torch.device("cpu"), meter, None))
    assert len(captured) == sum(row["impl"] in suite.IMPLEMENTATIONS and row["timing"] == "graph" for row in rows) == 2


def test_factors_beyond_the_limit_get_no_speed(suite, meter, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = suite.Problem.make(64, 8, torch.float32, torch.device("cpu"))
    name = "pairformer_fast randomised"
    assert "ms_median" in suite.measure(problem, name, meter)
    worse = suite.Problem.make(64, 4, torch.float32, torch.device("cpu"))
    monkeypatch.setitem(suite.IMPLEMENTATIONS, name, lambda problem: suite._randomised(worse))
    row = suite.measure(problem, name, meter)
    assert "above the least error" in row["error"]
    assert "ms_median" not in row
