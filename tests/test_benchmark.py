"""The attention benchmark reports no speed for a wrong result, and says why it cannot run."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

KEYS = {
    *("op", "impl", "direction", "n", "batch", "heads", "dim", "rank", "dtype", "ms_median", "ms_p20", "ms_p80"),
    *("peak_bytes", "rel_error"),
}


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of scripts/."""
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module


@pytest.fixture
def problem(script):
    """A small triangle attention in fp32 with gradients, more than one tile wide, with a padding mask."""
    module = script("benchmark_problem")
    case = module.Case("test", "fwdbwd", n=70, rows=3, heads=2, dim=8, rank=4, dtype=torch.float32, masked=True)
    return module.Problem(case, torch.device("cpu"))


class Meter:
    """Stands in for the GPU's stopwatch."""

    def __init__(self, timing: tuple[float, float, float]) -> None:
        self.timing = timing

    def time(self, call):
        call()
        return self.timing

    def peak_bytes(self, call):
        return 0


@pytest.fixture
def meter(script) -> Meter:
    return Meter(script("benchmark_gpu").Timing(1.0, 0.9, 1.1))


@pytest.fixture
def ours(script, monkeypatch: pytest.MonkeyPatch):
    """Our implementations, on the back end that runs without a GPU."""
    module = script("benchmark_implementations")
    monkeypatch.setattr(module, "BACKEND", module.Backend.REFERENCE)
    return [implementation for implementation in module.IMPLEMENTATIONS if implementation.ours]


@pytest.mark.parametrize("rows", [3, None], ids=["triangle", "single"])
def test_rows_of_ours(script, ours, meter: Meter, problem, rows: int | None) -> None:
    problem = type(problem)(replace(problem.case, rows=rows), problem.device)
    for implementation in ours:
        row = script("benchmark_attention").measure(problem, implementation, meter)
        assert "error" not in row, row
        assert row.keys() >= KEYS
        assert row["rel_error"] < 1e-5
        assert json.loads(json.dumps(row)) == row
        names = {"q", "k", "v", *problem.expected(implementation.kind).bias}
        assert row["gradient_errors"].keys() == {f"d{name}" for name in names}
        assert max(row["gradient_errors"].values()) < 1e-5


@pytest.mark.parametrize("name", ["SDPA flash, no bias", "SDPA flash, factors concatenated"])
def test_rows_of_peers(script, meter: Meter, problem, name: str) -> None:
    problem = type(problem)(replace(problem.case, masked=False), problem.device)
    implementations = script("benchmark_implementations").IMPLEMENTATIONS
    peer = next(implementation for implementation in implementations if implementation.name == name)
    row = script("benchmark_attention").measure(problem, peer, meter)
    assert "error" not in row, row
    assert max(row["gradient_errors"].values()) < 1e-5


@pytest.mark.parametrize("tensor", ["q", "phi_k", "dense", "nan"])
def test_wrong_results_get_no_speed(script, ours, meter: Meter, problem, tensor: str) -> None:
    honest = next(implementation for implementation in ours if str(implementation.kind) == "mixed")

    def wrong(problem):
        prepared = honest.prepare(problem)
        run = prepared.run

        def altered():
            out, gradients = run()
            if tensor == "nan":
                out[-1, -1, -1] = torch.nan
            else:
                gradients[tensor] = 1.01 * gradients[tensor]
            return out, gradients

        prepared.run = altered
        return prepared

    row = script("benchmark_attention").measure(problem, replace(honest, prepare=wrong), meter)
    assert "wrong result" in row["error"]
    assert "ms_median" not in row


def test_missing_peer_is_a_row_with_its_error(script, meter: Meter, problem) -> None:
    module = script("benchmark_implementations")

    def absent(problem):
        return importlib.import_module("no_such_package")

    peer = module.Implementation("absent", module.Kind.DENSE, absent)
    row = script("benchmark_attention").measure(problem, peer, meter)
    assert row["impl"] == "absent"
    assert "no_such_package" in row["error"]
    assert row["op"] == "triangle_attention"


def test_selection(script) -> None:
    module = script("benchmark_attention")
    chosen = module.Selection.parse("targets", "384, 768", "pairformer_fast*, SDPA*, !*cuDNN*", "fwd")
    assert [(case.n, case.direction) for case in chosen.cases()] == [(384, "fwd"), (768, "fwd")]
    names = [one.name for one in module.IMPLEMENTATIONS if chosen.takes(one)]
    assert "pairformer_fast factors" in names
    assert "SDPA flash, no bias" in names
    assert not any("cuDNN" in name or "trifast" in name for name in names)
    everything = len(module.Selection.parse("", "", "*", "").cases())
    extra = len(module.Selection.parse("extra", "", "*", "").cases())
    assert extra + len(module.Selection.parse("targets", "", "*", "").cases()) == everything
    for options in (("fast", "", "*", ""), ("", "7", "*", ""), ("", "", "nobody", ""), ("", "", "*", "bwd")):
        with pytest.raises(ValueError, match="--"):
            module.Selection.parse(*options)


def test_run_survives_a_lost_device(script, ours, meter, problem, tmp_path: Path, monkeypatch) -> None:
    """What was measured is on disk when a kernel takes the device with it; resuming measures the rest only."""
    module, gpu = script("benchmark_attention"), script("benchmark_gpu")
    ceilings = gpu.Ceilings(copy=3e12, matmul=700e12, clock=1.755e9, exp2=132 * 16 * 1.755e9)
    monkeypatch.setattr(module, "cases", lambda: [replace(problem.case, kinds=("no bias", "factors", "dense"))])
    monkeypatch.setattr(module, "Problem", lambda case, device: type(problem)(case, torch.device("cpu")))
    monkeypatch.setattr(module, "Stopwatch", lambda: meter)
    monkeypatch.setattr(module.Ceilings, "measure", lambda stopwatch: ceilings)
    measured = []
    monkeypatch.setattr(meter, "peak_bytes", lambda call: measured.append(call) or 0)

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    selection = module.Selection.parse("", "", "pairformer_fast*", "")
    output = tmp_path / "attention.json"
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(module.DeviceLost):
        module.run(selection, output, "abc", False)
    before = json.loads(output.read_text())
    assert [row["impl"] for row in before if row["op"] == "triangle_attention"] == ["pairformer_fast no bias"]

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert module.run(selection, output, "abc", True) == []
    rows = json.loads(output.read_text())
    assert rows[: len(before)] == before
    names = [row["impl"] for row in rows if row["op"] == "triangle_attention"]
    assert names == ["pairformer_fast no bias", "pairformer_fast factors", "pairformer_fast dense"]
    assert len(measured) == len(names)
    assert sum(row["op"] == "floor" for row in rows) == 3
    assert all(row["suite"] == "attention" and row["commit"] == "abc" and row["device"] for row in rows)


def test_floor_of_the_largest_target(script) -> None:
    """Known by hand: N = 1024 has 4 * 2^30 scores and 128 operations of each in the forward's two products."""
    problem, gpu = script("benchmark_problem"), script("benchmark_gpu")
    ceilings = gpu.Ceilings(copy=3e12, matmul=700e12, clock=1.755e9, exp2=132 * 16 * 1.755e9)
    case = problem.Case("test", "fwd", 1024, 1024)
    floor = ceilings.floor(case, problem.Kind.NONE)
    assert floor["exp2_ms"] == pytest.approx(1.159, rel=1e-3)
    assert floor["tensor_ms"] == pytest.approx(0.785, rel=1e-2)
    assert floor["bytes_ms"] == pytest.approx(0.358, rel=1e-2)
    assert ceilings.floor(case, problem.Kind.FACTORS)["tensor_ms"] == pytest.approx(1.178, rel=1e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA GPU")
def test_without_a_gpu(repository: Path, tmp_path: Path) -> None:
    output = tmp_path / "attention.json"
    command = [sys.executable, str(repository / "scripts" / "benchmark.py"), "attention", "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "needs a CUDA GPU" in result.stderr
    assert not output.exists()
