import json
from pathlib import Path

import pytest
import torch

from pairformer_fast.features import TokenFeatures
from pairformer_fast.inference import regress as regression
from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.fasta import read_fasta
from pairformer_fast.inference.settings import FoldSettings
from pairformer_fast.inference.writer import write_mmcif

from .fakes import helix

FASTA = ">one\nMKTAYIAKQRQISFVKSHFSRQDEERLGLIEVQ\n>two|H\nGSDEYFWPLACNTVHHRKMQ\n>two|L\nACDEFGHIKLMNPQRSTVWY\n"
SETTINGS = FoldSettings(precision="fp32")


@pytest.fixture
def golden(fake_model, tmp_path) -> Path:
    folder = tmp_path / "golden"
    folder.mkdir()
    (folder / "golden.fasta").write_text(FASTA)
    assert [path.name for path in regression.update_golden(folder, SETTINGS)] == ["one.cif", "two.cif"]
    return folder


def failed(result: regression.Regression) -> set[tuple[str, str]]:
    return {(gate.name, gate.subject) for gate in result.gates if not gate.passed}


def test_unchanged_model_passes_every_gate(golden):
    result = regression.regress(golden, SETTINGS)
    assert result.passed
    assert len(result.gates) == 8
    assert "crystals" in result.skipped[0]
    content = json.loads(result.model_dump_json())
    assert (content["passed"], content["gates"][0]["passed"]) == (True, True)


def test_changed_reference_fails_against_its_golden_structure(golden):
    path = golden / "one.cif"
    job = read_fasta(golden / "golden.fasta")[0]
    moved = helix(TokenFeatures.from_chains([job.chains[0].sequence]))
    moved.atom14.add_(0.1 * torch.randn(moved.atom14.shape, generator=torch.Generator().manual_seed(0)))
    write_mmcif(path, job, moved, "")
    names = {(f"reference to golden, {kind} RMSD (Å)", "one") for kind in ("CA", "all-atom")}
    assert failed(regression.regress(golden, SETTINGS)) == names


def test_broken_acceleration_fails_against_the_reference(golden, fake_model, monkeypatch):
    def broken(module, args, prediction):
        if module.attention.bias != "dense":
            prediction.atom14.add_(2 * torch.randn_like(prediction.atom14))

    fake_model.register_forward_hook(broken)
    result = regression.regress(golden, SETTINGS)
    assert not result.passed
    assert failed(result) == {
        (f"accelerated to reference, {kind}", job) for kind in ("CA RMSD (Å)", "lDDT-CA") for job in ("one", "two")
    }


@pytest.mark.parametrize(("loss", "passes"), [(0.0, True), (1.5, False)])
def test_accuracy_against_crystals(golden, fake_model, tmp_path, loss, passes):
    crystals = tmp_path / "shared" / "fv_crystal"
    crystals.mkdir(parents=True)
    (crystals / "fv.fasta").write_text(">x\nMKTAYIAKQRQISFVKSHFSRQDEERLGLIEVQ\n")
    (crystals / "x.pdb").write_text(as_pdb(golden / "one.cif"))

    def broken(module, args, prediction):
        if module.attention.bias != "dense" and len(prediction.plddt[0]) == 33:
            prediction.atom14.add_(loss * torch.randn_like(prediction.atom14))

    fake_model.register_forward_hook(broken)
    result = regression.regress(golden, SETTINGS, crystals=tmp_path / "shared")
    gate = next(gate for gate in result.gates if "lost" in gate.name)
    (accuracy,) = result.crystals
    assert gate.passed == passes
    assert gate.measured == pytest.approx(accuracy.reference_lddt_ca - accuracy.accelerated_lddt_ca)
    assert accuracy.reference_lddt_ca == pytest.approx(1)
    assert result.skipped == []


def as_pdb(path: Path) -> str:
    import gemmi

    return gemmi.read_structure(str(path)).make_pdb_string()


def test_limits_are_inclusive_and_nan_fails():
    assert regression.Gate(name="", subject="", measured=0.05, limit=0.05).passed
    assert regression.Gate(name="", subject="", measured=0.98, limit=0.98, upper=False).passed
    assert not regression.Gate(name="", subject="", measured=float("nan"), limit=1).passed
    assert not regression.Gate(name="", subject="", measured=float("nan"), limit=0, upper=False).passed


def test_incomplete_folders_are_explained(golden, tmp_path):
    (golden / "two.cif").unlink()
    with pytest.raises(InputError, match=r"record 'two' has no structure two.cif beside it; make it with --update"):
        regression.regress(golden, SETTINGS)
    with pytest.raises(InputError, match="no such file"):
        regression.regress(tmp_path / "nowhere", SETTINGS)
    regression.update_golden(golden, SETTINGS)
    (golden / "golden.fasta").write_text(FASTA.replace("MKTAY", "MKTAA"))
    with pytest.raises(InputError, match="not of the sequence"):
        regression.regress(golden, SETTINGS)


def test_failed_update_keeps_the_old_structures(golden, fake_model):
    before = (golden / "one.cif").read_bytes()
    with (golden / "golden.fasta").open("a") as file:
        file.write(">bad\nWWWACD\n")
    with pytest.raises(RuntimeError):
        regression.update_golden(golden, FoldSettings(seed=5))
    assert (golden / "one.cif").read_bytes() == before
    assert not (golden / "bad.cif").exists()
