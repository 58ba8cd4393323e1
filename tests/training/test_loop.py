"""Training steps, resumption, and gradients as CUDA graphs give them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pairformer_fast.bias import set_attention
from pairformer_fast.config import (
    AttentionConfig,
    Backend,
    BiasMethod,
    ModelConfig,
    PairformerConfig,
    StructureModuleConfig,
)
from pairformer_fast.features import TokenFeatures
from pairformer_fast.model.checkpoint import checkpoint_metadata, load_checkpoint
from pairformer_fast.model.folding import FoldingModel
from pairformer_fast.training import loop
from pairformer_fast.training.dataset import AntibodyDataset, Batch, collate
from pairformer_fast.training.loop import LOG_FILE, STATE_FILE, WEIGHTS_FILE, train
from pairformer_fast.training.losses import WEIGHTS, compute_losses, term_weights
from pairformer_fast.training.settings import TrainConfig, TrainSettings
from pairformer_fast.training.shards import shard_path, write_shard
from pairformer_fast.training.step import GradientStep

from .structures import structure

STEPS = 5


def tiny_model(dropout: float) -> ModelConfig:
    return ModelConfig(
        pairformer=PairformerConfig(
            c_s=16, c_z=8, c_hidden_mul=8, c_hidden_pair_att=8, no_heads_pair=2, c_hidden_pair_bias=8,
            no_heads_pair_bias=2, transition_n=2, no_blocks=2, pair_dropout=dropout,
        ),
        structure=StructureModuleConfig(
            c_s=16, c_hidden_ipa=8, no_heads_ipa=2, no_blocks=2, c_angle=8, dropout=dropout
        ),
        recycles=1,
    )  # fmt: skip


CONFIG = TrainConfig(
    model=tiny_model(dropout=0.2),
    train=TrainSettings(
        steps=STEPS, batch_size=2, warmup=2, ema_decay=0.5, mixture={"made": 1.0}, padded_lengths=(12, 16),
        log_every=1, save_every=2,
    ),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over several threads round differently from run to run; the uninterrupted run of the module is one, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for split in ("train", "val", "crystal"):
        singles = [structure(f"{split}-s{i}", ["ACDEFGHIKL"], all_atoms=True, seed=i) for i in range(3)]
        pairs = [structure(f"{split}-p{i}", ["WYTRNLAC", "GHIKMPQ"], all_atoms=True, seed=i) for i in range(3)]
        write_shard(shard_path(folder, split), singles + pairs)
    return folder


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def hardware(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the runs are: training takes a GPU wherever there is one."""
    with patch.object(torch.cuda, "is_available", lambda: request.param == "cuda"):
        yield request.param


@pytest.fixture(scope="module")
def uninterrupted(data: Path, hardware: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert train(CONFIG, data, folder)
    return folder


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


def test_a_run_writes_state_log_and_averaged_weights(uninterrupted: Path) -> None:
    *steps, last = log(uninterrupted)
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert all(set(WEIGHTS) | {"total", "lddt_ca", "gradient_norm"} <= row.keys() for row in steps)
    assert {split: scores["structures"] for split, scores in last["evaluation"].items()} == {"val": 6, "crystal": 6}
    assert last["train"] == CONFIG.train.model_dump(mode="json")

    state = torch.load(uninterrupted / STATE_FILE, weights_only=True, map_location="cpu")
    assert state["step"] == STEPS
    assert not list(uninterrupted.glob("*.tmp"))
    weights = load_checkpoint(uninterrupted / WEIGHTS_FILE).state_dict()
    for name, value in weights.items():
        averaged = state["average"][f"module.{name}"]
        torch.testing.assert_close(value, averaged.bfloat16().float(), atol=0, rtol=0)
    assert any((state["model"][name] - value).abs().max() > 1e-4 for name, value in weights.items())
    assert checkpoint_metadata(uninterrupted / WEIGHTS_FILE)["step"] == STEPS


def assert_same_run(folder: Path, other: Path) -> None:
    one, two = (torch.load(run / STATE_FILE, weights_only=True, map_location="cpu") for run in (folder, other))
    assert one["step"] == two["step"] == STEPS
    for part in ("model", "average"):
        for name, value in one[part].items():
            torch.testing.assert_close(value, two[part][name], atol=0, rtol=0)
    one, two = (load_file(run / WEIGHTS_FILE) for run in (folder, other))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_run_that_stops_on_time_goes_on_as_if_it_had_not(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    # no time at all still makes one step
    assert [train(CONFIG, data, tmp_path, minutes=0) for _ in range(2)] == [False, False]
    assert torch.load(tmp_path / STATE_FILE, weights_only=True)["step"] == 2
    assert train(CONFIG, data, tmp_path)
    assert_same_run(tmp_path, uninterrupted)


def test_a_killed_run_goes_on_from_its_last_state(
    data: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed_after_three(progress: float) -> Tensor:
        if progress >= 3 / STEPS:
            raise KeyboardInterrupt
        return term_weights(progress)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "term_weights", killed_after_three)
        with pytest.raises(KeyboardInterrupt):
            train(CONFIG, data, tmp_path)
    assert torch.load(tmp_path / STATE_FILE, weights_only=True)["step"] == CONFIG.train.save_every
    assert train(CONFIG, data, tmp_path)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("split", ["train", "val", "crystal"])
def test_missing_data_is_named_before_anything_is_written(data: Path, tmp_path: Path, split: str) -> None:
    for present in {"train", "val", "crystal"} - {split}:
        shard_path(tmp_path, present).symlink_to(shard_path(data, present))
    with pytest.raises(FileNotFoundError, match=rf"{split}\.safetensors does not exist.*prepare_antibody_data"):
        train(CONFIG, tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def run_script(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "scripts" / "train.py"), *arguments]
    environment = os.environ | {"COLUMNS": "200", "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=repository, env=environment)


def test_script_explains_itself(repository: Path) -> None:
    result = run_script(repository, "--help")
    assert result.returncode == 0, result.stderr
    assert all(f"--{option}" in result.stdout for option in ("config", "data", "output", "minutes"))


def test_script_fails_clearly_without_data(repository: Path, tmp_path: Path) -> None:
    result = run_script(repository, "--data", str(tmp_path), "--output", str(tmp_path / "run"))
    assert result.returncode == 2
    assert "does not exist" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def noisy_model(device: str = "cpu") -> FoldingModel:
    """Without dropout, and without the zeros of a fresh model, which hide one layer from another."""
    torch.manual_seed(0)
    model = FoldingModel(tiny_model(dropout=0.0)).train().to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradients(model: FoldingModel) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_recycling_under_autocast_leaves_the_trunk_its_gradients() -> None:
    model = noisy_model()
    features = TokenFeatures.from_chains(["ACDEFGHI", "KLMNPQR"])
    with torch.autocast("cpu", torch.bfloat16):
        output = model.run(features, recycles=1)
        loss = output.structure.atom14.square().mean() + output.distogram.float().square().mean()
    loss.backward()
    without = [name for name, p in model.pairformer_stack.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def batches(data: Path) -> list[Batch]:
    """Two batches of each of two shapes: short, long, short, long."""
    dataset = AntibodyDataset(data, "train")
    draws = [(0, 1), (3, 4), (1, 2), (4, 5)]
    return [collate([dataset[i] for i in draw], lengths=(12, 16)) for draw in draws]


def eager(model: FoldingModel, batch: Batch, recycles: int, weights: Tensor) -> dict[str, Tensor]:
    """Losses; leaves the gradients in the model."""
    device = weights.device
    model.zero_grad(set_to_none=True)
    batch = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        output = model.run(batch.features, recycles)
        losses = compute_losses(output, batch, model.structure_module.all_atom, weights)
    losses["total"].backward()
    return losses


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", Backend.REFERENCE),
        pytest.param("cuda", Backend.REFERENCE, marks=pytest.mark.gpu),
        pytest.param("cuda", Backend.AUTO, marks=pytest.mark.gpu),
    ],
)
def test_gradient_steps_are_those_of_eager_pytorch(data: Path, device: str, backend: Backend) -> None:
    """On CUDA the first call for a shape and number of recycles captures a graph and later ones replay it."""
    stepped, plain = noisy_model(device), noisy_model(device)
    for model in (stepped, plain):
        set_attention(model, AttentionConfig(backend=backend, bias=BiasMethod.DENSE))
    step = GradientStep(stepped)
    # Backward passes with atomic additions are not deterministic on a GPU, and bf16 magnifies that.
    tolerance = 1e-5 if device == "cpu" else 2e-2
    drawn = batches(data)
    assert [batch.cdr.shape[1] for batch in drawn] == [12, 16, 12, 16]
    calls = [(b, r, p) for p in (0.0, 1.0) for b in drawn for r in (0, 1)]
    for batch, recycles, progress in calls:
        weights = term_weights(progress)
        losses = {name: value.clone() for name, value in step(batch, recycles, weights).items()}
        want = eager(plain, batch, recycles, weights.to(device))
        assert losses.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(losses[name], value, atol=tolerance / 10, rtol=tolerance, msg=name)
        expected = gradients(plain)
        scale = max(value.norm() for value in expected.values())
        for name, value in gradients(stepped).items():
            assert (value - expected[name]).norm() <= tolerance * (expected[name].norm() + 0.01 * scale), name
