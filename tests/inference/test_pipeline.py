import json
import os

import gemmi
import pytest
import torch

from pairformer_fast.inference import pipeline
from pairformer_fast.inference.compare import compare_structures
from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.pipeline import fold
from pairformer_fast.inference.settings import FoldSettings
from pairformer_fast.model import checkpoint

from .fakes import FakeModel

ONE, TWO = "MKTAYIAKQRQISFVKSHFSRQDEERLGLIEVQ", "GSDEYFWPLACNTVHHRKMQ"


def files_in(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_outputs_of_a_compared_job(fake_model, fasta, tmp_path):
    out = tmp_path / "deep" / "out"
    report = fold(fasta(f">fv|H\n{ONE}\n>fv|L\n{TWO}\n"), out, FoldSettings(seed=3, recycles=2))
    assert files_in(out) == [f"fv/fv_{end}" for end in ("comparison.json", "flashbias.cif", "reference.cif")] + [
        "run.json"
    ]
    assert [chain.name for chain in gemmi.read_structure(str(out / "fv" / "fv_reference.cif"))[0]] == ["H", "L"]
    content = json.loads((out / "fv" / "fv_comparison.json").read_text())
    direct = compare_structures(out / "fv" / "fv_flashbias.cif", out / "fv" / "fv_reference.cif")
    assert 0.01 < content["ca_rmsd"] == direct.ca_rmsd < 0.2
    assert len(content["per_residue"]) == len(ONE + TWO)
    assert {"all_atom_rmsd", "lddt", "lddt_ca", "tm_score", "gdt_ts", "gdt_ha", "plddt_difference"} <= set(content)
    assert content["paths"]["flashbias"]["factors"] == 1
    assert content["paths"]["flashbias"]["probed_error"] == 0.01
    assert content["paths"]["flashbias"]["backends"] == ["torch"]
    assert content["paths"]["flashbias"]["mean_rank"] == 8
    assert content["paths"]["reference"]["dense"] == 1
    assert min(path["seconds"] for path in content["paths"].values()) > 0
    assert content["bias"][0]["eps"] == [0.1]
    assert fake_model.calls == [2, 2]
    assert json.loads((out / "run.json").read_text()) == report.model_dump(mode="json")


def test_run_json_says_what_was_asked_for_and_chosen(fake_model, fasta, tmp_path):
    path = fasta(f">a\n{ONE}\n")
    fold(path, tmp_path / "out", FoldSettings(device="cpu", seed=11, bias="svd", rank=4))
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["settings"]["seed"] == 11
    assert run["chosen"]["device"] == "cpu"
    assert run["chosen"]["precision"] == "fp32"
    assert run["chosen"]["recycles"] == 3
    assert run["chosen"]["paths"]["flashbias"]["rank"] == 4
    assert run["chosen"]["paths"]["reference"] == {
        **run["chosen"]["paths"]["reference"],
        "backend": "reference",
        "bias": "dense",
    }
    assert run["versions"]["torch"] == torch.__version__
    assert run["checkpoint"]["name"] == "fake.safetensors"
    assert len(run["checkpoint"]["sha256"]) == 64
    assert run["jobs"][0]["status"] == "ok"


def test_same_seed_same_files(fake_model, fasta, tmp_path):
    path = fasta(f">a\n{ONE}\n")
    for name, seed in [("x", 1), ("y", 1), ("z", 2)]:
        torch.rand(5)
        fold(path, tmp_path / name, FoldSettings(seed=seed))
    x, y, z = ((tmp_path / name / "a" / "a_flashbias.cif").read_text() for name in "xyz")
    assert x == y != z


def test_failing_job_leaves_nothing_and_the_others_finish(fake_model, fasta, tmp_path):
    out = tmp_path / "out"
    report = fold(fasta(f">a\n{ONE}\n>bad\nWWWACD\n>c\n{TWO}\n"), out, FoldSettings())
    assert [job.status for job in report.jobs] == ["ok", "failed", "ok"]
    assert report.failed[0].error == "the fake model broke"
    assert {name.split("/")[0] for name in files_in(out)} == {"a", "c", "run.json"}
    assert sorted(os.listdir(out)) == ["a", "c", "run.json"]
    assert json.loads((out / "run.json").read_text())["jobs"][1]["error"] == "the fake model broke"


def test_prediction_that_is_not_finite_fails_its_job(fake_model, fasta, tmp_path):
    def break_atoms(module, args, prediction):
        prediction.atom14.fill_(torch.nan)

    fake_model.register_forward_hook(break_atoms)
    report = fold(fasta(f">a\n{ONE}\n"), tmp_path / "out", FoldSettings())
    assert "not finite" in report.failed[0].error
    assert files_in(tmp_path / "out") == ["run.json"]


def test_failure_while_writing_leaves_no_half_written_files(fake_model, fasta, tmp_path, monkeypatch):
    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "compare_structures", broken)
    report = fold(fasta(f">a\n{ONE}\n"), tmp_path / "out", FoldSettings())
    assert "No space left" in report.failed[0].error
    assert os.listdir(tmp_path / "out") == ["run.json"]


def test_interruption_keeps_finished_jobs_and_cleans_up(fake_model, fasta, tmp_path, monkeypatch):
    write = pipeline.write_mmcif

    def interrupted(path, job, *rest):
        if job.id == "b":
            raise KeyboardInterrupt
        write(path, job, *rest)

    monkeypatch.setattr(pipeline, "write_mmcif", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fold(fasta(f">a\n{ONE}\n>b\n{TWO}\n"), tmp_path / "out", FoldSettings())
    assert sorted(os.listdir(tmp_path / "out")) == ["a", "run.json"]
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [job["status"] for job in run["jobs"]] == ["ok", "pending"]


def test_other_results_stay_and_stale_ones_of_the_same_job_go(fake_model, fasta, tmp_path):
    out = tmp_path / "out"
    fold(fasta(f">a\n{ONE}\n"), out, FoldSettings())
    (out / "a" / "notes.txt").write_text("mine")
    other = fold(fasta(f">b\n{TWO}\n"), out, FoldSettings())
    assert other.jobs[0].status == "ok"
    assert len(files_in(out / "a")) == 4
    fold(fasta(f">a\n{ONE}\n"), out, FoldSettings(compare=False))
    assert files_in(out / "a") == ["a_flashbias.cif", "notes.txt"]
    assert len(files_in(out / "b")) == 3


def test_reference_alone_and_accelerated_alone(fake_model, fasta, tmp_path):
    path = fasta(f">a\n{ONE}\n")
    reference = fold(path, tmp_path / "r", FoldSettings(attention="reference"))
    assert files_in(tmp_path / "r") == ["a/a_reference.cif", "run.json"]
    assert (list(reference.jobs[0].paths), reference.jobs[0].ca_rmsd) == (["reference"], None)
    accelerated = fold(path, tmp_path / "f", FoldSettings(compare=False))
    assert files_in(tmp_path / "f") == ["a/a_flashbias.cif", "run.json"]
    assert list(accelerated.jobs[0].paths) == ["flashbias"]


@pytest.fixture
def no_model(monkeypatch):
    def load(path):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(checkpoint, "load_checkpoint", load)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (">../../x\nACD\n", "line 1: the id is not safe"),
        (">a\nACD\n>a\nACD\n", "record 'a', line 3: duplicate"),
        (">a\nACD\n>b\nAC1\n", "record 'b', line 4"),
    ],
)
def test_bad_input_is_answered_before_the_model_and_writes_nothing(
    fake_model, no_model, fasta, tmp_path, text, message
):
    with pytest.raises(InputError, match=message):
        fold(fasta(text), tmp_path / "out", FoldSettings())
    assert os.listdir(tmp_path) == ["in.fasta"]


def test_too_long_and_not_an_antibody_are_answered_before_the_model(
    antibody_weights, no_model, fasta, tmp_path, monkeypatch
):
    with pytest.raises(InputError, match=r"record 'b', line 3, chain A: .*no conserved framework"):
        fold(fasta(f">a\nEVQWGQGS\n>b\n{ONE}\n"), tmp_path / "out", FoldSettings())
    monkeypatch.setattr("pairformer_fast.inference.validate.available_bytes", lambda device: 1000)
    with pytest.raises(InputError, match="record 'a', line 1: 8 residues need"):
        fold(fasta(">a\nEVQWGQGS\n"), tmp_path / "out", FoldSettings())
    assert os.listdir(tmp_path) == ["in.fasta"]


def test_antibody_under_antibody_weights_folds(antibody_weights, fasta, tmp_path):
    report = fold(fasta(">a\nEVQWGQGS\n"), tmp_path / "out", FoldSettings())
    assert report.jobs[0].status == "ok"


def test_missing_and_foreign_checkpoints(fake_model, no_model, fasta, tmp_path):
    path = fasta(f">a\n{ONE}\n")
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"no safetensors")
    for weights, message in [(tmp_path / "nope.safetensors", "no such file"), (foreign, "not a safetensors file")]:
        with pytest.raises(InputError, match=message):
            fold(path, tmp_path / "out", FoldSettings(checkpoint=weights))
    assert not (tmp_path / "out").exists()


def test_outputs_never_leave_the_folder_through_links(fake_model, no_model, fasta, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").symlink_to(outside)
    path = fasta(f">a\n{ONE}\n")
    with pytest.raises(InputError, match="is a link or a file"):
        fold(path, out, FoldSettings())
    with pytest.raises(InputError, match="exists and is no folder"):
        fold(path, path, FoldSettings())
    assert files_in(outside) == []


def test_progress_reaches_its_end_even_if_jobs_fail(fake_model, fasta, tmp_path):
    from rich.progress import Progress

    progress = Progress(disable=True)
    fold(fasta(f">bad\nWWWACD\n>a\n{ONE}\n"), tmp_path / "out", FoldSettings(), progress)
    (task,) = progress.tasks
    assert (task.completed, task.total) == (4, 4)


def test_bf16_on_the_cpu_reaches_the_model_and_files_stay_readable(fake_model, fasta, tmp_path, monkeypatch):
    seen = []

    class Bf16(FakeModel):
        def forward(self, features, recycles):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(features, recycles)

    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda path: Bf16())
    report = fold(fasta(f">a\n{ONE}\n"), tmp_path / "out", FoldSettings(precision="bf16", device="cpu"))
    assert (seen, report.chosen["precision"], report.jobs[0].status) == ([True, True], "bf16", "ok")
