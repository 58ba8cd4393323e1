"""OpenFold3's own training command with attention of this package: ``run_openfold train``, and ours around it."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from pairformer_fast import cli
from pairformer_fast.bias import FactorNetworks, PairBiasAttention
from pairformer_fast.bias.learned import side_file

pytest.importorskip("openfold3", reason="needs the extra [openfold]: pip install '.[openfold]'")

import pytorch_lightning as pl
from openfold3 import run_openfold
from openfold3.core.config.config_utils import deep_update
from openfold3.core.runners.model_runner import ModelRunner
from openfold3.entry_points import experiment_runner
from openfold3.projects.of3_all_atom.model import OpenFold3

from pairformer_fast.integrations.openfold3_learned import ENTRY

from .test_openfold3_run import SMALL, SWAPPED, configuration, features, weights  # noqa: F401 -- a fixture


class Batches(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict:
        return features() | {"pdb_id": ["xxxx"], "preferred_chain_or_interface": ["A"]}


class InOrder(torch.utils.data.SequentialSampler):
    epoch = 0


class Data(pl.LightningDataModule):
    """In the place of OpenFold3's, which reads a cache of the PDB."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.next_dataset_indices = {}

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(Batches(), batch_size=None, sampler=InOrder(Batches()))


class Watch(pl.Callback):
    """Gives the weights to start from, and keeps what each step had, averages before them and attention cores."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:  # noqa: F811
        self.weights, self.losses, self.gradients, self.averaged, self.cores = weights, [], [], {}, set()
        self.loss_classes: set[str] = set()
        self.runner: ModelRunner | None = None

    def setup(self, trainer, module, stage: str) -> None:
        self.runner = module
        module.model.load_state_dict(self.weights)

    def on_train_start(self, trainer, module) -> None:
        self.averaged.update({name: value.clone() for name, value in module.ema.params.items()})

    def on_train_batch_start(self, *_: object) -> None:
        torch.manual_seed(len(self.losses))

    def on_before_optimizer_step(self, trainer, module, *_: object) -> None:
        found = {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}
        self.gradients.append({name: gradient.clone() for name, gradient in found.items()})

    def on_train_batch_end(self, trainer, module, outputs, *_: object) -> None:
        self.losses.append(float(outputs["loss"]))
        self.cores.add(sum(isinstance(part, PairBiasAttention) for part in module.modules()))
        self.loss_classes.add(type(module.loss).__name__)


class Training(NamedTuple):
    """What a run of the command leaves."""

    watch: Watch
    checkpoint: Path | None


def theirs(*arguments: str) -> None:
    run_openfold.cli.main(args=list(arguments))


def ours(*arguments: str) -> None:
    sys.argv[1:] = ["openfold3", *arguments]
    cli.main()


@pytest.fixture
def train(tmp_path, monkeypatch, weights) -> Callable[..., Training]:  # noqa: F811
    """Train for two steps by a command, or for one more from a checkpoint."""
    monkeypatch.setattr(experiment_runner, "DataModule", Data)
    monkeypatch.setattr(sys, "argv", ["pairformer-fast"])

    def _train(command: Callable[..., None], name: str, resume: Path | None = None, **settings: Any) -> Training:
        watch, folder = Watch(weights), tmp_path / name
        monkeypatch.setattr(experiment_runner, "SecondsPerIterationProgressBar", lambda: watch)
        runner = {
            "experiment_settings": {"seed": 7, "output_dir": str(folder)},
            "pl_trainer_args": {"accelerator": "cpu", "max_epochs": 1},
            "checkpoint_config": {"save_last": False},
            "dataset_paths": {},
            "dataset_configs": {},
            "model_update": {"presets": ["train"], "custom": deep_update(copy.deepcopy(SMALL), {"settings": settings})},
        }
        if resume is not None:
            runner["experiment_settings"]["restart_checkpoint_path"] = str(resume)
            runner["pl_trainer_args"] |= {"max_epochs": 2, "limit_train_batches": 1}
            runner["checkpoint_config"]["every_n_epochs"] = 0
        folder.mkdir()
        (folder / "runner.yml").write_text(yaml.safe_dump(runner))
        with pytest.raises(SystemExit) as info:
            command("train", "--runner-yaml", str(folder / "runner.yml"))
        assert not info.value.code
        assert len(watch.cores) == 1
        return Training(watch, next(folder.glob("checkpoints/*.ckpt"), None))

    yield _train
    for path in tmp_path.glob("*/checkpoints/*.ckpt"):
        path.unlink()  # some 300 MB each


LEARNED = {"use_flashbias": True, "flashbias": {"bias": "learned", "rank": 3}}
ON = {"memory": {"train": {"use_flashbias": True}}}


def test_training_with_the_flag_off_and_on(train, weights):  # noqa: F811
    plain, fast = train(theirs, "plain"), train(ours, "fast", **ON)
    off, on = plain.watch, fast.watch
    assert (off.cores, on.cores) == ({0}, {SWAPPED})
    assert (off.loss_classes, on.loss_classes) == ({"OpenFold3Loss"}, {"FastOpenFold3Loss"})
    assert len(on.losses) == len(off.losses) == len(on.gradients) == 2
    assert on.losses == pytest.approx(off.losses, rel=1e-3)
    assert off.losses[0] != off.losses[1]
    for found, expected in zip(on.gradients, off.gradients, strict=True):
        assert found.keys() == expected.keys()
        largest = max(float(gradient.norm()) for gradient in expected.values())
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() < 1e-3 * gradient.norm() + 1e-6 * largest, name
    averaged = {"off": off.runner.ema.params, "on": on.runner.ema.params}
    assert averaged["on"].keys() == averaged["off"].keys() == weights.keys()
    assert any(not torch.equal(averaged["on"][name], value) for name, value in weights.items())

    assert b"pairformer_fast" not in fast.checkpoint.read_bytes()
    without = train(theirs, "without", fast.checkpoint).watch
    with_flag = train(ours, "with", plain.checkpoint, **ON).watch
    assert (without.cores, with_flag.cores) == ({0}, {SWAPPED})
    assert len(without.losses) == 1
    assert with_flag.losses == pytest.approx(without.losses, rel=1e-3)
    for resumed, saved in ((without, averaged["on"]), (with_flag, averaged["off"])):
        assert resumed.runner.trainer.global_step == 3
        assert resumed.averaged.keys() == saved.keys()
        assert all(torch.equal(value, saved[name]) for name, value in resumed.averaged.items())


def test_training_writes_side_files_and_goes_on_from_a_checkpoint(train):
    settings = {
        "memory": {"train": LEARNED, "eval": LEARNED},
        "lr_scheduler": {"base_lr": 1e-3},
        "ema": {"decay": 0.9},
    }
    first, file = train(ours, "first", **settings)
    checkpoint = torch.load(file, weights_only=True)
    resumed, _ = train(ours, "more", file, **settings)
    plain = OpenFold3(configuration("train"))
    assert b"pairformer_fast" not in file.read_bytes()
    assert {name.removeprefix("model.") for name in checkpoint["state_dict"]} == set(plain.state_dict())
    assert set(checkpoint["ema"]["params"]) == set(plain.state_dict())
    plain.load_state_dict({name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()})

    averages = FactorNetworks.load(side_file(file))
    assert all(path.startswith(("msa_module", "pairformer_stack", "aux_heads")) for path in averages)
    assert len(averages) == 10
    networks, moments = checkpoint[ENTRY]["weights"], checkpoint["optimizer_states"][0]["state"]
    assert_other(averages.state_dict(), networks)
    assert_other(resumed.runner.model._flashbias._networks.state_dict(), networks)
    trained = first.runner.model._flashbias._networks.state_dict()
    assert all(torch.equal(networks[name], value) for name, value in trained.items())
    sizes = [value["exp_avg"].shape for value in moments.values() if value["exp_avg"].any()]
    assert sum(size == torch.Size([128, 128]) for size in sizes) >= 2 * len(averages), "hidden layers were optimised"
    assert resumed.runner.trainer.global_step == 3


def assert_other(found: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    """All weights have moved; offsets of keys get gradients of rounding alone."""
    assert found.keys() == others.keys()
    same = [name for name, value in found.items() if torch.equal(value, others[name]) and name.endswith("weight")]
    assert not same
