"""The real model, small and with random weights, through the real bias module."""

import json
from dataclasses import replace

import pytest
import torch

from pairformer_fast.bias import attention as bias_attention
from pairformer_fast.config import ModelConfig, PairformerConfig, StructureModuleConfig
from pairformer_fast.inference import regress as regression
from pairformer_fast.inference.pipeline import fold
from pairformer_fast.inference.settings import FoldSettings
from pairformer_fast.model.checkpoint import save_checkpoint
from pairformer_fast.model.folding import FoldingModel

SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQDEERLGLIEVQGSDEYFWPLACNTV"
SMALL = ModelConfig(
    pairformer=PairformerConfig(
        c_s=32, c_z=16, c_hidden_mul=16, c_hidden_pair_att=8, no_heads_pair=2, no_heads_pair_bias=4, no_blocks=2
    ),
    structure=StructureModuleConfig(c_s=32, no_heads_ipa=4, no_blocks=2, c_angle=16),
    recycles=1,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = FoldingModel(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            # Layers that start at zero would hide the attention from the structure.
            parameter.add_(0.3 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_checkpoint(model, path, {})
    return path


def test_fold_reports_rank_and_error_of_every_call_per_head(weights, fasta, tmp_path):
    settings = FoldSettings(checkpoint=weights, bias="svd", rank=8, device="cpu")
    report = fold(fasta(f">a\n{SEQUENCE[:20]}:{SEQUENCE[20:]}\n"), tmp_path / "out", settings)
    assert report.failed == []
    content = json.loads((tmp_path / "out" / "a" / "a_comparison.json").read_text())
    blocks, recycles, attentions = 2, 1, 3
    assert len(content["bias"]) == blocks * attentions * (recycles + 1)
    assert len({call["name"] for call in content["bias"]}) == blocks * attentions
    for call in content["bias"]:
        assert call["choice"] == "factors"
        assert max(call["rank"]) <= 8
        assert len(call["rank"]) == len(call["eps"]) == len(call["probed_mean"]) in (2, 4)
    assert content["ca_rmsd"] > 1e-4
    assert report.jobs[0].paths["reference"].dense == len(content["bias"])


def test_dense_bias_on_the_accelerated_path_gives_the_reference_structure(weights, fasta, tmp_path):
    settings = FoldSettings(checkpoint=weights, bias="dense", device="cpu")
    report = fold(fasta(f">a\n{SEQUENCE}\n"), tmp_path / "out", settings)
    assert report.jobs[0].all_atom_rmsd < 0.01


def rank_one(factors):
    return replace(factors, phi_q=factors.phi_q[..., :1], phi_k=factors.phi_k[..., :1])


def heads_swapped(factors):
    return replace(factors, phi_q=factors.phi_q.flip(1))


@pytest.mark.parametrize("break_", [rank_one, heads_swapped])
def test_regress_notices_a_broken_factorisation(weights, tmp_path, monkeypatch, break_):
    (tmp_path / "golden.fasta").write_text(f">a\n{SEQUENCE}\n")
    settings = FoldSettings(checkpoint=weights, device="cpu", precision="fp32", bias="svd", rank=len(SEQUENCE))
    regression.update_golden(tmp_path, settings)
    assert regression.regress(tmp_path, settings).passed
    factorize = bias_attention.factorize

    def broken(*args):
        outcome = factorize(*args)
        return outcome if outcome.factors is None else replace(outcome, factors=break_(outcome.factors))

    monkeypatch.setattr(bias_attention, "factorize", broken)
    result = regression.regress(tmp_path, settings)
    assert {gate.name for gate in result.gates if not gate.passed} == {
        "accelerated to reference, CA RMSD (Å)",
        "accelerated to reference, lDDT-CA",
    }
