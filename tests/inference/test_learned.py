# ruff: noqa: F401, F811 (fixtures are imported by name)
"""Folding with factor networks beside the weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pairformer_fast.bias.learned import side_file
from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.pipeline import fold
from pairformer_fast.inference.settings import FoldSettings
from pairformer_fast.model.checkpoint import load_checkpoint, save_checkpoint
from pairformer_fast.model.factors import factor_networks

from ..test_cli import ONE, run
from .test_end_to_end import SEQUENCE, weights


@pytest.fixture
def checkpoint(weights: Path, tmp_path: Path) -> Path:
    """Weights with networks beside them."""
    path = tmp_path / "model.safetensors"
    shutil.copy(weights, path)
    torch.manual_seed(0)
    factor_networks(load_checkpoint(path), 5, hidden=8).save(side_file(path), path)
    return path


@pytest.fixture
def trained_in(weights: Path, tmp_path: Path) -> Path:
    """Weights that were trained with their networks."""
    path, model = tmp_path / "trained.safetensors", load_checkpoint(weights)
    save_checkpoint(model, path, {"attention": {"bias": "learned"}})
    torch.manual_seed(0)
    factor_networks(model, 5, hidden=8).save(side_file(path), path)
    return path


def test_fold_takes_the_networks_beside_the_checkpoint(run, checkpoint, fasta, tmp_path):
    out = tmp_path / "out"
    status, _, err = run(
        "fold", fasta(f">a\n{SEQUENCE}\n"), out, "--bias", "learned", "--checkpoint", checkpoint, "--device", "cpu"
    )
    assert (status, err) == (0, "")
    report = json.loads((out / "run.json").read_text())
    assert report["factors"]["name"] == "model.factors.safetensors"
    fast, reference = (report["jobs"][0]["paths"][name] for name in ("flashbias", "reference"))
    assert (fast["dense"], fast["mean_rank"], fast["probed_error"], fast["bound"]) == (0, 5.0, None, None)
    assert reference["factors"] == 0
    calls = json.loads((out / "a" / "a_comparison.json").read_text())["bias"]
    assert {(call["choice"], *call["rank"][:2]) for call in calls} == {("factors", 5, 5)}


def test_networks_may_lie_elsewhere(checkpoint, fasta, tmp_path):
    elsewhere = side_file(checkpoint).rename(tmp_path / "networks.safetensors")
    settings = FoldSettings(checkpoint=checkpoint, bias="learned", device="cpu", compare=False)
    source = fasta(f">a\n{SEQUENCE}\n")
    with pytest.raises(InputError, match=r"no factor networks \(.*model.factors.safetensors does not exist\)"):
        fold(source, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    report = fold(source, tmp_path / "out", settings.model_copy(update={"factors": elsewhere}))
    assert report.failed == []
    assert report.factors["name"] == "networks.safetensors"


def test_weights_that_were_trained_with_factors_never_use_their_dense_bias(trained_in, fasta, tmp_path):
    report = fold(fasta(f">a\n{SEQUENCE}\n"), tmp_path / "out", FoldSettings(checkpoint=trained_in, device="cpu"))
    job = report.jobs[0]
    assert [path.dense for path in job.paths.values()] == [0, 0]
    assert job.all_atom_rmsd < 0.01
    assert report.chosen["paths"]["reference"] == {
        **report.chosen["paths"]["flashbias"],
        "backend": "reference",
        "bias": "learned",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bias", "svd"], "was trained with learned factors and has no dense bias: drop bias svd"),
        (["--bias", "dense"], "drop bias dense"),
        (["--tolerance", "0.1"], "drop tolerance"),
    ],
)
def test_other_biases_of_such_weights_are_refused(run, trained_in, fasta, tmp_path, options, message):
    status, out, err = run("fold", fasta(f">a\n{ONE}\n"), tmp_path / "out", "--checkpoint", trained_in, *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "out").exists()


def test_networks_of_other_weights_or_without_use_are_refused(run, checkpoint, trained_in, fasta, tmp_path):
    source, options = fasta(f">a\n{ONE}\n"), ("--checkpoint", checkpoint, "--factors", side_file(trained_in))
    for bias, message in (("learned", "of other weights than"), ("svd", "only --bias learned takes")):
        status, out, err = run("fold", source, tmp_path / "out", "--bias", bias, *options)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err
    status, _, err = run("fold", source, tmp_path / "out", "--bias", "learned", "--rank", "4")
    assert (status, "is that of their networks: drop rank" in err) == (2, True)
    assert not (tmp_path / "out").exists()
