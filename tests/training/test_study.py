"""Training runs with dense bias and with factors are compared only where they can be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pairformer_fast.training.study import read_run, summarize

DENSE = {"bias": "dense", "rank": None, "hidden": None, "table": None, "backend": "auto"}
RANK16, RANK32 = (DENSE | {"bias": "learned", "rank": rank, "table": 32} for rank in (16, 32))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(attention: dict[str, Any], seed: int, lddt: float, **changed: Any) -> Path:
        facts = {
            "step": 4, "seconds": 10.0, "gpus": 2, "device": "cpu", "torch": "2", "attention": attention,
            "train": {"seed": seed, "steps": 4, "batch_size": 8, "mixture": {"made": 1.0}},
            "origin": {"weights": f"seed{seed}.safetensors", "steps": 100},
            "evaluation": {"val": {"structures": 3, "lddt": lddt, "lddt_h3": lddt - 0.2, "rmsd": 1.0}},
        }  # fmt: skip
        facts["train"] |= {key: value for key, value in changed.items() if key in ("batch_size", "steps")}
        facts |= {key: value for key, value in changed.items() if key not in ("batch_size", "steps")}
        rows = [{"step": step, "total": 1 / step} for step in range(1, 5)]
        stop = facts.pop("stop", None)
        if stop is not None:
            rows.insert(2, facts | {"step": stop[0], "seconds": stop[1], "evaluation": {"val": stop[2]}})
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, facts]))
        return path

    return write


def test_differences_are_between_runs_of_the_same_seed(write: Callable[..., Path]) -> None:
    scores = {"dense": (DENSE, (0.80, 0.90)), "16": (RANK16, (0.82, 0.91)), "32": (RANK32, (0.81, 0.91))}
    runs = [read_run(write(bias, seed, values[seed])) for bias, values in scores.values() for seed in (1, 0)]
    summary = summarize(runs[::-1], "val")
    assert [arm["arm"] for arm in summary["arms"]] == ["dense", "rank 16 + table 32", "rank 32 + table 32"]
    dense, rank16, _ = summary["arms"]
    assert dense["lddt"] == {"mean": pytest.approx(0.85), "deviation": pytest.approx(0.07071, abs=1e-5)}
    assert "lddt_minus_dense" not in dense
    assert rank16["lddt_minus_dense"] == {"mean": pytest.approx(0.015), "deviation": pytest.approx(0.00707, abs=1e-5)}
    assert rank16["gpu_seconds"]["mean"] == 20
    assert summary["settings"] == {"steps": 4, "batch_size": 8, "mixture": {"made": 1.0}}
    assert len(summary["runs"]) == 6


@pytest.mark.parametrize("seconds", [6.03, 6.2])
def test_runs_stopped_after_equal_seconds_are_compared_there(write: Callable[..., Path], seconds: float) -> None:
    dense, factors = ({"lddt": lddt, "lddt_h3": 0.5, "rmsd": 2.0} for lddt in (0.7, 0.6))
    runs = [
        read_run(write(DENSE, 0, 0.8, stop=(3, 6.0, dense))),
        read_run(write(RANK16, 0, 0.8, stop=(2, seconds, factors))),
    ]
    summary = summarize(runs, "val")
    assert summary["arms"][1]["lddt_minus_dense"]["mean"] == 0
    assert len(runs[0].curve) == 4
    assert ("equal_time" in summary) == (seconds < 6.1)
    if seconds < 6.1:
        assert [arm["steps"]["mean"] for arm in summary["equal_time"]] == [3, 2]
        assert summary["equal_time"][1]["lddt_minus_dense"]["mean"] == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 4}, r"runs differ in batch_size: 8 \(dense\) and 4 \(rank 16 \+ table 32, seed 0\)"),
        ({"origin": None}, r"different training: 100 steps \(dense\), 0 "),
        ({"evaluation": {"crystal": {}}}, r"was not evaluated on val: it has \['crystal'\]"),
    ],
)
def test_runs_that_differ_in_more_are_refused(write: Callable[..., Path], changed: dict, message: str) -> None:
    runs = [read_run(write(DENSE, 0, 0.8)), read_run(write(RANK16, 0, 0.8, **changed))]
    with pytest.raises(ValueError, match=message):
        summarize(runs, "val")


@pytest.mark.parametrize("seeds", [(0,), (0, 0), (0, 2)])
def test_arms_of_other_seeds_are_refused(write: Callable[..., Path], seeds: tuple[int, ...]) -> None:
    runs = [read_run(write(DENSE, seed, 0.8)) for seed in (0, 1)] + [read_run(write(RANK16, s, 0.8)) for s in seeds]
    with pytest.raises(ValueError, match=r"seeds differ: dense has \[0, 1\], rank 16"):
        summarize(runs, "val")


def test_what_is_no_finished_run_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stopped at step 4 of 9"):
        read_run(write(DENSE, 0, 0.8, steps=9))
    for text in ("", "no json", '{"step": 3, "total": 1.0}\n'):
        path = tmp_path / "log"
        path.write_text(text)
        with pytest.raises(ValueError, match="is no log of a finished run"):
            read_run(path)


def test_script_writes_summary_and_plot(
    write: Callable[..., Path], run_script: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    logs = [write(bias, seed, 0.8) for bias in (DENSE, RANK32) for seed in (0, 1)]
    output = tmp_path / "study.json"
    status, _, err = run_script("factors_study", *logs, "--output", output)
    assert status == 0, err
    assert [arm["seeds"] for arm in json.loads(output.read_text())["arms"]] == [[0, 1], [0, 1]]
    assert "CDR-H3" in output.with_suffix(".svg").read_text()
    for wrong in ([tmp_path / "none"], [tmp_path], [*logs, "--output", tmp_path / "none" / "study.json"]):
        status, _, err = run_script("factors_study", *wrong)
        assert (status, err.count("\n")) == (2, 1)
