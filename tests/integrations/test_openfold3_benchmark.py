"""The benchmark of a whole OpenFold3 measures what it says, as far as a CPU shows."""

import json
import logging

import pytest
from typer.testing import CliRunner

pytest.importorskip("openfold3", reason="needs the extra [openfold]: pip install '.[openfold]'")


@pytest.fixture
def run(script, monkeypatch):
    """Dry run with options; every row is timed once."""
    monkeypatch.setattr(script("benchmark_openfold3"), "ENOUGH_SECONDS", 1e-9)
    return lambda *options: CliRunner().invoke(script("benchmark").app, ["openfold3", "--dry", *options])


def test_a_dry_run_measures_both_and_resumes(run, tmp_path, caplog):
    output = tmp_path / "rows.json"
    options = ("--only", "trunk,training", "--output", str(output))
    result = run(*options, "--impl", "OpenFold3 eager,OpenFold3 Triton")
    assert result.exit_code == 0, result.output
    first = json.loads(output.read_text())
    assert [row["section"] for row in first if "error" in row] == ["trunk", "training"]
    assert all("needs a CUDA GPU" in row["error"] for row in first if row["impl"] == "OpenFold3 Triton")
    result = run(*options, "--impl", "*eager,*Triton,*dense", "--resume")
    assert result.exit_code == 0, result.output
    rows = json.loads(output.read_text())
    assert rows[: len(first)] == first
    trunk, training = rows[len(first) :]
    assert trunk["seconds"] > 0
    assert 0 < trunk["errors"]["z"] < 0.05
    assert trunk["errors"]["z (fp32)"] < 0.05
    assert trunk["biases"]["dense"] > 0
    assert training["direction"] == "fwdbwd"
    fallbacks = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not fallbacks, "OpenFold3 aligns the ground truth to its prediction without falling back"


def test_a_dry_run_does_not_replace_the_measurements(run):
    result = run("--impl", "*eager")
    assert result.exit_code == 2
    assert "--output" in result.output


def test_ours_is_held_against_the_best_of_the_others(script):
    def row(impl: str, seconds: float, peak: int) -> dict:
        return {"section": "trunk", "n": 384, "impl": impl, "seconds": seconds, "peak_bytes": peak}

    lost = {"section": "trunk", "n": 384, "impl": "OpenFold3 Triton", "error": "out of memory"}
    rows = [row("OpenFold3 eager", 8.0, 10), row("OpenFold3 cuEquivariance", 5.0, 20), lost]
    dense, auto = script("benchmark_openfold3_targets").outcomes([*rows, row("pairformer_fast dense", 2.0, 5)])
    assert (dense.speed, dense.memory, dense.asked) == (2.5, 0.5, 2.5)
    assert auto.speed is None
