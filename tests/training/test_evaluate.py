"""Scores of a prediction by region, and pLDDT against the truth."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pairformer_fast.inference.errors import InputError
from pairformer_fast.training.evaluate import Folded, plddt_agreement, region_rmsd, score
from pairformer_fast.training.shards import Structure, write_shard

from .structures import structure

CDR = np.array(([0] * 10 + [1] * 4 + [0] * 6 + [2] * 3 + [0] * 7 + [3] * 6 + [0] * 8) * 2)
REGIONS = [f"{chain} {region}" for chain in "HL" for region in ("framework", "CDR1", "CDR2", "CDR3")]


@pytest.fixture
def target() -> Structure:
    return replace(structure("fv", ["ACDEFGHIKLMNPQRSTVWY" * 2 + "ACDE"] * 2), cdr=CDR)


def shifted(made: Structure, rows: np.ndarray, shift: list[float]) -> Structure:
    atom14 = made.atom14.copy()
    atom14[rows] += np.array(shift, dtype=np.float32)
    return replace(made, atom14=atom14)


def test_a_shifted_loop_moves_only_its_region(target: Structure) -> None:
    loop = (target.cdr == 3) & (target.chain_index == 1)
    found = region_rmsd(shifted(target, loop, [0, 3.0, 4.0]), target)
    assert list(found) == REGIONS
    assert found.pop("L CDR3") == pytest.approx(5, abs=1e-3)
    assert found == pytest.approx(dict.fromkeys(found, 0), abs=1e-3)


def test_chains_are_superposed_each_on_its_own_framework(target: Structure) -> None:
    turn = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=np.float32)
    light = target.chain_index == 1
    apart = replace(target, atom14=np.where(light[:, None, None], target.atom14 @ turn + 20, target.atom14))
    assert region_rmsd(apart, target) == pytest.approx(dict.fromkeys(REGIONS, 0), abs=1e-3)
    assert score(Folded(apart, target, np.full(len(target), 0.5))).rmsd > 5


def test_residues_and_regions_without_a_target_are_left_out(target: Structure) -> None:
    mask = target.atom14_mask.copy()
    mask[(target.cdr == 2) & (target.chain_index == 0)] = False
    unknown = replace(target, atom14_mask=mask)
    found = region_rmsd(shifted(target, ~mask[:, 1], [50.0, 0, 0]), unknown)
    assert list(found) == [name for name in REGIONS if name != "H CDR2"]
    assert max(found.values()) < 1e-3
    heavy = target.select(np.flatnonzero(target.chain_index == 0))
    assert list(region_rmsd(heavy, heavy)) == REGIONS[:4]


def test_plddt_that_is_the_truth_is_calibrated(target: Structure) -> None:
    rng = np.random.default_rng(0)
    noisy = replace(target, atom14=target.atom14 + rng.normal(0, CDR[:, None, None] / 2, target.atom14.shape))
    truth = Folded(noisy, target, np.zeros(len(target))).lddt()
    found = plddt_agreement([Folded(noisy, target, truth), Folded(noisy, target, truth)])
    assert found["pearson"] == pytest.approx(1)
    assert found["error"] == 0
    assert sum(one["residues"] for one in found["bins"]) == 2 * len(target)
    assert all(one["plddt"] == one["lddt"] for one in found["bins"])
    sure = plddt_agreement([Folded(noisy, target, np.clip(truth + 0.1, 0, 2))])
    assert sure["error"] == pytest.approx(0.1, abs=1e-3)
    assert sure["pearson"] == pytest.approx(1)
    upside_down = plddt_agreement([Folded(noisy, target, 1 - truth)])
    assert upside_down["pearson"] == pytest.approx(-1)


def test_residues_without_a_target_do_not_count_for_plddt(target: Structure) -> None:
    mask = target.atom14_mask & (np.arange(len(target)) != 5)[:, None]
    plddt = np.linspace(0.3, 0.9, len(target))
    plddt[5] = np.nan
    found = plddt_agreement([Folded(target, replace(target, atom14_mask=mask), plddt)])
    assert sum(one["residues"] for one in found["bins"]) == len(target) - 1
    assert found["error"] == pytest.approx(np.nanmean(plddt) - 1, abs=1e-3)
    assert found["pearson"] is None


def test_rows_of_a_split(script, target: Structure) -> None:
    """A row has every measure and survives JSON; what is not known of the teacher is left out."""
    accuracy = script("benchmark_accuracy")
    loop = (target.cdr == 3) & (target.chain_index == 0)
    off = shifted(target, loop, [0, 0, 2.0])
    targets = [target, replace(target, id="fw")]
    row = accuracy.model_part([Folded(off, one, np.full(len(target), 0.9)) for one in targets])
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["structures"] == 2
    assert row["regions"]["H CDR3"] == pytest.approx({"mean": 2, "median": 2, "worst": 2}, abs=1e-3)
    assert row["geometry"]["peptide_rms"]["mean"] > 3 * row["geometry_written"]["peptide_rms"]["mean"]
    assert row["written"]["rmsd"] != row["rmsd"]
    assert row["written"]["lddt"] == pytest.approx(row["lddt"], abs=0.1)
    assert [one["id"] for one in row["scores"]] == ["fv", "fw"]
    assert row["scores"][0]["regions"]["H CDR3"] == pytest.approx(2, abs=1e-3)

    taught = accuracy.teacher_part(targets, [off, off])
    assert json.loads(json.dumps(taught, allow_nan=False)) == taught
    assert taught["rmsd"] == row["rmsd"]
    assert taught["scores"][0]["plddt"] is None
    assert "plddt_error" not in taught


def test_teacher_structures_are_known_before_anything_is_folded(
    script, target: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = script("benchmark_accuracy")
    for split in ("val", "crystal"):
        write_shard(tmp_path / f"{split}.safetensors", [target])
    monkeypatch.setitem(sys.modules, "flash_abb", None)
    (tmp_path / "text").write_text("no shard")
    for name, message in (("none", "flash-abb is missing: pip install"), ("text", "text is no safetensors file")):
        with pytest.raises(InputError, match=message):
            next(accuracy.accuracy_rows(tmp_path, None, tmp_path / name))

    monkeypatch.setattr(accuracy, "fold_all", lambda *_: [Folded(target, target, np.full(len(target), 0.9))])
    known = shifted(target, target.chain_index == 1, [3.0, 0, 0])
    write_shard(tmp_path / "teacher.safetensors", [known])
    rows = list(accuracy.accuracy_rows(tmp_path, None, tmp_path / "teacher.safetensors"))
    splits = {split: [row["impl"] for row in rows if row["split"] == split] for split in ("val", "crystal")}
    assert splits["val"] == ["crystal structure", "reference", "pairformer_fast svd"]
    assert splits["crystal"] == ["crystal structure", "flash-abb", "reference", "pairformer_fast svd"]
    assert rows[4]["rmsd"] > 1
    assert rows[5]["rmsd"] < 0.01


def test_hold_outs_measured_one_by_one_make_the_rows_of_both(
    script, target: Structure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.json"

    def run(*arguments: object) -> tuple[int, str]:
        whole = ("benchmark.py", "accuracy", "--data", tmp_path, "--output", output, *arguments)
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in whole])
        with pytest.raises(SystemExit) as info:
            script("benchmark").main()
        return info.value.code, capsys.readouterr().err

    folded = Folded(target, target, np.full(len(target), 0.9))
    monkeypatch.setattr(script("benchmark_accuracy"), "fold_all", lambda *_: [folded])
    monkeypatch.setattr(script("benchmark_accuracy"), "as_written", list)
    for split in ("val", "crystal"):
        write_shard(tmp_path / f"{split}.safetensors", [target])
    for split in ("crystal", "val", "crystal"):
        assert run("--split", split) == (0, "")
    rows = json.loads(output.read_text())
    assert [row["split"] for row in rows] == ["val"] * 3 + ["crystal"] * 3

    status, err = run("--split", "val", "--teacher", tmp_path / "none")
    assert (status, err.count("\n")) == (2, 1)
    assert "flash-abb is scored on the Fv only" in err
    output.write_text('[{"suite": "fold"}]')
    status, err = run("--split", "val")
    assert (status, err.count("\n")) == (2, 1)
    assert "rows of another suite: give another --output" in err
