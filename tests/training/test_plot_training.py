"""The plot of training logs."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")


def test_logs_of_the_bundled_weights_are_drawn_and_others_refused(run_script, tmp_path: Path) -> None:
    output = tmp_path / "x.svg"
    status, _, err = run_script("plot_training", "--output", output)
    assert (status, err) == (0, "")
    text = output.read_text(encoding="utf-8")
    assert "antibody_training" in text
    assert "antibody_learned_training" in text
    output.unlink()
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    for wrong, message in (("none.jsonl", "none.jsonl"), ("log.jsonl", "has no training step")):
        status, _, err = run_script("plot_training", tmp_path / wrong, "--output", output)
        assert (status, err.count("\n"), message in err) == (2, 1, True)
    assert not output.exists()
