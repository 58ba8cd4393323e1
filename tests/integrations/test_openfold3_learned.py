"""OpenFold3 with learned factors in place of dense biases: the networks learn, and live beside its weights."""

import copy
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn

from pairformer_fast import AttentionConfig, accelerate
from pairformer_fast.bias import FactorNetworks, FactorsError, attach_factors, set_attention
from pairformer_fast.config import PairformerConfig
from pairformer_fast.inference.errors import InputError
from pairformer_fast.integrations import factor_networks
from pairformer_fast.model.pairformer import PairformerBlock

pytest.importorskip("openfold3", reason="needs the extra [openfold]: pip install '.[openfold]'")

from openfold3.core.model.layers.diffusion_transformer import DiffusionTransformer
from openfold3.core.model.layers.triangular_attention import TriangleAttention
from openfold3.projects.of3_all_atom.model import OpenFold3
from openfold3.projects.of3_all_atom.project_entry import OF3ProjectEntry
from openfold3.projects.of3_all_atom.runner import OpenFold3AllAtom

from pairformer_fast.integrations.openfold3_distill import distill
from pairformer_fast.integrations.openfold3_learned import FactorTraining
from pairformer_fast.integrations.openfold3_run import flashbias_flag
from tests.integrations.comparison import distance
from tests.integrations.test_openfold3 import BLOCK, block, inputs, outputs, stack
from tests.integrations.test_openfold3_run import configuration

LEARNED = AttentionConfig(bias="learned")
PATHS = [f"{name}.mha.core" for name in ("pair_stack.tri_att_start", "pair_stack.tri_att_end", "attn_pair_bias")]
FLAGS = {"use_flashbias": True, "flashbias": {"bias": "learned", "rank": 3}}


def networks_for(model: nn.Module, rank: int = 5) -> FactorNetworks:
    torch.manual_seed(0)
    return factor_networks(model, rank, hidden=16)


def test_a_block_computes_what_our_own_block_does_with_the_same_networks():
    model, batch = block(), inputs(17)
    networks = networks_for(model)
    assert list(networks) == PATHS
    names = ("c_s", "c_z", "c_hidden_mul", "c_hidden_pair_att", "no_heads_pair", "transition_n", "pair_dropout")
    own = {name: BLOCK[name] for name in (*names, "c_hidden_pair_bias", "no_heads_pair_bias")}
    ours = PairformerBlock(PairformerConfig(**own, no_blocks=1)).eval()
    ours.load_state_dict(model.state_dict())
    attach_factors(ours, networks)
    set_attention(ours, LEARNED)
    keep = batch["single_mask"] > 0, batch["pair_mask"] > 0
    with torch.no_grad():
        dense = outputs(model, batch)
        expected = [x[k] for x, k in zip(ours(batch["s"], batch["z"], *keep), keep, strict=True)]
        with accelerate(model, LEARNED, networks) as acceleration:
            found = outputs(model, batch)
            flagged = outputs(model, batch, use_triton_triangle_kernels=True)
            reports = acceleration.reports()
    for a, b, c, d in zip(found, expected, dense, flagged, strict=True):
        assert distance(a, b) < 1e-5
        assert distance(a, c) > 1e-3
        assert distance(a, d) < 1e-6
    assert {(report["choice"], *report["rank"]) for report in reports} == {("factors", 5, 5), ("factors", 5, 5, 5, 5)}


@pytest.mark.parametrize("blocks_per_ckpt", [None, 1])
def test_gradients_reach_the_networks(blocks_per_ckpt):
    model, batch = stack(blocks_per_ckpt=blocks_per_ckpt, use_reentrant=False).train(), inputs(17)
    keys = list(model.state_dict())
    networks = networks_for(model)
    with accelerate(model, LEARNED, networks):
        assert list(model.state_dict()) == keys
        s, z = model(**batch)
        (s[batch["single_mask"] > 0].sin().sum() + z[batch["pair_mask"] > 0].sin().sum()).backward()
    for name, parameter in networks.named_parameters():
        # A constant in all factors of the keys is one per query, which softmax ignores.
        assert parameter.grad.any() or "phi_k.4.bias" in name, name
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert [name.rpartition(".")[0].rpartition(".")[2] for name in without] == ["linear_z"] * 6


def test_a_side_file_gives_the_networks_back(tmp_path):
    model, batch = block(), inputs(17)
    networks = networks_for(model)
    file = tmp_path / "model.factors.safetensors"
    networks.save(file)
    with torch.no_grad():
        with accelerate(model, LEARNED, networks):
            expected = outputs(model, batch)
        with accelerate(model, LEARNED, file) as acceleration:
            found = outputs(model, batch)
            acceleration.configure(AttentionConfig(bias="dense"))
            dense = outputs(model, batch)
        plain = outputs(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(distance(a, b) < 1e-5 for a, b in zip(dense, plain, strict=True))


def test_networks_that_are_missing_or_of_another_model_are_refused(tmp_path):
    model = block()
    with pytest.raises(ValueError, match="factors="):
        accelerate(model, LEARNED)
    with pytest.raises(FactorsError, match="do not fit the model at 9 attentions"):
        accelerate(model, LEARNED, networks_for(stack()))
    with pytest.raises(FileNotFoundError):
        accelerate(model, LEARNED, tmp_path / "none.factors.safetensors")
    assert type(model.pair_stack.tri_att_start) is TriangleAttention
    with accelerate(model, AttentionConfig(bias="dense")) as dense, pytest.raises(ValueError, match="factors="):
        dense.configure(LEARNED)
    dims = {"c_a": 24, "c_s": 8, "c_z": 8, "c_hidden": 8, "no_heads": 3, "no_blocks": 1, "n_transition": 2}
    with pytest.raises(FactorsError, match="no attention"):
        factor_networks(DiffusionTransformer(**dims, n_query=None, n_key=None, inf=1e9), 4)


def test_distilled_networks_bring_a_frozen_model_near_to_its_dense_biases():
    model, batch = stack(), inputs(17)
    networks = networks_for(model, rank=8)

    def error() -> float:
        with torch.no_grad(), accelerate(model, LEARNED, networks):
            return max(distance(a, b) for a, b in zip(outputs(model, batch), expected, strict=True))

    with torch.no_grad():
        expected = outputs(model, batch)
    before, weights = error(), copy.deepcopy(model.state_dict())
    losses = distill(model, networks, lambda step: outputs(model, batch), 60, learning_rate=5e-3)
    assert losses[-1] < 0.3 * losses[0]
    assert error() < 0.7 * before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="did not reach"):
        distill(model, networks, lambda step: None, 1)
    with accelerate(model, AttentionConfig(bias="dense")), pytest.raises(ValueError, match="accelerate"):
        distill(model, networks, lambda step: outputs(model, batch), 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train": FLAGS}, "under eval"),
        ({"eval": FLAGS}, "needs factors, the file"),
        ({"train": {**FLAGS, "flashbias": {"bias": "learned"}}, "eval": FLAGS}, "needs rank, of fresh networks, or"),
        ({"eval": {**FLAGS, "flashbias": {"bias": "learned", "factors": "none.safetensors"}}}, "none.safetensors"),
        ({"eval": {**FLAGS, "flashbias": {"bias": "svd", "factors": "none.safetensors"}}}, "not 'svd'"),
    ],
)
def test_settings_that_cannot_work_say_what_to_change(flags, message):
    with flashbias_flag(), pytest.raises(InputError, match=message):
        OpenFold3(configuration("predict", **flags))


def test_fresh_networks_are_not_predicted_with():
    with flashbias_flag():
        runner = OF3ProjectEntry().runner(configuration("predict", train=FLAGS, eval=FLAGS))
        with pytest.raises(InputError, match="prediction with bias 'learned' needs factors"):
            runner.predict_step({}, 0)


def test_training_of_confidence_alone_trains_its_networks_alone():
    with flashbias_flag():
        runner = OF3ProjectEntry().runner(configuration("train", train=FLAGS, eval=FLAGS))
        runner._freeze_model_params([runner.model.aux_heads.pairformer_embedding])
        runner._identify_confidence_params()
    trained = {name for name, parameter in runner.model.named_parameters() if parameter.requires_grad}
    of_networks = {name for name in trained if name.startswith("flashbias_networks.")}
    assert len(of_networks) == 3 * (2 + 6 + 6), "a layer norm and two networks of three layers for each attention"
    assert all("aux_heads" in name for name in trained)
    assert of_networks <= runner.confidence_param_names
    assert not [
        name for name in trained if name.endswith(("tri_att_start.linear_z.weight", "attn_pair_bias.linear_z.weight"))
    ]


def test_validation_sees_averages_and_training_goes_on_with_the_weights():
    networks = networks_for(block())
    training = FactorTraining(networks, decay=0.5)
    strategy = SimpleNamespace(remove_checkpoint=None)
    trainer = SimpleNamespace(accumulate_grad_batches=1, is_last_batch=False, save_checkpoint=None, strategy=strategy)
    # Of a runner that accumulates gradients itself: two batches make a step.
    manager = SimpleNamespace(accumulate_grad_batches=2)
    runner = SimpleNamespace(per_sample_grad_clipping=True, grad_manager=manager, trainer=trainer)
    runner._is_opt_step_ready = MethodType(OpenFold3AllAtom._is_opt_step_ready, runner)
    training.on_fit_start(trainer, runner)
    before = copy.deepcopy(networks.state_dict())
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter += 1
    for batch in range(2):
        training.on_train_batch_end(trainer, runner, None, None, batch)
    training.on_validation_epoch_start(trainer, None)
    assert all(torch.allclose(value, before[name] + 0.5) for name, value in networks.state_dict().items())
    training.on_validation_epoch_end(trainer, None)
    assert all(torch.allclose(value, before[name] + 1) for name, value in networks.state_dict().items())
    saved: dict = {}
    training.on_save_checkpoint(trainer, None, saved)
    with pytest.raises(FactorsError, match="others"):
        FactorTraining(networks_for(block(), rank=2), 0.5).on_load_checkpoint(trainer, None, saved)
