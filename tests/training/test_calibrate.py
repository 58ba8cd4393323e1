# ruff: noqa: F401, F811 (fixtures are imported by name)
"""Calibration of pLDDT by held-out structures."""

import json
from pathlib import Path

import pytest
import torch

from pairformer_fast.bias import attach_factors
from pairformer_fast.bias.learned import side_file
from pairformer_fast.features import TokenFeatures
from pairformer_fast.model.checkpoint import checkpoint_metadata, load_checkpoint, save_checkpoint
from pairformer_fast.model.factors import factor_networks, load_factors
from pairformer_fast.model.heads import bin_centres
from pairformer_fast.training.calibrate import Calibration, Confidence, apply, crossed_error, errors_of, fit

from .test_loop import data, noisy_model, one_thread

BINS = 50


def overconfident(structures: int, residues: int = 400) -> list[Confidence]:
    """lDDT drawn from what logits say after a scale of 0.5 and a tilt of -4."""
    generator = torch.Generator().manual_seed(0)
    observed = []
    for _ in range(structures):
        centre = torch.rand(residues, 1, generator=generator, dtype=torch.float64)
        logits = -((bin_centres(torch.zeros(BINS), 1.0) - centre) ** 2) * 100
        bins = torch.multinomial(Calibration(0.5, -4.0)(logits).softmax(-1), 1, generator=generator)[:, 0]
        observed.append(Confidence(logits, (bins + 0.5) / BINS))
    return observed


def test_scale_and_tilt_are_found_and_the_mean_fits() -> None:
    observed = overconfident(20)
    found = fit(observed)
    assert found.scale == pytest.approx(0.5, abs=0.02)
    assert found.tilt == pytest.approx(-4.0, abs=0.2)
    assert errors_of(observed).mean() > 0.03
    assert abs(errors_of(observed, found).mean()) < 1e-4


def test_halves_that_differ_show_in_the_crossed_error() -> None:
    alike = overconfident(20)
    assert abs(crossed_error(alike)) < 0.01
    unlike = [Confidence(one.logits, one.lddt * (0.5 if i % 2 else 1.0)) for i, one in enumerate(alike)]
    few = unlike[:2]
    means = [errors_of([there], fit([here])).mean() for here, there in (few, few[::-1])]
    assert crossed_error(few) == pytest.approx(max(means, key=abs))
    assert abs(crossed_error(few)) > 0.1


def test_a_head_gives_calibrated_logits() -> None:
    head, s = noisy_model().plddt_head, torch.randn(3, 16)
    calibration = Calibration(0.7, -3.0)
    with torch.no_grad():
        wanted = calibration(head(s))
        apply(head, calibration)
        torch.testing.assert_close(head(s), wanted)


@pytest.mark.parametrize("learned", [False, True])
def test_the_script_changes_nothing_but_plddt(learned: bool, data: Path, run_script, tmp_path: Path) -> None:
    weights, output = tmp_path / "model.safetensors", tmp_path / "calibrated.safetensors"
    model = noisy_model().eval()
    facts = {"step": 7, "attention": {"bias": "learned"}} if learned else {"step": 7}
    save_checkpoint(model, weights, facts)
    if learned:
        factor_networks(model, rank=3).save(side_file(weights), weights)
    status, out, err = run_script("calibrate_plddt", weights, output, "--data", data, "--split", "val")
    assert (status, err) == (0, "")

    report = json.loads(out[: out.rindex("}") + 1])
    assert checkpoint_metadata(output) == {**facts, "plddt": report}
    assert report["structures"] == 6
    features = TokenFeatures.from_chains(["ACDEFGHIKL"])
    predictions = []
    for path in (weights, output):
        loaded = load_checkpoint(path)
        if learned:
            attach_factors(loaded, load_factors(side_file(path), loaded, path))
        with torch.no_grad():
            predictions.append(loaded(features))
    before, after = predictions
    torch.testing.assert_close(after.atom14, before.atom14, rtol=0, atol=0)
    torch.testing.assert_close(after.pae, before.pae, rtol=0, atol=0)
    assert (after.plddt < before.plddt).all() == (report["before"] > 0)

    for arguments, message in (
        ((output, tmp_path / "twice.safetensors", "--data", data), "calibrated already"),
        ((weights, weights, "--data", data), "give another"),
        ((weights, tmp_path / "x.safetensors", "--data", tmp_path), "prepare_antibody_data.py"),
        ((weights, tmp_path / "none" / "x.safetensors", "--data", data), "does not exist: make it"),
    ):
        status, _, err = run_script("calibrate_plddt", *arguments)
        assert (status, err.count("\n"), message in err) == (2, 1, True), err
    assert not (tmp_path / "twice.safetensors").exists()
