"""``fold --model openfold3`` end to end on a CPU, with a small OpenFold3 of random weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pairformer_fast import cli
from pairformer_fast.inference.compare import compare_structures
from pairformer_fast.inference.structures import read_structure

pytest.importorskip("openfold3", reason="needs the extra [openfold]: pip install '.[openfold]'")

import openfold3.core.data.tools.colabfold_msa_server as msa_server
from openfold3.core.data.framework.single_datasets.inference import InferenceDataset
from openfold3.projects.of3_all_atom.model import OpenFold3

from pairformer_fast.integrations import factor_networks

from .test_openfold3_run import SMALL, configuration, weights  # noqa: F401 -- a fixture

ONE, TWO = "GSHMKVLAAGIVALCAAQ", "MKTAYIAKQR"
FILES = [
    "comparison.json",
    "flashbias.cif",
    "flashbias_confidences.json",
    "reference.cif",
    "reference_confidences.json",
]


@pytest.fixture(scope="module")
def job(tmp_path_factory, weights) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("fold")
    torch.save(weights, folder / "weights.pt")
    (folder / "small.yml").write_text(yaml.safe_dump({"model_update": {"custom": SMALL}}))
    return folder


@pytest.fixture
def fold(job, tmp_path, monkeypatch, capsys):
    """Run ``pairformer-fast fold``: exit status, stderr."""

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the MSA server must not be asked")

    monkeypatch.setattr(msa_server, "query_colabfold_msa_server", no_network)

    def _fold(text: str, *options: str, out: str = "out", checkpoint: Path | None = None, runner: Path | None = None):
        (tmp_path / "in.fasta").write_text(text)
        arguments = [str(tmp_path / "in.fasta"), str(tmp_path / out), "--model", "openfold3", "--device", "cpu"]
        arguments += ["--checkpoint", str(checkpoint or job / "weights.pt")]
        arguments += ["--runner-yaml", str(runner or job / "small.yml"), *options]
        monkeypatch.setattr(sys, "argv", ["pairformer-fast", "fold", *arguments])
        with pytest.raises(SystemExit) as info:
            cli.main()
        assert not list(tmp_path.glob("**/.unfinished*"))
        return info.value.code, capsys.readouterr().err

    return _fold


def test_both_paths_of_two_jobs(fold, tmp_path, caplog):
    status, _ = fold(f">one\n{ONE}\n>two.x\n{TWO}:{ONE}\n", "--bias", "svd", "--rank", "4", "--seed", "3")
    assert status == 0
    assert "no alignment for one:A, two.x:A, two.x:B" in caplog.text
    out = tmp_path / "out"
    for name, chains in {"one": [ONE], "two.x": [TWO, ONE]}.items():
        assert sorted(path.name for path in (out / name).iterdir()) == [f"{name}_{file}" for file in FILES]
        structure = read_structure(out / name / f"{name}_flashbias.cif")
        assert ["".join(residue.letter for residue in chain) for chain in structure.values()] == chains
        assert all(0 < residue.plddt < 100 for chain in structure.values() for residue in chain)
        content = json.loads((out / name / f"{name}_comparison.json").read_text())
        assert 0 < content["all_atom_rmsd"] < 0.1, "the same conformers and noise, and attention that differs"
        assert content["plddt_difference"] is not None
        assert {rank for report in content["bias"] for rank in report["rank"]} == {4}
    report = json.loads((out / "run.json").read_text())
    assert [job["status"] for job in report["jobs"]] == ["ok", "ok"]
    assert report["chosen"]["recycles"] == 0
    for job in report["jobs"]:
        assert (job["paths"]["reference"]["factors"], job["paths"]["reference"]["dense"]) == (0, 0)
        assert job["paths"]["flashbias"]["factors"] > 0


def test_learned_factors(fold, tmp_path):
    learned = ["--bias", "learned", "--no-compare"]
    status, stderr = fold(f">one\n{ONE}\n", *learned)
    assert status == 2
    assert "weights.factors.safetensors" in stderr
    assert not (tmp_path / "out").exists()
    file = tmp_path / "made.factors.safetensors"
    factor_networks(OpenFold3(configuration("predict")), 4).save(file)
    status, _ = fold(f">one\n{ONE}\n", *learned, "--factors", str(file))
    assert status == 0
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert report["factors"]["name"] == file.name
    path = report["jobs"][0]["paths"]["flashbias"]
    assert path["factors"] > 0
    assert path["mean_rank"] == 4


def test_alignments_reach_the_model(fold, tmp_path, caplog):
    (tmp_path / "x.a3m").write_text(f">q\n{ONE}\n>r\n{ONE[:4]}ac{'-' * 5}{ONE[9:]}\n")
    options = ("--attention", "reference", "--recycles", "1")
    status, _ = fold(f">A|protein|x.a3m\n{ONE}\n", *options, out="with")
    assert status == 0
    assert "no alignment" not in caplog.text
    status, _ = fold(f">A|protein|empty\n{ONE}\n", *options, out="without")
    assert status == 0
    assert "no alignment for in:A" in caplog.text
    found, other = (tmp_path / out / "in" / "in_reference.cif" for out in ("with", "without"))
    assert sorted(path.name for path in found.parent.iterdir()) == ["in_reference.cif", "in_reference_confidences.json"]
    assert compare_structures(found, other).all_atom_rmsd > 1e-3
    report = json.loads((tmp_path / "with" / "run.json").read_text())
    assert report["chosen"]["msas"] == {"in:A": "x.a3m"}
    assert report["chosen"]["recycles"] == 1


def test_a_job_that_fails_leaves_nothing_and_gives_its_reason(fold, tmp_path, monkeypatch):
    featurise, forward = InferenceDataset.create_all_features, OpenFold3.forward

    def featurise_some(self, query):
        if query.query_name == "early":
            raise RuntimeError("no conformer")
        return featurise(self, query)

    def forward_some(self, batch):
        if batch["query_id"] == ["late"]:
            raise RuntimeError("no luck")
        return forward(self, batch)

    monkeypatch.setattr(InferenceDataset, "create_all_features", featurise_some)
    monkeypatch.setattr(OpenFold3, "forward", forward_some)
    old = tmp_path / "out" / "late" / "late_flashbias.cif"
    old.parent.mkdir(parents=True)
    old.write_text("of an earlier run")
    status, stderr = fold(f">early\n{ONE}\n>late\n{ONE}\n>good\n{TWO}\n", "--no-compare")
    assert status == 1
    assert stderr.splitlines()[-2:] == [
        "pairformer-fast: job early failed: no conformer",
        "pairformer-fast: job late failed: no luck",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good", "late", "run.json"]
    assert old.read_text() == "of an earlier run"
    assert sorted(path.name for path in (tmp_path / "out" / "good").iterdir()) == [
        "good_flashbias.cif",
        "good_flashbias_confidences.json",
    ]
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [job["error"] for job in report["jobs"]] == ["no conformer", "no luck", None]


def test_a_run_that_breaks_off_keeps_the_jobs_that_were_done(fold, tmp_path, monkeypatch):
    get, done = InferenceDataset.__getitem__, []

    def get_first(self, index):
        if done:
            raise MemoryError("no memory")
        done.append(self.datapoint_cache.iloc[index]["query_id"])
        return get(self, index)

    monkeypatch.setattr(InferenceDataset, "__getitem__", get_first)
    status, stderr = fold(f">one\n{ONE}\n>two\n{TWO}\n", "--no-compare")
    [failed] = {"one", "two"} - set(done)
    assert status == 1
    assert (
        stderr.splitlines()[-1] == f"pairformer-fast: job {failed} failed: OpenFold3 broke off: MemoryError: no memory"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*done, "run.json"])


def test_a_checkpoint_that_does_not_fit(fold, tmp_path):
    torch.save({"layer.weight": torch.ones(2)}, tmp_path / "other.pt")
    status, stderr = fold(f">a\n{ONE}\n", checkpoint=tmp_path / "other.pt")
    assert status == 2
    last = stderr.splitlines()[-1]
    assert f"checkpoint {tmp_path / 'other.pt'} does not fit the model: " in last
    assert "keys do not match" in last
    assert len(last) < 600
    assert not (tmp_path / "out").exists()


def test_a_runner_yaml_with_an_unknown_key(fold, tmp_path):
    (tmp_path / "r.yml").write_text("pl_trainer_arg: {}\n")
    status, stderr = fold(f">a\n{ONE}\n", runner=tmp_path / "r.yml")
    assert status == 2
    assert "pl_trainer_arg" in stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
