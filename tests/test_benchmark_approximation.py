"""The benchmark of approximation measures what it says, and says what it lacks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pairformer_fast.bias import PairBiasAttention, factorize, set_attention
from pairformer_fast.model.checkpoint import default_checkpoint, load_checkpoint


@pytest.fixture
def suite(script):
    return script("benchmark_approximation")


@pytest.fixture
def rows(repository: Path) -> list[dict]:
    return json.loads((repository / "data" / "benchmarks" / "approximation.json").read_text(encoding="utf-8"))


def test_places_are_attentions_of_the_bundled_model_and_together_all_of_them(suite) -> None:
    model = load_checkpoint(default_checkpoint())
    paths = {path for path, module in model.named_modules() if isinstance(module, PairBiasAttention)}
    placed = {variant.place: variant for variant in suite.variants() if variant.place != "everywhere"}
    assert placed.keys() == suite.PLACES.keys()
    chosen = {}
    for place, variant in placed.items():
        variant.set_on(model)
        chosen[place] = {
            path
            for path, module in model.named_modules()
            if isinstance(module, PairBiasAttention) and module.config.bias == "svd"
        }
    blocks, kinds = (
        [found for place, found in chosen.items() if place.startswith("block") is b] for b in (True, False)
    )
    for parts in (blocks, kinds):
        assert all(parts)
        assert set().union(*parts) == paths
        assert sum(map(len, parts)) == len(paths)
    set_attention(model, suite.DENSE)


@pytest.mark.parametrize("masked", [False, True])
def test_error_of_the_bias_is_relative_and_free_of_constants_in_rows(suite, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(1, 2, 30, 30, generator=generator) + 50 * torch.randn(1, 2, 30, 1, generator=generator)
    mask = torch.arange(30)[None] < (20 if masked else 30)
    inside = bias[..., : mask.sum(), : mask.sum()].double()
    values = torch.linalg.svdvals(inside - inside.mean(-1, keepdim=True)).square()
    want = (values[..., 8:].sum(-1) / values.sum(-1)).sqrt().mean()
    found = suite.relative_error(bias, factorize(bias, "svd", rank=8, mask=mask), mask if masked else None)
    assert found == pytest.approx(want.item(), rel=1e-4)
    assert suite.relative_error(bias, factorize(bias, "structured", rank=30, mask=mask), mask) < 1e-5


def test_what_is_missing_is_named(repository: Path, tmp_path: Path) -> None:
    script = repository / "scripts" / "benchmark.py"
    arguments = ["approximation", "--data", tmp_path, "--output", tmp_path / "rows.json"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "fv.fasta does not exist; give the data folder with --data" in done.stderr
    assert not (tmp_path / "rows.json").exists()


def test_the_front_has_what_none_beats_in_both(script) -> None:
    points = {name: {"cost": cost, "error": error} for name, cost, error in (("a", 1, 5), ("b", 2, 6), ("c", 3, 1))}
    assert script("plot_approximation").pareto(points, "cost", "error") == ["a", "c"]


def test_a_structure_on_which_a_run_was_stopped_is_left_out(script) -> None:
    rows = [{"id": one, "impl": impl} for one, impl in (("x", "a"), ("x", "b"), ("y", "a"))]
    assert script("plot_approximation").complete(rows) == rows[:2]


def test_stored_rows_are_of_one_code_and_complete(suite, rows) -> None:
    names = [f"pairformer_fast {variant.name}" for variant in suite.variants()]
    structures = list(dict.fromkeys(row["id"] for row in rows))
    assert structures
    assert [(row["id"], row["impl"]) for row in rows] == [(one, name) for one in structures for name in names]
    assert len({(row["commit"], row["device"], row["torch"]) for row in rows}) == 1
    for row in rows:
        for attention in row["attentions"]:
            if attention["choice"] == "factors":
                assert attention["probed_max"] <= attention["bound"] + 1e-5


def test_the_page_has_the_table_of_the_stored_rows(script, rows, repository: Path) -> None:
    plots = script("plot_approximation")
    page = (repository / "data" / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert plots.table(plots.complete(rows)) in page
