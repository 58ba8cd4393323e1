"""The attention benchmark reports no speed for a wrong result, and says why it cannot run."""

import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

KEYS = {
    *("op", "impl", "direction", "n", "batch", "heads", "dim", "rank", "dtype", "ms_median", "ms_p20", "ms_p80"),
    *("peak_bytes", "rel_error"),
}


@pytest.fixture
def problem(script):
    """A small triangle attention in fp32 with gradients, more than one tile wide, with a padding mask."""
    module = script("benchmark_problem")
    case = module.Case("test", "fwdbwd", n=70, rows=3, heads=2, dim=8, rank=4, dtype=torch.float32, masked=True)
    return module.Problem(case, torch.device("cpu"))


@pytest.fixture
def ours(script, monkeypatch: pytest.MonkeyPatch):
    """Our implementations, on the back end that runs without a GPU."""
    module = script("benchmark_implementations")
    monkeypatch.setattr(module, "BACKEND", module.Backend.REFERENCE)
    return [implementation for implementation in module.IMPLEMENTATIONS if implementation.ours]


@pytest.mark.parametrize("rows", [3, None], ids=["triangle", "single"])
def test_rows_of_ours(script, ours, meter, problem, rows: int | None) -> None:
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
        assert row["timing"] == "graph"
        assert row["gradients_checked_at"]["n"] == 70


def test_rows_of_a_cpu(script, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("benchmark_attention_cpu")
    for name, value in {"REPEATS": 2, "RANKS_N": 20, "RANKS": (4,), "SHARES": (0.5,), "ROWS": 8}.items():
        monkeypatch.setattr(module, name, value)
    threads = torch.get_num_threads()
    try:
        rows = list(module.attention_cpu_rows((16,), "0000000"))
    finally:
        torch.set_num_threads(threads)
    assert json.loads(json.dumps(rows)) == rows
    kinds = {"no bias", "factors", "mixed", "dense"}
    assert {row["bias"] for row in rows if row["section"] == "sizes"} == kinds
    assert {(row["form"], row["impl"].split()[1]) for row in rows if row["op"] == "factorisation"} == {
        (form, f"{method},") for form in ("triangle", "single") for method in ("randomised", "svd")
    }
    assert all(row["ms_median"] > 0 and row.get("rel_error", 0) < 1e-5 for row in rows)


def test_what_cannot_be_captured_is_timed_eagerly(script, ours, meter, problem, monkeypatch) -> None:
    def refuse(call, fault):
        raise script("benchmark_gpu").NotCaptured("it waits for the device")

    measure = script("benchmark_attention").measure
    small = type(problem)(replace(problem.case, section="targets"), problem.device)
    row = measure(small, ours[0], meter)
    assert (row["timing"], row["ms_median"], row["ms_eager"]) == ("graph", 1.0, 10.0)
    monkeypatch.setattr(meter, "graph", refuse)
    row = measure(small, ours[0], meter)
    assert (row["timing"], row["ms_median"], row["ms_eager"]) == ("eager", 10.0, 10.0)
    assert row["graph_error"] == "it waits for the device"


def test_a_graph_that_misses_a_kernel_gets_no_speed(script, ours, problem, monkeypatch) -> None:
    """A replay that writes nothing leaves poison in the result, which the comparison with fp64 finds."""
    gpu = script("benchmark_gpu")

    class Empty:
        def replay(self) -> None:
            pass

    monkeypatch.setattr(gpu, "_capture", lambda call: (Empty(), call()))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    stopwatch = gpu.Stopwatch()
    monkeypatch.setattr(stopwatch, "eager", lambda call: gpu.Timing(1.0, 1.0, 1.0))
    monkeypatch.setattr(stopwatch, "peak_bytes", lambda call: 0)
    row = script("benchmark_attention").measure(problem, ours[0], stopwatch)
    assert row["timing"] == "eager"
    assert "another result" in row["graph_error"]


def test_targets_against_rows(script) -> None:
    module = script("benchmark_targets")
    common = {"section": "targets", "op": "triangle_attention", "direction": "fwd", "n": 768, "timing": "graph"}
    rows = [
        common | {"impl": "pairformer_fast factors", "bias": "factors", "ms_median": 0.8},
        common | {"impl": "pairformer_fast dense", "bias": "dense", "ms_median": 1.06},
        common | {"impl": "pairformer_fast mixed", "bias": "mixed", "error": "wrong result"},
        common | {"impl": "no bias at all", "bias": "no bias", "ms_median": 0.1},
        common | {"impl": "slow", "bias": "dense", "ms_median": 2.0},
        common | {"impl": "fast", "bias": "dense", "ms_median": 0.84},
        common | {"impl": "broken", "bias": "dense", "error": "wrong result"},
        {"op": "ceiling", "impl": "device copy"},
    ]
    found = [line for line in module.outcomes(rows) if line.target.direction == "fwd" and line.target.n == 768]
    assert [line.verdict for line in found] == ["met", "not measured", "missed"]
    assert {(line.peer, line.peer_ms) for line in found} == {("fast", 0.84)}
    module.print_summary(rows)


@pytest.mark.parametrize("name", ["SDPA flash, no bias", "SDPA flash, factors concatenated"])
def test_rows_of_peers(script, meter, problem, name: str) -> None:
    problem = type(problem)(replace(problem.case, masked=False), problem.device)
    implementations = script("benchmark_implementations").IMPLEMENTATIONS
    peer = next(implementation for implementation in implementations if implementation.name == name)
    row = script("benchmark_attention").measure(problem, peer, meter)
    assert "error" not in row, row
    assert max(row["gradient_errors"].values()) < 1e-5


@pytest.mark.parametrize("tensor", ["q", "phi_k", "dense", "nan"])
def test_wrong_results_get_no_speed(script, ours, meter, problem, tensor: str) -> None:
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


def test_missing_peer_is_a_row_with_its_error(script, meter, problem) -> None:
    module = script("benchmark_implementations")

    def absent(problem):
        return importlib.import_module("no_such_package")

    peer = module.Implementation("absent", module.Kind.DENSE, absent)
    row = script("benchmark_attention").measure(problem, peer, meter)
    assert row["impl"] == "absent"
    assert "no_such_package" in row["error"]
    assert row["op"] == "triangle_attention"


def test_selection(script) -> None:
    module = script("benchmark_selection")
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


def test_processes_that_compile_ahead_cover_the_selection(script, monkeypatch) -> None:
    module, selected = script("benchmark_warm"), script("benchmark_selection")
    covered = []

    def process(task, environment):
        chosen = selected.Selection.parse(*task)
        for case in chosen.cases():
            covered.extend((case.n, case.direction, one.name) for one in chosen.implementations(case))
        return ""

    monkeypatch.setattr(module, "_process", process)
    module.compile_ahead(selected.Selection.parse("targets", "384,768", "*", "fwd"), 2)
    assert len(set(covered)) == len(covered)
    ours = [f"pairformer_fast {kind}" for kind in ("no bias", "factors", "mixed", "dense")]
    compiled = [*ours, "FlexAttention, bias captured", "TurboPairFormer", "trifast"]
    assert set(covered) == {(n, "fwd", name) for n in (384, 768) for name in compiled}


def test_run_survives_a_lost_device(script, ours, meter, problem, tmp_path: Path, monkeypatch) -> None:
    """What was measured is on disk when a kernel takes the device with it; resuming measures the rest only."""
    module, gpu, selected = script("benchmark_attention"), script("benchmark_gpu"), script("benchmark_selection")
    ceilings = gpu.Ceilings(copy=3e12, matmul=700e12, clock=1.755e9, exp2=132 * 16 * 1.755e9)
    monkeypatch.setattr(selected, "cases", lambda: [replace(problem.case, kinds=("no bias", "factors", "dense"))])
    monkeypatch.setattr(module, "Problem", lambda case, device: type(problem)(case, torch.device("cpu")))
    monkeypatch.setattr(module, "Stopwatch", lambda: meter)
    monkeypatch.setattr(module.Ceilings, "measure", lambda stopwatch: ceilings)
    measured = []
    monkeypatch.setattr(meter, "peak_bytes", lambda call: measured.append(call) or 0)

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    selection = selected.Selection.parse("", "", "pairformer_fast*", "")
    deadline = time.monotonic() + 600
    output = tmp_path / "attention.json"
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(gpu.DeviceLost):
        module.run(selection, output, "abc", False, deadline)
    before = json.loads(output.read_text())
    assert [row["impl"] for row in before if row["op"] == "triangle_attention"] == ["pairformer_fast no bias"]

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert module.run(selection, output, "abc", True, time.monotonic() - 1) == []
    assert len(measured) == 1
    assert module.run(selection, output, "abc", True, deadline) == []
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
