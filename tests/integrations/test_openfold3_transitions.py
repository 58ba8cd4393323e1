"""SwiGLU transitions of OpenFold3 outside pair blocks: its outputs and gradients; what stays as it is is named."""

import pytest
import torch
from torch import nn

from pairformer_fast import AttentionConfig, accelerate
from pairformer_fast.config import Backend
from tests.integrations.adapters import adapt
from tests.integrations.comparison import DENSE, distance
from tests.kernels.conftest import mended_interpreter  # noqa: F401 -- a fixture

pytest.importorskip("openfold3", reason="needs the extra [openfold]: pip install '.[openfold]'")

from openfold3.core.model.latent.msa_module import MSAModuleBlock
from openfold3.core.model.layers.transition import ReLUTransition, SwiGLUTransition
from openfold3.core.model.layers.triangular_attention import TriangleAttention

from pairformer_fast.integrations import openfold3_stack, openfold3_transitions
from pairformer_fast.integrations.openfold3_transitions import FastSwiGLUTransition
from tests.integrations.test_openfold3 import (
    C_Z,
    PAIR,
    assert_same_gradients,
    block,
    gradients,
    inputs,
    stack,
    with_random_weights,
)

C_M = 24
ON_TRITON = AttentionConfig(bias="dense", backend="triton")
"""The kernel runs in Triton's interpreter on a CPU."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def beside_attention(*transitions: nn.Module) -> nn.ModuleList:
    """Attention, without which there is nothing to accelerate, and transitions."""
    return nn.ModuleList([TriangleAttention(C_Z, 8, 2), *transitions])


def learn(module: nn.Module, x: torch.Tensor, *arguments, dtype: torch.dtype | None = None, **options) -> list:
    """Output, and gradients of x and all parameters."""
    leaves = [x.detach().clone().requires_grad_(), *module.parameters()]
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        out = module(leaves[0], *arguments, **options)
    return [out.detach(), *torch.autograd.grad(out.float().sin().sum(), leaves)]


@pytest.fixture(params=["PyTorch", "Triton", "OpenFold3"])
def config(request, monkeypatch) -> AttentionConfig:
    """Every way in which a transition may be computed."""
    if request.param == "Triton":
        pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")
        return ON_TRITON
    if request.param == "OpenFold3":
        monkeypatch.setattr(openfold3_transitions, "FEW_ROWS", 0)
        return AttentionConfig(bias="dense", backend="reference")
    return DENSE


@pytest.mark.parametrize(
    ("shape", "of_mask"),
    [
        ((7,), (7,)),
        ((2, 13), None),
        ((2, 13), (2, 13)),
        ((2, 3, 5), (2, 1, 5)),
        ((1, 2, 3, 5), (1, 1, 3, 5)),
    ],
    ids=str,
)
def test_outputs_and_gradients(config, shape, of_mask):
    module = with_random_weights(SwiGLUTransition(C_M, 2)).to(DEVICE)
    x = torch.randn(*shape, C_M, device=DEVICE)
    mask = None if of_mask is None else torch.ones(of_mask, device=DEVICE)
    if mask is not None:
        mask[..., 2:4] = 0
    expected = learn(module, x, mask)
    keys, parameters = list(module.state_dict()), list(module.parameters())
    with accelerate(beside_attention(module), DENSE) as acceleration:
        module.config = config
        found = learn(module, x, mask)
        assert acceleration.around == ("1",)
        assert type(module) is FastSwiGLUTransition
        assert list(module.state_dict()) == keys
        assert all(map(lambda a, b: a is b, module.parameters(), parameters))
    assert type(module) is SwiGLUTransition
    assert "config" not in vars(module)
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5
    if mask is not None:
        assert not found[0][(mask == 0).expand(shape)].any()


def test_samples_that_share_a_representation():
    """Expanded, as the single conditioning is over samples of the diffusion module."""
    module = with_random_weights(SwiGLUTransition(C_M, 2)).to(DEVICE)
    s, mask = torch.randn(2, 1, 5, C_M, device=DEVICE).expand(2, 3, 5, C_M), torch.ones(2, 1, 5, device=DEVICE)
    with torch.no_grad():
        expected = module(s, mask=mask)
        with accelerate(beside_attention(module), DENSE):
            assert distance(module(s, mask=mask), expected) < 1e-5


@pytest.mark.parametrize(
    ("training", "options"),
    [
        (False, {"chunk_size": 2}),
        (False, {"inplace_safe": True, "chunk_size": 2}),
        (True, {}),
        (True, {"_mask_trans": False}),
        (True, {"transition_ckpt_chunk_size": 2}),
    ],
    ids=str,
)
def test_block_of_the_msa(config, training, options):
    n = 5
    sizes = {"c_m": C_M, "c_hidden_msa_att": 8, "c_hidden_opm": 8, "no_heads_msa": 2, "msa_dropout": 0.15}
    model = with_random_weights(MSAModuleBlock(**sizes, **PAIR, opm_first=True, eps=1e-5)).train(training).to(DEVICE)
    pair = inputs(n)
    m, z, pair_mask = torch.randn(2, 4, n, C_M), pair["z"], pair["pair_mask"]
    msa_mask = pair["single_mask"][:, None].repeat(1, 4, 1)
    msa_mask[1, 3] = 0
    m, z, msa_mask, pair_mask = (x.to(DEVICE) for x in (m, z, msa_mask, pair_mask))
    # A constant added to all logits of a query: softmax ignores it, so this gradient is zero but for rounding.
    parameters = [x for name, x in model.named_parameters() if name != "msa_att_row.layer_norm_z.bias"]

    def run() -> list[torch.Tensor]:
        torch.manual_seed(5)  # of dropout
        with torch.set_grad_enabled(training):
            leaves = [x.clone().requires_grad_(training) for x in (m, z)] + parameters
            found_m, found_z = model(leaves[0], leaves[1], msa_mask, pair_mask, **options)
            out = [found_m[msa_mask > 0], found_z[pair_mask > 0]]
            if not training:
                return out
            return [*out, *torch.autograd.grad(out[0].sin().sum() + out[1].sin().sum(), leaves)]

    expected = run()
    with accelerate(model, DENSE) as acceleration:
        assert set(acceleration.around) == {"msa_transition", "pair_stack"}
        model.msa_transition.config = config
        found = run()
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("config", [DENSE, ON_TRITON], ids=["PyTorch", "Triton"])
def test_single_representation_in_replayed_blocks(config):
    model = stack(blocks_per_ckpt=1, use_reentrant=False).train().to(DEVICE)
    batch = {name: value.to(DEVICE) for name, value in inputs(17).items()}
    expected = gradients(model, batch)
    with accelerate(model, DENSE) as acceleration:
        singles = [path for path in acceleration.around if path.endswith("single_transition")]
        assert singles == [f"blocks.{i}.single_transition" for i in range(2)]
        for path in singles:
            model.get_submodule(path).config = config
        assert_same_gradients(gradients(model, batch), expected)
        assert model in openfold3_stack._REPLAYS


@pytest.mark.parametrize(
    ("shape", "backend"),
    [
        ((1, 64, 64, 128), Backend.AUTO),
        ((1, 63, 64, 128), Backend.REFERENCE),
        ((1, 384, 384), Backend.REFERENCE),
        ((48, 384, 384), Backend.REFERENCE),
    ],
)
def test_the_kernel_is_taken_for_many_rows_that_are_not_wide(shape, backend, monkeypatch):
    taken = []
    monkeypatch.setattr(openfold3_transitions, "runs_triton", lambda *_: True)
    monkeypatch.setattr(
        openfold3_transitions, "transform", lambda _, x, *__, backend, **___: taken.append(backend) or x
    )
    module = SwiGLUTransition(shape[-1], 2)
    with accelerate(beside_attention(module), DENSE):
        module(torch.empty(1).expand(shape))
    assert taken == [backend]


@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_dtypes_lose_no_more_than_openfold3(autocast):
    """Both of its ways to bf16: tokens in it, and autocast with tokens in fp32."""
    module, x = with_random_weights(SwiGLUTransition(C_M, 4)).to(DEVICE), torch.randn(2, 40, C_M, device=DEVICE)
    bf16 = torch.bfloat16
    x, dtype = (x, bf16) if autocast else (x.to(bf16), None)
    exact = learn(with_random_weights(SwiGLUTransition(C_M, 4)).to(DEVICE, torch.float64), x.double())
    theirs = learn(module, x, dtype=dtype)
    with accelerate(beside_attention(module), DENSE):
        ours = learn(module, x, dtype=dtype)
    assert ours[0].dtype == x.dtype
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert distance(a.double(), c) < 1.2 * distance(b.double(), c) + 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("shape", [(1, 33, 191, 64), (1, 130, 191, 128), (1, 2, 383, 384)], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_production_widths_on_a_gpu(shape, backend, autocast):
    c, dtype = shape[-1], torch.bfloat16 if autocast else None
    module, x = with_random_weights(SwiGLUTransition(c, 4)).to(DEVICE), torch.randn(shape, device=DEVICE)
    x = x if autocast else x.bfloat16()
    mask = (torch.rand(shape[:-1], device=DEVICE) < 0.8).float()
    exact = learn(with_random_weights(SwiGLUTransition(c, 4)).to(DEVICE, torch.float64), x.double(), mask.double())
    theirs = learn(module, x, mask.to(x.dtype), dtype=dtype)
    with accelerate(beside_attention(module), AttentionConfig(bias="dense", backend=backend)):
        ours = learn(module, x, mask.to(x.dtype), dtype=dtype)
    assert ours[0].dtype == x.dtype
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert distance(a.double(), c) < 1.5 * distance(b.double(), c) + 2e-3


def patched(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *arguments, **options: 2 * forward(*arguments, **options)


def with_another_activation(module: nn.Module) -> None:
    module.swiglu.swish = nn.Sigmoid()


def hooked(module: nn.Module) -> None:
    module.linear_out.register_forward_hook(lambda *arguments: 2 * arguments[-1])


def without_scale(module: nn.Module) -> None:
    module.layer_norm.weight = None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (patched, "its forward was replaced on the instance"),
        (with_another_activation, "its swiglu.swish is not"),
        (hooked, "its linear_out is not OpenFold3's own, has hooks"),
        (without_scale, "its layer_norm is not"),
        (lambda module: adapt(module, "swiglu.linear_a"), "its swiglu.linear_a is not"),
    ],
)
@torch.no_grad()
def test_what_was_changed_keeps_its_effect_and_is_named(change, reason):
    module, x = with_random_weights(SwiGLUTransition(C_M, 2)), torch.randn(2, 7, C_M)
    before = module(x)
    change(module)
    expected = module(x)
    assert distance(expected, before) > 1e-3
    with accelerate(beside_attention(module), DENSE) as acceleration:
        assert torch.equal(module(x), expected)
    [skipped] = acceleration.skipped
    assert skipped.path == "1"
    assert reason in skipped.reason


def test_hooks_on_a_transition_are_called():
    module, x, called = SwiGLUTransition(C_M, 2), torch.randn(2, 7, C_M), []
    module.register_forward_hook(lambda *_: called.append(1))
    with accelerate(beside_attention(module), DENSE) as acceleration:
        module(x)
    assert acceleration.around == ("1",)
    assert called


def test_other_transitions_are_named_and_left_alone():
    class Variant(SwiGLUTransition):
        pass

    model = beside_attention(Variant(C_M, 2), ReLUTransition(C_M, 2), SwiGLUTransition(C_M, 2), block())
    with accelerate(model, DENSE) as acceleration:
        assert acceleration.around == ("4.pair_stack", "3", "4.single_transition")
        assert type(model[4].pair_stack.pair_transition) is SwiGLUTransition, "a part of its block"
        reasons = {skipped.path: skipped.reason for skipped in acceleration.skipped}
        assert reasons.keys() == {"1", "2"}
        assert "subclass" in reasons["1"]
        assert "ReLU" in reasons["2"]
        again = accelerate(beside_attention(model), DENSE)
        assert again.around == ()
        assert {s.path for s in again.skipped if "already" in s.reason} >= {f"1.{path}" for path in acceleration.around}
        again.restore()
