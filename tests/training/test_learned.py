# ruff: noqa: F401, F811 (fixtures are imported by name)
"""Training with factors of networks instead of a dense bias."""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from pairformer_fast.bias import (
    FactorNetworks,
    MissingFactorNetworksError,
    attach_factors,
    collect_reports,
    set_attention,
)
from pairformer_fast.bias.learned import side_file
from pairformer_fast.config import AttentionConfig
from pairformer_fast.features import TokenFeatures
from pairformer_fast.model.checkpoint import load_checkpoint
from pairformer_fast.model.factors import factor_networks, load_factors
from pairformer_fast.model.folding import FoldingModel
from pairformer_fast.training.loop import STATE_FILE, WEIGHTS_FILE, train
from pairformer_fast.training.losses import compute_losses, term_weights
from pairformer_fast.training.settings import TrainAttention
from pairformer_fast.training.step import GradientStep

from .test_loop import CONFIG, STEPS, batches, data, log, noisy_model, one_thread

LEARNED = CONFIG.model_copy(update={"attention": TrainAttention(bias="learned", rank=3, hidden=8, table=2)})
PARTS = ("model", "average", "networks", "average_networks")


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert train(LEARNED, data, folder)
    return folder


def state_of(folder: Path) -> dict:
    return torch.load(folder / STATE_FILE, weights_only=True)


def test_networks_are_optimised_averaged_and_written_beside_the_weights(uninterrupted: Path) -> None:
    state = state_of(uninterrupted)
    torch.manual_seed(CONFIG.train.seed)
    fresh = factor_networks(FoldingModel(LEARNED.model), 3, hidden=8, table=2).state_dict()
    # Softmax ignores what is the same for all keys.
    moved = {name: (state["networks"][name] - fresh[name]).abs().max() > 0 for name in fresh}
    assert all(value for name, value in moved.items() if "phi_k.4.bias" not in name), moved
    assert {len(group["params"]) for group in state["optimizer"]["param_groups"]} == {
        len(list(FoldingModel(LEARNED.model).parameters())) + len(fresh)
    }

    weights = uninterrupted / WEIGHTS_FILE
    model = load_checkpoint(weights)
    networks = load_factors(side_file(weights), model, weights)
    for name, value in networks.state_dict().items():
        assert torch.equal(value, state["average_networks"][f"module.{name}"]), name
    assert log(uninterrupted)[-1]["attention"]["rank"] == 3


def test_a_checkpoint_that_was_trained_with_factors_never_runs_with_its_unused_dense_bias(uninterrupted: Path) -> None:
    weights = uninterrupted / WEIGHTS_FILE
    model, features = load_checkpoint(weights), TokenFeatures.from_chains(["ACDEFG"])
    with torch.no_grad():
        with pytest.raises(MissingFactorNetworksError):
            model(features)
        attach_factors(model, load_factors(side_file(weights), model, weights))
        model(features)
    assert {(report["choice"], *report["rank"]) for report in collect_reports(model)} == {("factors", 3, 3)}


def test_a_run_that_stops_goes_on_as_if_it_had_not(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    assert not train(LEARNED, data, tmp_path, minutes=0)
    assert state_of(tmp_path)["step"] == 1
    assert train(LEARNED, data, tmp_path)
    one, two = state_of(tmp_path), state_of(uninterrupted)
    assert one["step"] == two["step"] == STEPS
    for part in PARTS:
        for name, value in two[part].items():
            assert torch.equal(one[part][name], value), f"{part} {name}"
    files = [side_file(folder / WEIGHTS_FILE) for folder in (tmp_path, uninterrupted)]
    one, two = (FactorNetworks.load(file).state_dict() for file in files)
    assert all(torch.equal(one[name], value) for name, value in two.items())


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (TrainAttention(), "attention.bias learned, but the settings ask for dense"),
        (TrainAttention(bias="learned", rank=4), "does not fit the settings of the networks"),
    ],
)
def test_a_run_of_another_kind_is_not_gone_on_with(data, uninterrupted, attention, message) -> None:
    before = (uninterrupted / STATE_FILE).read_bytes()
    with pytest.raises(ValueError, match=message):
        train(CONFIG.model_copy(update={"attention": attention}), data, uninterrupted)
    assert (uninterrupted / STATE_FILE).read_bytes() == before


def test_networks_of_a_dense_run_are_refused() -> None:
    with pytest.raises(ValueError, match="rank is for factor networks: drop it or set bias learned"):
        TrainAttention(rank=4)


def test_script_switches_between_dense_bias_and_learned_factors(
    script, run_script, monkeypatch, tmp_path: Path
) -> None:
    preset, asked = tmp_path / "preset.yaml", []
    model = LEARNED.model_dump(mode="json", exclude_defaults=True)
    preset.write_text(yaml.safe_dump(model | {"attention": {"bias": "learned", "rank": 16}}))
    monkeypatch.setattr(script("train"), "train", lambda config, *_: asked.append(config.attention))
    run = partial(run_script, "train", "--config", preset)
    for options in ((), ("--rank", "8"), ("--table", "4"), ("--bias", "dense")):
        assert run(*options)[0] == 0
    learned = TrainAttention(bias="learned", rank=16)
    changed = [learned.model_copy(update=update) for update in ({"rank": 8}, {"table": 4})]
    assert asked == [learned, *changed, TrainAttention()]
    status, _, err = run("--bias", "dense", "--rank", "8")
    assert (status, "rank is for factor networks" in err, err.count("\n")) == (2, True, 1)
    assert run("--bias", "svd")[0] == 2


def learned_model(device: str) -> tuple[FoldingModel, FactorNetworks]:
    model = noisy_model(device)
    torch.manual_seed(1)
    networks = factor_networks(model, 3, hidden=8, table=2).to(device)
    attach_factors(model, networks)
    set_attention(model, AttentionConfig(backend="reference", bias="learned"))
    return model, networks


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradient_steps_are_those_of_eager_pytorch(data: Path, device: str) -> None:
    """On CUDA the second call for a shape replays a graph, which must read and fill the networks' tensors."""
    (stepped, networks), (plain, reference) = learned_model(device), learned_model(device)
    step = GradientStep(stepped, [*stepped.parameters(), *networks.parameters()])
    tolerance = 1e-5 if device == "cpu" else 2e-2
    for batch in batches(data):
        weights = term_weights(0.5)
        step(batch, 1, weights)
        for module in (plain, reference):
            module.zero_grad(set_to_none=True)
        on_device = batch.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            output = plain.run(on_device.features, 1)
            losses = compute_losses(output, on_device, plain.structure_module.all_atom, weights.to(device))
        losses["total"].backward()
        scale = max(parameter.grad.norm() for parameter in reference.parameters())
        for (name, found), want in zip(networks.named_parameters(), reference.parameters(), strict=True):
            difference: Tensor = (found.grad - want.grad).norm()
            assert difference <= tolerance * (want.grad.norm() + 0.01 * scale), name


def test_training_with_learned_factors_lowers_the_loss(data: Path) -> None:
    model, networks = learned_model("cpu")
    parameters = [*model.parameters(), *networks.parameters()]
    step, optimizer = GradientStep(model, parameters), torch.optim.Adam(parameters, lr=3e-3)
    batch, weights, losses = batches(data)[0], term_weights(0.0), []
    for _ in range(25):
        losses.append(float(step(batch, 0, weights)["total"]))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    # The networks alone can lower it, too.
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-2)
    start = float(step(batch, 0, weights)["total"])
    for _ in range(10):
        optimizer.step()
        end = float(step(batch, 0, weights)["total"])
    assert end < start
