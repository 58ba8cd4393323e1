"""Parts of an OpenFold3 that were replaced keep their effect, and what is not accelerated for them is named."""

import pytest
import torch
from torch import nn

from pairformer_fast import accelerate

pytest.importorskip("openfold3", reason="needs the extra [openfold]: pip install '.[openfold]'")

from openfold3.core.model.layers.transition import ReLUTransition

from tests.integrations.adapters import CHANGES, adapt
from tests.integrations.comparison import DENSE, distance
from tests.integrations.test_openfold3 import C_Z, block, inputs, outputs, with_random_weights

IN_A_PAIR_BLOCK = (
    "pair_stack.tri_mul_out.linear_a_g",
    "pair_stack.tri_mul_in.linear_z",
    "pair_stack.tri_att_start.mha.linear_q",
    "pair_stack.tri_att_start.mha.linear_o",
    "pair_stack.tri_att_end.linear_z",
    "pair_stack.pair_transition.swiglu.linear_a",
)
TRANSITIONS = ("pair_stack.pair_transition", "single_transition")
IN_A_TRANSITION = ("single_transition.swiglu.linear_b", "single_transition.linear_out")
ELSEWHERE = ("attn_pair_bias.linear_z", "attn_pair_bias.mha.linear_k", "attn_pair_bias.mha.linear_g")


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("path", [*IN_A_PAIR_BLOCK, *IN_A_TRANSITION, *ELSEWHERE])
def test_a_layer_that_was_replaced_keeps_its_effect(path, change):
    model, batch = block(), inputs(17)
    before = outputs(model, batch)
    change(model, path)
    expected = outputs(model, batch)
    assert max(map(distance, expected, before)) > 1e-3
    with accelerate(model, DENSE) as acceleration:
        found = outputs(model, batch)
    assert max(map(distance, found, expected)) < 1e-5
    assert len(acceleration.swapped) == 3
    changed = {transition for transition in TRANSITIONS if path.startswith(transition)}
    broken = changed | ({"pair_stack"} if path in IN_A_PAIR_BLOCK else set())
    around = {"single_transition", "pair_stack.pair_transition" if "pair_stack" in broken else "pair_stack"}
    assert set(acceleration.around) == around - changed
    reasons = {skipped.path: skipped.reason for skipped in acceleration.skipped}
    assert reasons.keys() == broken
    for skipped, reason in reasons.items():
        assert path.removeprefix(f"{skipped}.") in reason


def test_a_pair_block_of_other_parts_is_named():
    model = block()
    model.pair_stack.pair_transition = with_random_weights(ReLUTransition(C_Z, 2))
    with accelerate(model, DENSE) as acceleration:
        whole, transition = acceleration.skipped
    assert whole.path == "pair_stack"
    assert whole.reason == "its pair_transition is not SwiGLUTransition but ReLUTransition"
    assert transition.path == "pair_stack.pair_transition"
    assert "ReLU" in transition.reason


def test_a_model_of_two_packages_is_refused():
    other = type("Other", (nn.Module,), {"__module__": "boltz.model.layers"})
    with pytest.raises(ValueError, match="openfold3 and boltz"):
        accelerate(nn.ModuleList([block(), other()]))


def test_adapters_are_trained_as_without_acceleration():
    model, batch = block().train(), inputs(17)
    adapt(model, IN_A_PAIR_BLOCK[0])
    adapter = list(model.pair_stack.tri_mul_out.linear_a_g.parameters())

    def gradients() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(5)  # of dropout
        return torch.autograd.grad(outputs(model, batch)[1].sin().sum(), adapter)

    expected = gradients()
    with accelerate(model, DENSE):
        assert max(map(distance, gradients(), expected)) < 1e-4
