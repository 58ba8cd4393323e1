"""Whole OpenFold3 models, and OpenFold3's own command, with attention of this package."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pairformer_fast import AttentionConfig, accelerate, cli
from pairformer_fast.bias import PairBiasAttention
from pairformer_fast.inference.compare import compare_structures

pytest.importorskip("openfold3", reason="needs the extra [openfold]: pip install '.[openfold]'")

import openfold3.projects.of3_all_atom.safe_globals  # noqa: F401 -- what OpenFold3 trusts in a checkpoint
import pytorch_lightning as pl
from ml_collections import ConfigDict
from openfold3.core.loss.loss_module import OpenFold3Loss
from openfold3.core.model.latent.base_blocks import PairBlock
from openfold3.core.model.layers.triangular_attention import TriangleAttention
from openfold3.core.utils.precision_utils import OF3DeepSpeedPrecision
from openfold3.projects.of3_all_atom.model import OpenFold3
from openfold3.projects.of3_all_atom.project_entry import ModelUpdate, OF3ProjectEntry
from openfold3.tests.utils.data_utils import random_of3_features

from pairformer_fast.integrations import factor_networks
from pairformer_fast.integrations.openfold3_run import Switch, flashbias_flag

SMALL = {
    "settings": {"memory": {"eval": {"use_triton_triangle_kernels": False, "chunk_size": 8}}},
    "architecture": {
        "pairformer": {"no_blocks": 1},
        "msa": {"msa_module": {"no_blocks": 2}},
        "diffusion_module": {"diffusion_transformer": {"no_blocks": 2, "c_a": 96}},
        "heads": {"pairformer_embedding": {"pairformer": {"no_blocks": 1}}},
        "shared": {
            "num_recycles": 0,
            "diffusion": {
                "no_samples": 2,
                "no_mini_rollout_steps": 2,
                "no_full_rollout_steps": 2,
                "no_full_rollout_samples": 2,
            },
        },
    },
}
SWAPPED = (
    2 * (2 + 1 + 2 + 1) + 2 + 2
)  # pair stacks of the MSA, trunk, templates, confidence; single attention; diffusion


def configuration(preset: str, **flags):
    custom = copy.deepcopy(SMALL)
    for mode, values in flags.items():
        custom["settings"]["memory"].setdefault(mode, {}).update(values)
    return OF3ProjectEntry().get_model_config_with_update(ModelUpdate(presets=[preset], custom=custom))


def fill_zeros(weights: dict[str, torch.Tensor]) -> None:
    """OpenFold3 zero-initialises output projections, which would hide all attention."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in weights.values():
            if value.dim() > 1 and not value.any():
                value.copy_(0.5 * value.shape[-1] ** -0.5 * torch.randn(value.shape, generator=generator))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weights = OpenFold3(configuration("predict")).state_dict()
    fill_zeros(weights)
    return weights


def features(tokens: int = 18) -> dict:
    torch.manual_seed(2)
    batch = random_of3_features(batch_size=1, n_token=tokens, n_msa=10, n_templ=2, is_eval=False)
    for name in (
        *("token_index", "token_mask", "atom_mask", "num_atoms_per_token", "residue_index", "asym_id", "entity_id"),
        *("is_protein", "is_rna", "is_dna", "is_ligand", "token_bonds", "start_atom_index", "is_atomized"),
    ):
        batch["ground_truth"][name] = batch[name].clone()
    return OF3DeepSpeedPrecision(precision="32-true").convert_input(batch)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_whole_model(weights):
    """Trunk, MSA, templates, confidence and diffusion: prediction, loss and gradients."""
    config = configuration("train")
    model, loss_of = OpenFold3(config), OpenFold3Loss(config=config.architecture.loss_module)
    model.load_state_dict(weights)
    batch = features()

    def predict() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        with torch.no_grad():
            result = model.eval()(batch=copy.deepcopy(batch))[1]
        return {k: x for k, x in result.items() if torch.is_tensor(x) and x.is_floating_point()}

    def learn() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        found, output = model.train()(batch=copy.deepcopy(batch))
        loss = loss_of(batch=found, output=output)
        model.zero_grad()
        loss.backward()
        return loss.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}

    expected, (loss, gradients) = predict(), learn()
    assert loss != 0
    with accelerate(model, AttentionConfig(bias="dense")) as acceleration:
        assert len(acceleration.swapped) == SWAPPED
        assert {skipped.cls.rpartition(".")[2] for skipped in acceleration.skipped} == {
            "CrossAttentionPairBias",
            "MSAPairWeightedAveraging",
        }
        for name, found in predict().items():
            assert distance(found, expected[name]) < 1e-5, name
        found_loss, found_gradients = learn()
        acceleration.configure(AttentionConfig(bias="svd", rank=18))
        for name, found in predict().items():
            assert distance(found, expected[name]) < 1e-5, name
        reports = acceleration.reports()
        assert {report["choice"] for report in reports} == {"factors"}
        sampled = [report["name"] for report in reports if report["name"].startswith("diffusion_module")]
        assert len(sampled) == len(set(sampled)) == 2, "factorised once, not in each of two steps"
        assert set(dict(model.named_modules())) >= set(sampled)
    assert distance(found_loss, loss) < 1e-6
    assert found_gradients.keys() == gradients.keys()
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (found_gradients[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-7 * largest, name


@torch.no_grad()
def test_training_and_evaluation_have_settings_of_their_own(caplog):
    """Modes are set on every module from outside, as trainers do after an evaluation."""
    caplog.set_level("INFO")
    model = PairBlock(16, 16, 8, 2, "swiglu", 2, 0.25, False, 1e9)
    z, mask = torch.randn(1, 9, 9, 16), torch.ones(1, 9, 9)
    memory = ConfigDict(
        {
            "train": {"use_flashbias": False, "flashbias": {}},
            "eval": {"use_flashbias": True, "flashbias": {"bias": "svd", "rank": 3}},
        }
    )
    switch = Switch(memory)
    cores = []
    for training in (True, True, False, False, True, False):
        for module in model.modules():
            module.training = training
        switch.set(model)
        cores.append([module.training for module in model.modules() if isinstance(module, PairBiasAttention)])
        model(z, mask)
        switch.log()
    assert cores == [[], [], [False] * 2, [False] * 2, [], [False] * 2]
    lines = [record.getMessage() for record in caplog.records if "flashbias" in record.getMessage()]
    assert len(lines) == 3
    assert all(line.startswith("flashbias: factors in 2 of 2 calls of attention, mean rank 3.0") for line in lines)


@torch.no_grad()
def test_models_and_configurations_of_before_stay_openfold3s():
    config = configuration("predict")
    before, batch = OpenFold3(config).eval(), features()

    def predict(model: OpenFold3) -> torch.Tensor:
        torch.manual_seed(3)
        return model(batch=copy.deepcopy(batch))[1]["atom_positions_predicted"]

    expected = predict(before)
    with flashbias_flag():
        after = OpenFold3(config).eval()
        after.load_state_dict(before.state_dict())
        assert predict(before).equal(expected)
        assert predict(after).equal(expected)
    assert not [module for module in (*before.modules(), *after.modules()) if isinstance(module, PairBiasAttention)]


@pytest.fixture(scope="module")
def job(tmp_path_factory, weights) -> Path:
    """Folder with a query and a checkpoint; one query."""
    folder = tmp_path_factory.mktemp("job")
    torch.save(weights, folder / "weights.pt")
    chain = {"molecule_type": "protein", "chain_ids": ["A"], "sequence": "GSHMKVLAAGIVALCAAQ"}
    (folder / "query.json").write_text(json.dumps({"queries": {"q1": {"chains": [chain]}}}))
    return folder


@pytest.fixture
def predict(job, tmp_path, monkeypatch, capsys):
    """Run ``pairformer-fast openfold3 predict``: exit status, structure, stderr."""

    def _predict(name: str, folder: Path = job, **flags):
        custom = copy.deepcopy(SMALL)
        custom["settings"]["memory"]["eval"].update(flags)
        runner = {
            "pl_trainer_args": {"accelerator": "cpu", "devices": 1},
            "experiment_settings": {"use_msa_server": False, "use_templates": False},
            "data_module_args": {"num_workers": 0},
            "model_update": {"presets": ["predict", "low_mem"], "custom": custom},
        }
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(runner))
        arguments = {
            "--query-json": folder / "query.json",
            "--inference-ckpt-path": folder / "weights.pt",
            "--runner-yaml": tmp_path / f"{name}.yml",
            "--output-dir": tmp_path / name,
        }
        options = [str(part) for pair in arguments.items() for part in pair]
        monkeypatch.setattr(sys, "argv", ["pairformer-fast", "openfold3", "predict", *options])
        pl.seed_everything(0)  # OpenFold3 draws conformers before it seeds
        with pytest.raises(SystemExit) as info:
            cli.main()
        structure = tmp_path / name / "q1" / "seed_42" / "q1_seed_42_sample_1_model.cif"
        return info.value.code, structure, capsys.readouterr().err

    return _predict


def test_prediction_with_the_flag_off_and_on(predict):
    status, expected, _ = predict("off")
    assert status == 0
    status, found, _ = predict("on", use_flashbias=True, flashbias={"bias": "svd", "rank": 64})
    assert status == 0
    assert compare_structures(found, expected).all_atom_rmsd < 0.01
    status, truncated, _ = predict("rank1", use_flashbias=True, flashbias={"bias": "svd", "rank": 1})
    assert status == 0
    assert truncated.read_bytes() != expected.read_bytes(), "the flag must reach attention"
    assert OpenFold3.__init__.__qualname__ == "OpenFold3.__init__"
    assert type(OpenFold3.forward).__name__ == "function"


def test_prediction_with_learned_factors(predict, tmp_path):
    found = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        file = tmp_path / f"{seed}.factors.safetensors"
        factor_networks(OpenFold3(configuration("predict")), 4).save(file)
        learned = {"bias": "learned", "factors": str(file)}
        status, structure, _ = predict(f"seed{seed}", use_flashbias=True, flashbias=learned)
        assert status == 0
        found[seed] = structure.read_bytes()
    assert found[0] != found[1], "the networks must reach attention"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"use_flashbias": True, "flashbias": {"bias": "svd", "rank": 0}}, "eval.flashbias of the runner YAML: rank: "),
        ({"use_flashbias": False, "flashbias": {"rank": 0}}, "eval.flashbias of the runner YAML: rank: "),
        ({"use_flashbais": True}, "no custom.settings.memory.eval.use_flashbais; did you mean use_flashbias?"),
        ({"use_flashbias": "on"}, "Could not override field 'use_flashbias'"),
        (
            {"use_flashbias": True, "flashbias": "svd"},
            "eval.flashbias must hold settings such as backend, but is 'svd'",
        ),
        (
            {"flashbias": {"method": "svd"}},
            "eval.flashbias.method; custom.settings.memory.eval.flashbias has backend, ",
        ),
    ],
)
def test_wrong_settings_are_one_line(predict, flags, message):
    status, structure, stderr = predict("wrong", **flags)
    assert status == 2
    assert message in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert not structure.exists()


def test_a_checkpoint_that_will_not_do_is_one_line(predict, job):
    whole = job / "weights.pt"
    renamed = {"input_embedder.nothing": torch.zeros(1)}
    for name, spoil, message in (
        ("cut", lambda file: file.write_bytes(whole.read_bytes()[:-1000]), "cannot be read, is it complete?"),
        ("other", lambda file: torch.save(renamed, file), "does not fit the model: "),
    ):
        (job / name).mkdir()
        (job / name / "query.json").write_bytes((job / "query.json").read_bytes())
        spoil(job / name / "weights.pt")
        status, structure, stderr = predict(name, folder=job / name)
        assert status == 2
        assert f"checkpoint {job / name / 'weights.pt'} {message}" in stderr.splitlines()[-1]
        assert not structure.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_update: {}", "runner YAML: dataset_paths: Field required; dataset_configs: Field required"),
        ("model_update: [", "runner YAML: while parsing"),
    ],
)
def test_a_wrong_runner_yaml_of_training_is_one_line(text, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "train.yml").write_text(text)
    monkeypatch.setattr(
        sys, "argv", ["pairformer-fast", "openfold3", "train", "--runner-yaml", f"{tmp_path}/train.yml"]
    )
    with pytest.raises(SystemExit) as info:
        cli.main()
    assert info.value.code == 2
    stderr = capsys.readouterr().err
    assert message in stderr.splitlines()[-1]
    assert "Traceback" not in stderr


def test_a_failed_query_is_a_failed_command(predict, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(TriangleAttention, "forward", fail)
    status, structure, stderr = predict("failed")
    assert status == 1
    assert stderr.splitlines()[-1] == "pairformer-fast: query q1 failed: no luck"
    assert not structure.exists()
