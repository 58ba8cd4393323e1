"""The template baseline copies the most similar domain, and the preparation script fails as it should."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pairformer_fast.training.templates import template_baseline

from .structures import structure

SEQUENCE = "ACDEFGHIKLMNPQRSTVWYACDEFGHIKLMNPQRSTVWY"


def test_the_same_backbone_scores_one_and_missing_residues_zero() -> None:
    target = structure("target", [SEQUENCE])
    target.cdr[:] = 0
    target.cdr[30:35] = 3
    near = structure("near", [SEQUENCE.replace("W", "F")])
    far = structure("far", ["P" * 40])
    (score,) = template_baseline([far, near], [target])
    assert (score.template, score.lddt) == ("near", pytest.approx(1, abs=1e-4))
    cut = structure("cut", [SEQUENCE[:30] + SEQUENCE[35:]])
    (score,) = template_baseline([far, cut], [target])
    assert score.template == "cut"
    assert score.lddt_h3 == 0
    assert 0.5 < score.lddt < 0.9


def test_a_target_without_cdr_h3_has_no_loop_score() -> None:
    target = structure("target", [SEQUENCE])
    target.cdr[:] = 0
    assert np.isnan(template_baseline([target], [target])[0].lddt_h3)


def test_the_script_names_a_missing_file_and_writes_nothing(repository: Path, tmp_path: Path) -> None:
    script = repository / "scripts" / "prepare_antibody_data.py"
    command = [sys.executable, str(script), str(tmp_path / "out"), "--data", str(tmp_path / "no data")]
    done = subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "500", "PATH": ""})
    assert done.returncode == 2
    assert "sabdab_vh.jsonl.gz does not exist" in done.stderr
    assert not list(tmp_path.iterdir())
