from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pairformer_fast import bias as pair_bias
from pairformer_fast.config import ModelConfig
from pairformer_fast.inference import predict
from pairformer_fast.inference.antibody import DomainCheck
from pairformer_fast.model import checkpoint

from .fakes import FakeModel


@pytest.fixture
def fake_model(monkeypatch, tmp_path_factory) -> FakeModel:
    """Make every checkpoint the fake model, and its bundled weights a file with a valid header."""
    model = FakeModel()
    weights = tmp_path_factory.mktemp("weights") / "fake.safetensors"
    write_header(weights, "any")
    monkeypatch.setattr(checkpoint, "default_checkpoint", lambda *bias: weights)
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda path: model)
    monkeypatch.setattr(pair_bias, "set_attention", lambda m, config: setattr(m, "attention", config))
    monkeypatch.setattr(pair_bias, "collect_reports", fake_reports)
    # The atoms of the fake are scattered: they have no peptide bonds to close.
    monkeypatch.setattr(predict, "relieve_clashes", lambda atom14, *_: atom14)
    return model


def write_header(path: Path, domain: str) -> None:
    """A safetensors file that says which model it is for and holds no weights."""
    save_file({"x": np.zeros(1)}, path, {"config": ModelConfig(domain=domain).model_dump_json()})


def fake_reports(model: FakeModel) -> list[dict]:
    choice = "dense" if model.attention.bias == "dense" else "factors"
    return [
        {
            "name": "blocks.0.tri_att_start",
            "choice": choice,
            "rank": [8],
            "eps": [0.1],
            "bound": [0.05],
            "backend": "torch",
            "probed_mean": [0.01],
            "predicted_cost": None,
            "dense_heads": [0] if choice == "dense" else [],
            "reason": "asked for" if choice == "dense" else None,
        }
    ]


@pytest.fixture
def antibody_weights(fake_model, monkeypatch) -> FakeModel:
    """As ``fake_model``, with weights for antibodies; a sequence with the letters WGQG is a heavy domain."""
    weights = checkpoint.default_checkpoint()
    write_header(weights, "antibody")
    monkeypatch.setattr("pairformer_fast.inference.antibody.check_variable_domain", fake_check)
    return fake_model


def fake_check(sequence: str) -> DomainCheck:
    if "WGQG" in sequence:
        return DomainCheck(True, "H", "0" * len(sequence), "")
    return DomainCheck(False, None, "", "no conserved framework; fold a VH, VHH or VL")


@pytest.fixture
def fasta(tmp_path) -> Callable[[str], Path]:
    """Write text to a FASTA file."""

    def write(text: str) -> Path:
        path = tmp_path / "in.fasta"
        path.write_text(text)
        return path

    return write
