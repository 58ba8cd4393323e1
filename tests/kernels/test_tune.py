"""Tuning writes tables that the kernels can read, of right results only, and says why it cannot run."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pairformer_fast.kernels.flash_bias import hopper_tiles, triton_tiles

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of scripts/."""
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module


@pytest.fixture
def rows(script) -> Callable[[str], list[dict]]:
    """What a run measures: each candidate 10 % slower than the one before, the first of several wrong."""
    kernels = script("tune_kernels")

    def found(place: int, target) -> dict:
        return {"error": "wrong result"} if place == 0 < len(target.candidates) - 1 else {"ms": 1 + place / 10}

    def of(family: str) -> list[dict]:
        return [
            {**target.identity, "tiles": list(tiles), **found(place, target)}
            for target in kernels.targets(kernels.Family(family))
            for place, tiles in enumerate(target.candidates)
        ]

    return of


def test_table_of_the_hopper_kernels(script, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune = script("tune")
    tune._write(tmp_path / "hopper_tiles.json", tune.hopper_table(rows("hopper"), "a GPU"))
    table = json.loads((tmp_path / "hopper_tiles.json").read_text())
    assert table["device"] == "a GPU"
    first = [entry for entry in table["kernels"]["forward"] if (entry["dim"], entry["rank"]) == (32, 32)]
    assert [entry["cost"] for entry in first] == [1.0, pytest.approx(1.2 / 1.1, abs=1e-3)], "of 1.1, 1.2, 1.3 ... ms"
    monkeypatch.setattr(hopper_tiles, "_table", lambda: table)
    hopper_tiles.choose.cache_clear()
    try:
        for kind in hopper_tiles.KINDS:
            for head in (16, 32, 64):
                for rank in (0, 32, 64, 128):
                    assert hopper_tiles.choose(kind, 768, 768, hopper_tiles.Widths(head, rank, True)).stages >= 2
    finally:
        hopper_tiles.choose.cache_clear()


def test_table_of_the_general_kernels(script, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune = script("tune")
    before = triton_tiles._table()
    tune._write(tmp_path / "tiles.json", tune.plain_table(rows("plain"), "sm_90", before))
    table = json.loads((tmp_path / "tiles.json").read_text())
    assert table.keys() == before.keys()
    assert {name: table[name] for name in ("default", "interpreter")} == {
        name: before[name] for name in ("default", "interpreter")
    }
    monkeypatch.setattr(triton_tiles, "_table", lambda: table)
    for kind in triton_tiles.KINDS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for dim in (8, 32, 64, 128):
                for rank in (0, 32, 128):
                    tiles = triton_tiles.tile_sizes(kind, dtype, dim, rank, 768, (9, 0))
                    assert tiles.block_n <= 64, "a block of keys lies in one flagged tile"
                    assert tiles.block_m <= 128


def test_fp32_has_larger_tiles_where_products_may_be_in_tf32() -> None:
    def tiles(dim: int, rank: int) -> triton_tiles.Tiles:
        return triton_tiles.tile_sizes("forward", torch.float32, dim, rank, 640, (9, 0))

    before, exact = torch.get_float32_matmul_precision(), tiles(32, 0)
    torch.set_float32_matmul_precision("high")
    try:
        assert tiles(32, 0).block_m * tiles(32, 0).block_n > exact.block_m * exact.block_n
        wide = tiles(64, 64)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (tiles(32, 0), tiles(64, 64)) == (exact, wide), "wide heads and factors were not tuned for it"


def test_a_class_without_a_result_is_named(script, rows) -> None:
    tune, kernels = script("tune"), script("tune_kernels")
    works = rows("plain")
    assert tune._without_result(kernels.Family.PLAIN, works) == []
    broken = [row | {"error": "no"} for row in works]
    for row in broken:
        if (row["kind"], row["dtype"], row["dim"]) == ("forward", "float32", 64):
            row.pop("ms", None)
    assert tune._without_result(kernels.Family.PLAIN, broken) == ["plain forward float32 D=64 R=64"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
@pytest.mark.parametrize("kind", triton_tiles.KINDS)
def test_results_are_checked(script, kind: str) -> None:
    kernels = script("tune_kernels")
    candidates = next(one for one in kernels.targets(kernels.Family.PLAIN) if one.kind == kind).candidates
    target = kernels.Target(kernels.Family.PLAIN, kind, 16, 8, torch.float32, 6, {}, candidates)
    runner = kernels.make_runner(target, torch.device("cpu"))
    results = runner.run(triton_tiles.Tiles(32, 32, 1, 1, 1))
    assert runner.fault(results) == ""
    for name in results:
        assert f"{name} is off" in runner.fault(results | {name: 1.01 * results[name]})
        assert f"{name} is off" in runner.fault(results | {name: torch.full_like(results[name], torch.nan)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA GPU")
def test_without_a_gpu(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repository / "scripts" / "tune.py"), "--output-folder", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "needs a CUDA GPU" in result.stderr
    assert not (tmp_path / "out").exists()
