# ruff: noqa: F401, F811 (fixtures are imported by name)
"""Factor networks fitted to the dense biases of a frozen model."""

import json
from itertools import count
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

from pairformer_fast.bias import FactorNetworks, attach_factors, collect_reports, set_attention
from pairformer_fast.config import AttentionConfig
from pairformer_fast.features import TokenFeatures
from pairformer_fast.kernels.flash_bias import Factors
from pairformer_fast.model.checkpoint import load_checkpoint, save_checkpoint
from pairformer_fast.model.factors import attention_sizes, factor_networks, load_factors
from pairformer_fast.model.observe import Observed, observing, probed_errors
from pairformer_fast.training.distill import LOG_FILE, STATE_FILE, DistillSettings, attended_error, distill

from .test_loop import data, noisy_model, one_thread

SETTINGS = DistillSettings(rank=6, hidden=32, table=4, steps=40, learning_rate=1e-2, held_out=2, log_every=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = noisy_model().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("linear_z.weight") and ("tri_att" in name or "pair_bias" in name):
                parameter.mul_(4)  # biases that matter
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_checkpoint(model, path, {})
    return path


@pytest.fixture(scope="module")
def fitted(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    side = distill(checkpoint, data, tmp_path_factory.mktemp("fit"), SETTINGS)
    assert side is not None
    return side


def facts(side: Path) -> dict:
    return json.loads((side.parent / LOG_FILE).read_text().splitlines()[-1])


def test_distillation_lowers_loss_and_probed_error_on_held_out_structures(fitted: Path) -> None:
    *steps, last = [json.loads(line) for line in (fitted.parent / LOG_FILE).read_text().splitlines()]
    losses = [row["loss"] for row in steps]
    assert len(losses) == SETTINGS.steps
    assert fmean(losses[-5:]) < 0.6 * fmean(losses[:5])
    before, after = (fmean(last[key].values()) for key in ("before", "after"))
    assert after < 0.7 * before
    assert len(last["after"]) == 6


def test_the_side_file_folds_close_to_the_dense_model(fitted: Path, checkpoint: Path) -> None:
    model, features = load_checkpoint(checkpoint), TokenFeatures.from_chains(["ACDEFGHIKLMN"])
    networks = load_factors(fitted, model, checkpoint)
    errors = probed_errors(model, networks, features)
    assert errors.keys() == attention_sizes(model).keys()
    assert fmean(errors.values()) < 2 * fmean(facts(fitted)["after"].values())
    with torch.no_grad():
        dense = model(features).atom14
        distances = []
        for candidate in (networks, factor_networks(model, 6, hidden=32)):
            attach_factors(model, candidate)
            set_attention(model, AttentionConfig(bias="learned"))
            distances.append((model(features).atom14 - dense).norm())
    assert distances[0] < distances[1]


def test_a_fit_that_stops_goes_on_as_if_it_had_not(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    short = SETTINGS.model_copy(update={"steps": 4})
    whole = distill(checkpoint, data, tmp_path / "whole", short)
    parts = [distill(checkpoint, data, tmp_path / "parts", short, minutes=0) for _ in range(4)]
    assert parts[:3] == [None] * 3
    one, two = (FactorNetworks.load(side).state_dict() for side in (whole, parts[3]))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert facts(whole) == facts(parts[3])
    with pytest.raises(ValueError, match=r"distill_state.pt is of other weights or settings"):
        distill(checkpoint, data, tmp_path / "parts", SETTINGS)


def test_a_fit_with_a_time_of_its_own_ends_with_networks_over_all_its_runs(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = count()
    monkeypatch.setattr("pairformer_fast.training.distill.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    endless = SETTINGS.model_copy(update={"steps": 10**6, "within": 0.5})
    assert distill(checkpoint, data, tmp_path / "fit", endless, minutes=0.3) is None
    side = distill(checkpoint, data, tmp_path / "fit", endless)
    assert side is not None
    rows = [json.loads(line) for line in (side.parent / LOG_FILE).read_text().splitlines()]
    assert 15 <= rows[-1]["step"] <= 25
    assert fmean(rows[-1]["after"].values()) < fmean(rows[-1]["before"].values())


def test_weights_without_a_dense_bias_are_refused(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "trained.safetensors"
    save_checkpoint(load_checkpoint(checkpoint), path, {"attention": {"bias": "learned"}})
    with pytest.raises(ValueError, match="no dense bias to fit"):
        distill(path, data, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_observing_changes_no_prediction_and_sees_what_attention_gets(checkpoint: Path) -> None:
    model, features = load_checkpoint(checkpoint), TokenFeatures.from_chains(["ACDEFG", "HIKL"])
    seen: list[Observed] = []
    with torch.no_grad():
        alone = model(features, 0).atom14
        with observing(model, seen.append):
            watched = model(features, 0).atom14
        model(features, 0)
    assert torch.equal(watched, alone)
    assert [call.path for call in seen] == list(attention_sizes(model))
    assert [tuple(call.q.shape[1:-2]) for call in seen] == [(10, 10), (10, 10), (10,)] * 2
    assert all(call.bias.shape == (1, 2, 10, 10) for call in seen)


@pytest.mark.parametrize("form", ["triangle", "single"])
def test_the_loss_is_twice_the_divergence_of_small_errors(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, 7, 2, 4) if form == "triangle" else (1, 7, 2, 4)
    q, k = torch.randn(2, *shape, generator=generator)
    keep = torch.tensor([[True] * 6 + [False]])
    mask = keep[:, None] if form == "triangle" else keep
    phi_q, phi_k = torch.randn(2, 1, 2, 7, 3, generator=generator)
    bias = phi_q @ phi_k.mT + 0.01 * torch.randn(1, 2, 7, 7, generator=generator)
    seen = Observed("", q, k, mask, bias + 5 * torch.randn(7, 1, generator=generator), torch.empty(0), keep)
    single_q, single_k = (x.reshape(1, 7, 2, 4) for x in (q, k))
    products = torch.einsum("bqhd,bkhd->bhqk", single_q, single_k) / 2

    def weights(table: torch.Tensor) -> torch.Tensor:
        return (products + table)[..., :6, :6].double().log_softmax(-1)

    log_p, log_q = weights(bias), weights(phi_q @ phi_k.mT)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    loss = attended_error(Factors(phi_q, phi_k), seen)
    assert float(loss) == pytest.approx(2 * float(divergence), rel=0.05)


def test_script_fits_and_fails_clearly(run_script, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    options = ("--checkpoint", checkpoint, "--rank", 2, "--hidden", 4, "--table", 0, "--steps", 2)
    status, out, err = run_script("distill_factors", *options, "--data", data, "--output", tmp_path / "fit")
    assert status == 0, err
    assert out.count("mha.core") == 6
    assert (tmp_path / "fit" / STATE_FILE).is_file()
    networks = FactorNetworks.load(tmp_path / "fit" / "model.factors.safetensors", checkpoint)
    assert {(shape.rank, shape.table) for shape in networks.shapes.values()} == {(2, None)}
    status, _, err = run_script("distill_factors", *options, "--data", tmp_path, "--output", tmp_path / "other")
    assert (status, "does not exist" in err) == (2, True)
    assert not (tmp_path / "other").exists()
