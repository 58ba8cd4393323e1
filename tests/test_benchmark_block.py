"""The block benchmark: rows of ours and OpenFold3's, no speed for a wrong result, floors and targets."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pairformer_fast.config import PairformerConfig

KEYS = {
    *("op", "impl", "direction", "n", "batch", "heads", "dim", "rank", "dtype", "ms_median", "ms_p20", "ms_p80"),
    *("ms_eager", "peak_bytes", "peak_multiple", "rel_error"),
}
SMALL = PairformerConfig(
    c_s=24, c_z=32, c_hidden_mul=32, c_hidden_pair_att=8, no_heads_pair=2, c_hidden_pair_bias=8, no_heads_pair_bias=3
)
OURS = ["pairformer_fast dense", "pairformer_fast auto", "pairformer_fast reference"]
PEERS = ["OpenFold3 eager", "OpenFold3 eager, in place"]


@pytest.fixture
def problem(script, monkeypatch: pytest.MonkeyPatch):
    """Make a small problem in fp32, computed exactly in several slabs of rows."""
    module = script("benchmark_block_problem")
    monkeypatch.setattr(script("benchmark_block_exact"), "SLAB_SCORES", 2 * 11**2 * 4)
    monkeypatch.setattr(script("benchmark_block_implementations"), "BACKEND", "reference")

    def make(direction: str = "fwd", **changes):
        case = module.Case("test", direction, 11, dtype=torch.float32, compute=torch.float32, config=SMALL)
        return module.Problem(replace(case, **changes), torch.device("cpu"))

    return make


@pytest.fixture
def implementation(script):
    """Find an implementation by name and operation."""
    known = (*script("benchmark_block_implementations").BLOCKS, *script("benchmark_block_operations").implementations())
    return lambda name, op="pairformer_block": next(one for one in known if (one.name, one.op) == (name, op))


@pytest.mark.parametrize(("name", "direction"), [(name, "fwd") for name in OURS] + [(OURS[0], "fwdbwd")])
def test_rows_of_ours(script, problem, implementation, meter, name, direction) -> None:
    made = problem(direction)
    row = script("benchmark_block").measure(made, implementation(name), meter)
    assert "error" not in row, row
    assert row.keys() >= KEYS
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert (row["timing"], row["ms_median"], row["ms_eager"]) == ("graph", 1.0, 10.0)
    assert row["peak_bytes"] == 4 * (11 * 24 + 11 * 11 * 32)
    assert row["peak_multiple"] == pytest.approx(2.0, rel=0.1)
    if name != "pairformer_fast auto":
        assert max(row["errors"].values()) < 1e-5
        assert set(row["biases"].values()) == {"dense"}
    assert set(row["biases"]) == {"tri_att_start", "tri_att_end", "attn_pair_bias"}
    gradients = {"ds", "dz", "parameters", "worst parameter"} if direction == "fwdbwd" else set()
    assert row["errors"].keys() == {"s", "z"} | gradients


@pytest.mark.parametrize(("name", "direction"), [(name, "fwd") for name in PEERS] + [(PEERS[0], "fwdbwd")])
def test_rows_of_openfold3(script, problem, implementation, meter, name, direction) -> None:
    pytest.importorskip("openfold3", reason="needs the extra [openfold]: pip install '.[openfold]'")
    made = problem(direction)
    meter.graph = lambda call, fault: made.restore() or type(meter).graph(meter, call, fault)
    row = script("benchmark_block").measure(made, implementation(name), meter)
    assert "error" not in row, row
    assert max(row["errors"].values()) < 1e-5
    assert row["version"].startswith("openfold3 ")
    assert row["biases"] is None


def test_missing_peers_are_rows_with_their_errors(script, problem, implementation, meter, monkeypatch) -> None:
    for package in ("openfold3", "cuequivariance_torch"):
        monkeypatch.setitem(sys.modules, package, None)
    for name, op in [("OpenFold3 cuEquivariance", "pairformer_block"), ("cuEquivariance", "triangle_multiplication")]:
        row = script("benchmark_block").measure(problem(op=op), implementation(name, op), meter)
        assert row["impl"] == name
        assert "cuequivariance_torch" in row["error"]
        assert "ms_median" not in row


@pytest.mark.parametrize(
    ("op", "impl", "compared"),
    [
        *((op, "pairformer_fast", {"z"}) for op in ("triangle_multiplication", "triangle_attention", "transition")),
        *(("layer_norm_linear", impl, {"projected", "bias"}) for impl in ("pairformer_fast", "PyTorch eager")),
        *(("gated_output", impl, {"z"}) for impl in ("pairformer_fast", "PyTorch eager")),
    ],
)
def test_operations_alone(script, problem, implementation, meter, op, impl, compared) -> None:
    row = script("benchmark_block").measure(problem(op=op), implementation(impl, op), meter)
    assert "error" not in row, row
    assert row["errors"].keys() == compared
    assert row["rel_error"] < 1e-5


def test_autocast_is_measured_in_its_own_precision(script, problem, implementation, meter) -> None:
    made = problem("fwdbwd", compute=torch.bfloat16)
    row = script("benchmark_block").measure(made, implementation("pairformer_fast dense"), meter)
    assert "error" not in row, row
    assert (row["dtype"], row["autocast"]) == ("bfloat16", True)
    assert 1e-4 < row["rel_error"] < 0.03


@pytest.mark.parametrize("wrong", ["s", "z", "nan", "gradient"])
def test_wrong_results_get_no_speed(script, problem, implementation, meter, wrong) -> None:
    honest = implementation("pairformer_fast dense")

    def prepare(problem):
        prepared = honest.prepare(problem)
        run = prepared.run

        def altered():
            result = run()
            if wrong == "nan":
                result["z"][0, -1, -1, -1] = torch.nan
            elif wrong == "gradient":
                name = "dpair_stack.tri_mul_in.layer_norm_out.bias"
                result[name] = 1.01 * result[name]
            else:
                result[wrong] = result[wrong] + 0.01 * (result[wrong] - getattr(problem, wrong))
            return result

        prepared.run = altered
        return prepared

    direction = "fwdbwd" if wrong == "gradient" else "fwd"
    row = script("benchmark_block").measure(problem(direction), replace(honest, prepare=prepare), meter)
    assert "wrong result" in row["error"]
    assert not row.keys() & {"ms_median", "rel_error"}
    json.dumps(row, allow_nan=False)


def test_restored_inputs_serve_an_implementation_that_works_in_place(problem) -> None:
    made = problem()
    before = made.z.clone()
    made.z += 1
    made.restore()
    assert torch.equal(made.z, before)


def test_biases_have_a_spread_of_a_few_units(script, problem) -> None:
    exact = script("benchmark_block_exact")
    made = problem(dtype=torch.float32, n=24)
    block = exact.ExactBlock(SMALL, made.weights)
    for name in ("pair_stack.tri_att_start", "pair_stack.tri_att_end"):
        assert 1 < block._bias(made.z.detach(), f"{name}.layer_norm", f"{name}.linear_z").std() < 4
    assert all(value.abs().max() > 0 for value in made.weights.values())


def test_floor_of_a_block_by_hand(script) -> None:
    """N = 1024: one pass over z is 268 MB; attention has 4 * 2^30 scores, the products of triangles 2^38 each."""
    gpu, module = script("benchmark_gpu"), script("benchmark_block_floor")
    ceilings = gpu.Ceilings(copy=3e12, matmul=700e12, clock=1.755e9, exp2=132 * 16 * 1.755e9)
    case = script("benchmark_block_problem").Case("test", "fwd", 1024)
    found = module.floor(case, ceilings)
    assert found["bytes_ms"] == pytest.approx(11 * 0.0895, rel=0.01)
    assert found["exp2_ms"] == pytest.approx(2 * 1.159, rel=0.01)
    multiplication = (6 * 2 * 128**2 * 2**20 + 2 * 2**37) / 700e12 * 1e3
    assert found["operations_ms"]["triangle multiplication, incoming"] == pytest.approx(multiplication)
    assert found["operations_ms"]["triangle attention, ending"] == pytest.approx(1.159, rel=0.01)
    assert found["operations_ms"]["pair transition"] == pytest.approx(2**20 * 24 * 128**2 / 700e12 * 1e3)
    assert found["ms_median"] == pytest.approx(sum(found["operations_ms"].values()))
    training = module.floor(replace(case, direction="fwdbwd", dtype=torch.float32), ceilings)
    assert training["bytes_ms"] == pytest.approx(2 * 29 / 11 * found["bytes_ms"], rel=0.02)
    alone = module.floor(replace(case, op="transition"), ceilings)
    assert list(alone["operations_ms"]) == ["transition"]


def test_targets_against_rows(script) -> None:
    module = script("benchmark_block_targets")
    common = {"section": "forward", "op": "pairformer_block", "n": 1024, "timing": "graph"}
    rows = [
        common | {"impl": "pairformer_fast auto", "ms_median": 11.0, "peak_multiple": 5.5},
        common | {"impl": "pairformer_fast dense, in place", "ms_median": 11.0, "peak_multiple": 5.1},
        common | {"impl": "pairformer_fast dense", "error": "wrong result"},
        common | {"impl": "OpenFold3 cuEquivariance", "ms_median": 36.0, "peak_multiple": 18.0},
        common | {"impl": "OpenFold3 cuEquivariance, in place", "ms_median": 34.0, "peak_multiple": 12.0},
        common | {"impl": "OpenFold3 eager", "ms_median": 1.0, "peak_multiple": 1.0},
        {"op": "ceiling", "impl": "device copy"},
    ]
    found = [line for line in module.outcomes(rows) if line.target.n == 1024]
    assert [(line.verdict, line.peer) for line in found] == [
        ("met", 34.0),
        ("missed", 12.0),
        ("met", 34.0),
        ("not measured", 34.0),
    ]
    assert found[2].measured == pytest.approx(34 / 11)
    module.print_summary(rows)


def test_selection(script) -> None:
    module = script("benchmark_block_selection")
    chosen = module.BlockSelection.parse(
        "forward",
        "384, 1024",
        "pairformer_fast*, !*reference, !*in place",
    )
    assert [case.n for case in chosen.cases()] == [384, 1024]
    assert [one.name for one in chosen.implementations(chosen.cases()[0])] == OURS[:2]
    everything = module.BlockSelection.parse("", "", "*")
    by_case = {(case.section, case.op, case.n): everything.implementations(case) for case in everything.cases()}
    assert all(one.ours for one in by_case["long", "pairformer_block", 4096])
    assert "pairformer_fast reference" not in {one.name for one in by_case["forward", "pairformer_block", 1024]}
    assert not any("in place" in one.name for one in by_case["training", "pairformer_block", 640])
    assert len(by_case["operations", "triangle_multiplication", 768]) == 3
    for options in (("fast", "", "*"), ("", "7", "*"), ("", "", "nobody"), ("long", "", "OpenFold3*")):
        with pytest.raises(ValueError, match="--"):
            module.BlockSelection.parse(*options)


def test_run_goes_on_where_it_stopped(script, problem, meter, tmp_path: Path, monkeypatch) -> None:
    module, gpu, selected = (script(f"benchmark_{name}") for name in ("block", "gpu", "block_selection"))
    ceilings = gpu.Ceilings(copy=3e12, matmul=700e12, clock=1.755e9, exp2=132 * 16 * 1.755e9)
    made = problem()
    monkeypatch.setattr(selected, "cases", lambda: [replace(made.case, section="forward")])
    monkeypatch.setattr(module, "Problem", lambda case, device: type(made)(case, torch.device("cpu")))
    monkeypatch.setattr(module, "RestoringStopwatch", lambda restore: meter)
    monkeypatch.setattr(module.Ceilings, "measure", lambda stopwatch: ceilings)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    output = tmp_path / "block.json"
    first = selected.BlockSelection.parse("", "", "*dense")
    assert module.run(first, output, "abc", False, time.monotonic() + 600) == []
    before = json.loads(output.read_text())
    assert module.run(selected.BlockSelection.parse("", "", "pairformer_fast*"), output, "abc", True, 0.0) == []
    assert json.loads(output.read_text()) == before
    every = selected.BlockSelection.parse("", "", "pairformer_fast*, !*in place")
    assert module.run(every, output, "abc", True, time.monotonic() + 600) == []
    rows = json.loads(output.read_text())
    assert rows[: len(before)] == before
    assert [row["impl"] for row in rows if row["op"] != "ceiling"] == ["floor", *OURS]
    assert all(row["suite"] == "block" and row["commit"] == "abc" for row in rows)


@pytest.mark.gpu
def test_stopwatch_puts_back_what_a_call_writes_to(script) -> None:
    gpu = script("benchmark_gpu")
    x = torch.ones(1000, device="cuda")
    stopwatch = gpu.RestoringStopwatch(lambda: x.fill_(1.0))
    timing = stopwatch.graph(lambda: x.add_(1), lambda result: "" if bool((result == 2).all()) else "not restored")
    assert timing.median > 0
    assert stopwatch.eager(lambda: x.add_(1)).median > 0
    stopwatch.restore()
    assert float(x[0]) == 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA GPU")
def test_without_a_gpu(repository: Path, tmp_path: Path) -> None:
    output = tmp_path / "block.json"
    command = [sys.executable, str(repository / "scripts" / "benchmark.py"), "block", "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "the block suite measures kernels: it needs a CUDA GPU" in result.stderr
    assert not output.exists()


def test_drift_grows_block_by_block(script) -> None:
    rows = script("benchmark_drift").drift_rows(5, 2, torch.device("cpu"), "abc")
    assert [(row["impl"], row["block"]) for row in rows] == [
        (name, block) for block in (1, 2) for name in ("pairformer_fast dense", "plain PyTorch")
    ]
    assert all(1e-4 < row["rel_error"] < 0.05 for row in rows)
