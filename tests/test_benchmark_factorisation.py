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
        assert (row["ms_median"], row["ms_eager"], row["timing"]) == (1.0, 10.0, "graph")
        assert row["commit"] == "abc"
        assert -1e-5 < row["excess_error"] < (0.05 if row["impl"].startswith("pairformer_fast") else 0.5)
        assert suite.line(row).startswith(f"n=192 rank={row['rank']} {row['impl']} 1 ms as graph")


def test_factors_beyond_the_limit_get_no_speed(suite, meter, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = suite.Problem.make(64, 8, torch.float32, torch.device("cpu"))
    name = "pairformer_fast randomised"
    assert "ms_median" in suite.measure(problem, name, meter)
    worse = suite.Problem.make(64, 4, torch.float32, torch.device("cpu"))
    monkeypatch.setitem(suite.IMPLEMENTATIONS, name, lambda problem: suite._randomised(worse))
    row = suite.measure(problem, name, meter)
    assert "above the least error" in row["error"]
    assert "ms_median" not in row
