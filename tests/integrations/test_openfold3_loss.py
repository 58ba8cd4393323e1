"""OpenFold3's loss and ours from the same output of its model: values, each part, and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pairformer_fast import AttentionConfig

pytest.importorskip("openfold3", reason="needs the extra [openfold]: pip install '.[openfold]'")

from openfold3.core.loss.loss_module import OpenFold3Loss

from pairformer_fast.integrations.openfold3_loss import FastOpenFold3Loss, accelerated_loss

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Case = tuple[OpenFold3Loss, dict[str, Any], dict[str, torch.Tensor]]


_MADE: list[Case] = []


@pytest.fixture
def made(script: Callable[[str], Any]) -> Case:
    """OpenFold3's loss with the settings of training, and what its model gives for a chain of 30 residues."""
    if not _MADE:
        problem = script("benchmark_openfold3_problem")
        cpu = torch.device("cpu")
        chain = problem.Problem(problem.build("train", problem.DRY, cpu).train(), 30)
        with torch.no_grad():
            _MADE.append((chain.loss, *chain.model(dict(chain.batch))))
    return _MADE[0]


def move(value: Any, device: str) -> Any:
    if isinstance(value, dict):
        return {name: move(part, device) for name, part in value.items()}
    return value.to(device) if torch.is_tensor(value) else value


@pytest.fixture(params=DEVICES)
def case(request: pytest.FixtureRequest, made: Case) -> Case:
    """Protein, RNA and ligands bonded to both, samples near and far from the truth, atoms without a position."""
    loss_of, batch, output = (move(part, request.param) for part in made)
    batch["loss_weights"]["bond"] = torch.ones_like(batch["loss_weights"]["mse"])
    tokens = torch.arange(30, device=request.param)
    kinds = {"is_protein": tokens < 14, "is_rna": (tokens >= 14) & (tokens < 22), "is_ligand": tokens >= 22}
    batch |= {name: kind[None, None].to(batch[name].dtype) for name, kind in kinds.items()}
    batch["is_dna"] = torch.zeros_like(batch["is_dna"])
    bonds = torch.zeros_like(batch["token_bonds"])
    for ligand, polymer in ((23, 2), (25, 16), (29, 0)):
        bonds[..., ligand, polymer] = bonds[..., polymer, ligand] = 1
    batch["token_bonds"] = bonds
    truth = batch["ground_truth"]
    generator = torch.Generator().manual_seed(1)
    truth["atom_positions"] = 6 * torch.randn(truth["atom_positions"].shape, generator=generator).to(tokens.device)
    known = torch.rand(truth["atom_resolved_mask"].shape, generator=generator) < 0.9
    truth["atom_resolved_mask"] = known.to(truth["atom_resolved_mask"])
    noise = torch.randn(output["atom_positions_diffusion"].shape, generator=generator)
    noise[:, 1] *= 0.3
    output["atom_positions_diffusion"] = truth["atom_positions"] + noise.to(tokens.device)
    return loss_of, batch, output


def learn(case: Case) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    loss_of, batch, output = case
    x = output["atom_positions_diffusion"].detach().requires_grad_()
    loss, parts = loss_of(batch, output | {"atom_positions_diffusion": x}, _return_breakdown=True)
    loss.backward()
    return parts | {"returned": loss.detach()}, x.grad


def assert_same(case: Case, **config: Any) -> dict[str, torch.Tensor]:
    expected, expected_gradient = learn(case)
    with accelerated_loss(case[0], AttentionConfig(**config)):
        assert type(case[0]) is FastOpenFold3Loss
        found, gradient = learn(case)
    assert type(case[0]) is OpenFold3Loss
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text)
    assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()
    return found


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_values_and_gradients(case: Case, backend: str) -> None:
    parts = assert_same(case, backend=backend)
    assert min(parts[name] for name in ("bond_loss", "smooth_lddt_loss", "mse_loss")) > 0.01


def no_bonds(batch: dict[str, Any]) -> None:
    batch["token_bonds"] = torch.zeros_like(batch["token_bonds"])


def proteins_only(batch: dict[str, Any]) -> None:
    batch["loss_weights"] = batch["loss_weights"] | {
        "disable_non_protein_diffusion_weights": torch.ones_like(batch["loss_weights"]["mse"])
    }


def without(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(batch: dict[str, Any]) -> None:
        weights = batch["loss_weights"]
        batch["loss_weights"] = weights | {name: torch.zeros_like(weights[name]) for name in names}

    return change


CHANGES = {
    "no bonds": no_bonds,
    "proteins only": proteins_only,
    "without bond": without("bond"),
    "without smooth lDDT": without("smooth_lddt"),
    "without the diffusion module's": without("bond", "smooth_lddt", "mse"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_and_features(case: Case, name: str) -> None:
    CHANGES[name](case[1])
    assert_same(case)


def test_what_it_does_not_know_is_left_to_openfold3(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    loss_of, batch, output = case
    with torch.no_grad():
        expected = loss_of(batch, {k: v for k, v in output.items() if k != "atom_positions_diffusion"})
        with accelerated_loss(loss_of):
            found = loss_of(batch, {k: v for k, v in output.items() if k != "atom_positions_diffusion"})
    assert found == expected

    class Own(OpenFold3Loss):
        pass

    own = Own(loss_of.config)
    with accelerated_loss(own):
        assert type(own) is Own
    assert "the loss is a Own, not OpenFold3's own" in caplog.text
