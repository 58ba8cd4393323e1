"""Training with the kernels against the reference: what counts as following it, and which runs can be compared."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the extra [plot]: pip install '.[plot]'")


def log(folder: Path, backend: str, seed: int, losses: np.ndarray, **train: object) -> str:
    facts = {"step": len(losses), "seconds": 1.0, "device": "cpu", "torch": "2", "gpus": 1, "evaluation": {}}
    facts |= {
        "train": {"seed": seed, "steps": len(losses), **train},
        "attention": {"bias": "dense", "backend": backend},
    }
    rows = [{"step": step + 1, "seconds": 1.0, "total": float(loss)} for step, loss in enumerate(losses)]
    path = folder / f"{backend}_{seed}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, facts]), encoding="utf-8")
    return str(path)


@pytest.fixture
def invoke(run_script, tmp_path: Path):
    """Exit status, stderr and the file to write of a comparison of logs."""

    def run(logs: list[str]) -> tuple[int, str, Path]:
        output = tmp_path / "out.json"
        status, _, err = run_script("compare_training", *logs, "--output", output)
        return status, err, output

    return run


@pytest.mark.parametrize(("shift", "follows"), [(0.02, True), (0.5, False)])
def test_kernels_follow_within_the_noise_of_seeds(invoke, tmp_path: Path, shift: float, follows: bool) -> None:
    falling = np.linspace(8, 2, 100)
    logs = [
        log(tmp_path, "reference", 0, falling),
        log(tmp_path, "auto", 0, falling + shift),
        log(tmp_path, "auto", 1, falling + shift + 0.1),
    ]
    status, err, output = invoke(logs)
    assert status == (0 if follows else 1), err
    found = json.loads(output.read_text())
    assert found["follows"] is follows
    assert found["settings"] == {"steps": 100}
    assert found["difference"] == pytest.approx([shift] * 10)
    assert found["between_seeds"] == pytest.approx([0.1] * 10)
    assert output.with_suffix(".svg").is_file()


def test_runs_that_cannot_be_compared_are_refused(invoke, tmp_path: Path) -> None:
    falling = np.linspace(8, 2, 100)
    reference, one = log(tmp_path, "reference", 0, falling), log(tmp_path, "auto", 0, falling)
    for logs, message in (
        ([reference, one], "two seeds"),
        ([reference, one, log(tmp_path, "auto", 2, falling, batch_size=3)], "differ in more"),
        ([reference, log(tmp_path, "triton", 3, falling), log(tmp_path, "triton", 4, falling)], "seed 0"),
        ([reference, str(tmp_path / "missing.jsonl")], "missing.jsonl"),
    ):
        status, err, output = invoke(logs)
        assert (status, err.count("\n")) == (2, 1)
        assert message in err
        assert not output.exists()
