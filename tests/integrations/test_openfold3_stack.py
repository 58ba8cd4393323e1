"""Pairformer stacks of OpenFold3 whose blocks are replayed from one graph compute, and learn, what OpenFold3's do."""

import copy

import pytest
import torch

from pairformer_fast import AttentionConfig, accelerate
from tests.integrations.comparison import DENSE, distance
from tests.model.replayed import Repeated, repeats  # noqa: F401

pytest.importorskip("openfold3", reason="needs the extra [openfold]: pip install '.[openfold]'")

from pairformer_fast.integrations import openfold3_stack
from pairformer_fast.integrations.openfold3_stack import FastPairFormerStack
from pairformer_fast.model import replay
from tests.integrations.test_openfold3 import assert_same_gradients, gradients, inputs, outputs, stack

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the stack is; on a CPU, functions stand for graphs."""
    if request.param == "cpu":
        request.getfixturevalue("repeats")
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: False))
        monkeypatch.setattr(replay, "can_capture", lambda x: True)
    return request.param


def on(device: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


@pytest.mark.parametrize("inplace_safe", [False, True])
def test_inference(device: str, inplace_safe: bool) -> None:
    model = stack().to(device)
    with torch.no_grad():
        for n in (17, 17, 21):
            batch = on(device, inputs(n))
            expected = outputs(model, batch)
            with accelerate(model, DENSE) as acceleration:
                plain = acceleration.reports()
                found = outputs(model, batch, inplace_safe=inplace_safe)
                again = outputs(model, batch, inplace_safe=inplace_safe)
                assert len(acceleration.reports()) == len(plain) + 2 * len(acceleration.swapped)
            for one, other, wanted in zip(found, again, expected, strict=True):
                assert distance(one, wanted) < 1e-5
                assert torch.equal(one, other)


def test_training(device: str) -> None:
    model, batch = stack(blocks_per_ckpt=1, use_reentrant=False).train().to(device), on(device, inputs(17))
    expected = gradients(model, batch)
    with accelerate(model, DENSE):
        assert_same_gradients(gradients(model, batch), expected)
        assert_same_gradients(gradients(model, batch), expected)


def test_blocks_are_replayed_and_graphs_freed(device: str, request: pytest.FixtureRequest) -> None:
    model, batch = stack(blocks_per_ckpt=1).to(device), on(device, inputs(17))
    acceleration = accelerate(model, DENSE)
    assert type(model) is FastPairFormerStack
    assert "" in acceleration.around
    with torch.no_grad():
        outputs(model, batch)
    assert openfold3_stack._REPLAYS[model]._held
    if device == "cpu":
        assert Repeated.count == len(model.blocks)
    assert copy.deepcopy(model) not in openfold3_stack._REPLAYS
    acceleration.restore()
    assert model not in openfold3_stack._REPLAYS


@pytest.mark.parametrize("reason", ["hook", "factors", "frozen weights", "no checkpoints"])
def test_what_a_graph_cannot_do_runs_without(device: str, reason: str) -> None:
    model, batch = stack(blocks_per_ckpt=None if reason == "no checkpoints" else 1).to(device), on(device, inputs(17))
    config = AttentionConfig(bias="svd", rank=3) if reason == "factors" else DENSE
    with accelerate(model, config):
        called = []
        if reason == "hook":
            model.blocks[0].single_transition.register_forward_hook(lambda *_: called.append(1))
        if reason == "frozen weights":
            model.blocks[0].requires_grad_(False)
        with torch.set_grad_enabled(reason in ("frozen weights", "no checkpoints")):
            outputs(model, batch)
        assert model not in openfold3_stack._REPLAYS
        assert bool(called) == (reason == "hook")
