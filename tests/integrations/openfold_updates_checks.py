"""Checks of triangle multiplication and transitions that need OpenFold for AlphaFold 2."""

import pytest
import torch
from openfold.model.evoformer import MSATransition
from openfold.model.pair_transition import PairTransition
from openfold.model.triangular_attention import TriangleAttention
from openfold.model.triangular_multiplicative_update import (
    TriangleMultiplicationIncoming,
    TriangleMultiplicationOutgoing,
)
from torch import nn

from pairformer_fast import AttentionConfig, accelerate
from pairformer_fast.integrations import openfold_updates
from pairformer_fast.integrations.openfold_updates import NEW_CLASS
from tests.integrations.adapters import CHANGES
from tests.integrations.comparison import DENSE, distance
from tests.integrations.openfold_cases import (
    C_Z,
    ON_TRITON,
    UPDATES,
    assert_same_gradients,
    block,
    gradients,
    inputs,
    outputs,
    with_random_weights,
)
from tests.kernels.conftest import mended_interpreter  # noqa: F401 -- a fixture

TRANSITIONS = [PairTransition, MSATransition]
MULTIPLICATIONS = [cls for cls in NEW_CLASS if cls not in TRANSITIONS]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("cls", MULTIPLICATIONS, ids=lambda cls: cls.__name__)
def test_triangle_multiplication(cls, backend):
    """Of all that the release has, fused ones included."""
    n = 9
    module = with_random_weights(cls(C_Z, 24))
    z = torch.randn(2, n, n, C_Z, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = (torch.rand(2, n, n, generator=torch.Generator().manual_seed(2)) > 0.3).float()

    def results() -> dict[str, torch.Tensor]:
        leaves = {"z": z} | dict(module.named_parameters())
        update = module(z, mask)
        gradients = torch.autograd.grad(update.sin().sum(), list(leaves.values()))
        return {"update": update.detach()} | dict(zip(leaves, gradients, strict=True))

    expected = results()
    with torch.no_grad():
        expected["without a mask"] = module(z)
    # Attention beside it, without which there is nothing to accelerate.
    with accelerate(nn.ModuleList([module, TriangleAttention(C_Z, 8, 2)]), AttentionConfig(backend=backend)):
        assert type(module) is NEW_CLASS[cls]
        found = results()
        with torch.no_grad():
            found["without a mask"] = module(z)
            added, overwritten = z.clone(), z.clone()
            assert module(added, mask, inplace_safe=True, _add_with_inplace=True) is added
            assert module(overwritten, mask, inplace_safe=True) is overwritten
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert distance(found[name], value) < 1e-5, name
    assert distance(added - z, expected["update"]) < 1e-5
    assert distance(overwritten, expected["update"]) < 1e-5


@pytest.mark.parametrize("cls", TRANSITIONS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_transition_by_triton(leading, cls):
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")
    module = with_random_weights(cls(C_Z, 4))
    x = torch.randn(*leading, 3, 5, C_Z).transpose(-2, -3).requires_grad_()
    mask = (torch.rand(x.shape[:-1]) > 0.3).float()

    def results() -> list[torch.Tensor]:
        update = module(x, mask, chunk_size=4)
        return [
            update.detach(),
            module(x).detach(),
            *torch.autograd.grad(update.sin().sum(), [x, *module.parameters()]),
        ]

    expected = results()
    # Attention beside it, without which there is nothing to accelerate.
    with accelerate(nn.ModuleList([module, TriangleAttention(C_Z, 8, 2)]), DENSE) as acceleration:
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True)), "OpenFold's own code on a CPU"
        acceleration.configure(ON_TRITON)
        found = results()
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5


def test_block_by_triton():
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")
    model, batch = block(), inputs(6)
    expected, expected_gradients = outputs(model, batch), gradients(model, batch)
    with accelerate(model, DENSE) as acceleration:
        for path in acceleration.around:  # in the interpreter attention would take 20 s
            model.get_submodule(path).config = ON_TRITON
        found, found_gradients = outputs(model, batch), gradients(model, batch)
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5
    assert_same_gradients(found_gradients, expected_gradients)


@torch.no_grad()
def test_triangle_multiplication_in_fp16_is_openfolds(monkeypatch):
    """Its product is in fp32 there, whose sums would be beyond fp16."""
    module, z, mask = (
        with_random_weights(TriangleMultiplicationOutgoing(C_Z, 8)),
        torch.randn(5, 5, C_Z),
        torch.ones(5, 5),
    )
    expected = module(z, mask)
    monkeypatch.setattr(openfold_updates, "is_fp16_enabled", lambda: True)
    monkeypatch.setattr(openfold_updates, "triangle_multiplication", lambda *_, **__: pytest.fail("in fp16"))
    with accelerate(nn.ModuleList([module, TriangleAttention(C_Z, 8, 2)]), DENSE):
        assert torch.equal(module(z, mask), expected)


@torch.no_grad()
@pytest.mark.parametrize("cls", MULTIPLICATIONS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("inplace", [False, True])
def test_leading_dimensions_of_triangle_multiplication(inplace, leading, cls):
    """In place, whether or not they can be seen as one, and longer than a slab."""
    n = 37
    module = with_random_weights(cls(C_Z, 8))
    z = torch.randn(*reversed(leading), n, n, C_Z)
    z = z.transpose(0, 1) if len(leading) == 2 else z
    mask = (torch.rand(n, n) > 0.3).float().expand(*leading, n, n)
    expected = module(z.clone(), mask) + z * inplace
    with accelerate(nn.ModuleList([module, TriangleAttention(C_Z, 8, 2)]), DENSE):
        found = module(z, mask, inplace_safe=inplace, _add_with_inplace=True)
    assert (found is z) is inplace
    assert distance(found, expected) < 1e-5


def test_other_updates_are_reported_and_left_alone():
    class Variant(TriangleMultiplicationIncoming):
        pass

    model = nn.ModuleDict({"block": block(), "variant": Variant(C_Z, 8)})
    path, patched = next((path, m) for path, m in model.named_modules() if type(m) is TriangleMultiplicationOutgoing)
    patched.forward = lambda *arguments, **options: None
    acceleration = accelerate(model, DENSE)
    assert [path.rpartition(".")[2] for path in acceleration.around] == [x for x in UPDATES if x != "tri_mul_out"]
    reasons = {skipped.path: skipped.reason for skipped in acceleration.skipped}
    assert "instance" in reasons[path]
    assert "subclass" in reasons["variant"]
    assert type(patched) is TriangleMultiplicationOutgoing


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("path", ["core.tri_mul_in.linear_a_g", "core.pair_transition.linear_2"])
def test_a_layer_that_was_replaced_keeps_its_effect(path, change):
    model, batch = block(), inputs(17)
    path = path if hasattr(model, "core") else path.removeprefix("core.")  # GitHub's 2.x has no core
    before = outputs(model, batch)
    change(model, path)
    expected = outputs(model, batch)
    assert max(map(distance, expected, before)) > 1e-3
    with accelerate(model, DENSE) as acceleration:
        found = outputs(model, batch)
    assert max(map(distance, found, expected)) < 1e-5
    assert path.rpartition(".")[0] in {skipped.path for skipped in acceleration.skipped}
