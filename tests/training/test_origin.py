# ruff: noqa: F401, F811 (fixtures are imported by name)
"""Runs that start from the weights of another run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from pairformer_fast.bias.learned import side_file
from pairformer_fast.config import BiasMethod
from pairformer_fast.model.checkpoint import CheckpointError, checkpoint_metadata, load_checkpoint, save_checkpoint
from pairformer_fast.training.loop import STATE_FILE, WEIGHTS_FILE, train
from pairformer_fast.training.origin import origin_facts
from pairformer_fast.training.run import Run
from pairformer_fast.training.settings import TrainAttention, TrainSettings

from .test_learned import LEARNED
from .test_loop import CONFIG, STEPS, assert_same_run, data, log, one_thread

CPU = torch.device("cpu")
SHORT = CONFIG.model_copy(
    update={"train": CONFIG.train.model_copy(update={"steps": 3, "loss_from": 1.0, "loss_scale": {"peptide": 0.5}})}
)


@pytest.fixture(scope="module")
def weights(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    assert train(CONFIG, data, folder)
    return folder / WEIGHTS_FILE


@pytest.fixture(scope="module")
def learned_weights(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    assert train(LEARNED, data, folder)
    return folder / WEIGHTS_FILE


def test_a_run_starts_from_the_given_weights_and_says_so(data: Path, weights: Path, tmp_path: Path) -> None:
    run, given = Run.start(SHORT, CPU, weights), load_file(weights)
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, given[name].float(), atol=0, rtol=0, msg=name)

    assert train(SHORT, data, tmp_path, origin=weights)
    first, *_, last = log(tmp_path)
    # the weights of the loss are the last ones from the first step on
    assert first["total"] == pytest.approx(
        first["fape_backbone"] + first["fape_atoms"] + 0.5 * first["torsion"] + first["rmsd"] + first["lddt"]
        + 0.3 * (first["distogram"] + first["clash"]) + 0.15 * first["peptide"]
        + 0.02 * (first["plddt"] + first["pae"]), abs=2e-3,
    )  # fmt: skip
    earlier = checkpoint_metadata(weights)
    assert last["origin"] == origin_facts(weights, BiasMethod.DENSE)
    assert (last["origin"]["weights"], last["origin"]["steps"]) == (WEIGHTS_FILE, STEPS)
    assert last["gpu_seconds"] == pytest.approx(last["seconds"] + earlier["seconds"], abs=0.11)

    third = tmp_path / "third"
    assert train(SHORT, data, third, origin=tmp_path / WEIGHTS_FILE)
    assert log(third)[-1]["origin"]["steps"] == STEPS + 3
    assert log(third)[-1]["gpu_seconds"] >= last["gpu_seconds"]


def test_it_is_resumed_as_if_it_had_not_stopped_and_only_with_the_same_start(
    data: Path, weights: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(SHORT, data, one, origin=weights)
    assert not train(SHORT, data, two, minutes=0, origin=weights)
    with pytest.raises(ValueError, match=r"started from model\.safetensors, but this one starts from fresh weights"):
        train(SHORT, data, two)
    assert train(SHORT, data, two, origin=weights)
    states = [torch.load(folder / STATE_FILE, weights_only=True) for folder in (one, two)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name


def test_learned_factors_start_from_the_side_file_if_there_is_one(learned_weights: Path, tmp_path: Path) -> None:
    networks = Run.start(LEARNED, CPU, learned_weights).parts["networks"].module
    given = load_file(side_file(learned_weights))
    for name, value in networks.state_dict().items():
        assert torch.equal(value, given[name]), name
        assert value.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in networks.parameters())

    alone = tmp_path / WEIGHTS_FILE
    shutil.copy(learned_weights, alone)
    fresh = Run.start(LEARNED, CPU, alone)
    assert fresh.origin is not None
    assert fresh.origin["factors"] is None
    assert any(
        not torch.equal(value, given[name]) for name, value in fresh.parts["networks"].module.state_dict().items()
    )


def test_what_does_not_fit_is_named_and_nothing_is_written(
    data: Path, weights: Path, learned_weights: Path, tmp_path: Path
) -> None:
    wider = CONFIG.model_copy(
        update={
            "model": CONFIG.model.model_copy(
                update={"pairformer": CONFIG.model.pairformer.model_copy(update={"no_blocks": 3})}
            )
        }
    )
    with pytest.raises(
        CheckpointError, match=r"pairformer_stack\.blocks\.2.* has shape none there and \(.*change model"
    ):
        train(wider, data, tmp_path / "run", origin=weights)
    rank = LEARNED.model_copy(update={"attention": TrainAttention(bias="learned", rank=2, hidden=8, table=2)})
    with pytest.raises(ValueError, match=r"model\.factors\.safetensors does not fit the settings: .*rank=3"):
        train(rank, data, tmp_path / "run", origin=learned_weights)
    with pytest.raises(CheckpointError, match="its dense bias is untrained: set bias learned"):
        train(CONFIG, data, tmp_path / "run", origin=learned_weights)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        train(CONFIG, data, tmp_path / "run", origin=tmp_path / "missing.safetensors")
    assert not (tmp_path / "run").exists()


def test_dropout_may_differ(data: Path, weights: Path, tmp_path: Path) -> None:
    model = load_checkpoint(weights)
    changed = model.config.model_copy(update={"recycles": 2})
    path = tmp_path / "other.safetensors"
    model.config = changed
    save_checkpoint(model, path, {})
    run = Run.start(CONFIG, CPU, path)
    assert run.model.config == CONFIG.model
    assert run.origin == {**origin_facts(path, BiasMethod.DENSE), "steps": 0, "gpu_seconds": 0.0}


def test_script_reports_a_missing_start(run_script: Callable, data: Path, tmp_path: Path) -> None:
    options = ["--data", data, "--output", tmp_path / "run", "--from", tmp_path / "none.safetensors"]
    status, _, err = run_script("train", *options)
    assert status == 2
    assert "no checkpoint at" in err
    assert not (tmp_path / "run").exists()


def test_a_factor_of_an_unknown_term_is_refused() -> None:
    with pytest.raises(ValueError, match=r"some of fape_backbone, .* but got \{'bonds': 1\.0\}"):
        TrainSettings(loss_scale={"bonds": 1.0})
