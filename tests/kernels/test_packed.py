"""Attention of q, k and v in one tensor: the same results, and gradients in one tensor without a copy."""

import pytest
import torch
from torch import Tensor

from pairformer_fast.config import Backend
from pairformer_fast.kernels.backend import HAS_TRITON
from pairformer_fast.kernels.flash_bias import Factors, flash_bias_attention, operator, packed_flash_bias_attention
from tests.kernels.cases import DEVICE

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")
BACKENDS = [Backend.REFERENCE, Backend.TORCH, pytest.param(Backend.TRITON, marks=needs_triton)]
SIZES = [
    pytest.param(torch.float32, 4, 2, 8, id="fp32"),
    # The kernels for Hopper, where there is one; those of Triton elsewhere.
    pytest.param(torch.bfloat16, 193, 4, 32, marks=pytest.mark.gpu, id="bf16"),
]


def problem(dtype: torch.dtype, tokens: int, heads: int, dim: int, ending: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE, dtype)

    qkv = draw(1, tokens, tokens, 3 * heads * dim)
    made = {"qkv": qkv.transpose(1, 2) if ending else qkv, "bias": draw(1, heads, tokens, tokens)}
    made |= {name: draw(1, heads, tokens, 16) for name in ("phi_q", "phi_k")}
    mask = torch.rand(1, tokens, tokens, generator=generator) < 0.7
    return {name: x.requires_grad_() for name, x in made.items()} | {"mask": mask.to(DEVICE)}


def run(given: dict[str, Tensor], form: str, heads: int, attend) -> list[Tensor]:
    """Output, and gradients of q, k, v and of the bias or its factors."""
    packed = given["qkv"].unflatten(-1, (3, heads, -1))
    names = ["bias"] if form == "dense" else ["phi_q", "phi_k"]
    bias = given["bias"] if form == "dense" else Factors(given["phi_q"], given["phi_k"])
    out = attend(packed, bias, given["mask"])
    leaves = [given["qkv"], *(given[name] for name in names)]
    return [out.detach(), *torch.autograd.grad(out.float().sin().sum(), leaves)]


@pytest.mark.parametrize("ending", [False, True], ids=["starting", "ending"])
@pytest.mark.parametrize("form", ["dense", "factors"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tokens", "heads", "dim"), SIZES)
def test_equals_attention_of_three_tensors(dtype, tokens, heads, dim, backend, form, ending):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("no CUDA GPU here: run `make gpu-test` on a machine that has one")
    given = problem(dtype, tokens, heads, dim, ending)
    packed = run(given, form, heads, lambda qkv, bias, mask: packed_flash_bias_attention(qkv, bias, mask, backend))
    apart = run(
        given, form, heads, lambda qkv, bias, mask: flash_bias_attention(*qkv.unbind(3), bias, mask, backend=backend)
    )
    for got, want in zip(packed, apart, strict=True):
        assert torch.equal(got, want)


@needs_triton
@pytest.mark.parametrize("form", ["dense", "factors"])
def test_gradients_are_written_side_by_side(form):
    given = problem(torch.float32, 4, 2, 8, ending=False)
    made = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made.append(str(function))
            return function(*args, **(kwargs or {}))

    with Recorder():
        run(given, form, 2, lambda *inputs: packed_flash_bias_attention(*inputs, Backend.TRITON))
    assert any("flash_bias_backward" in name for name in made)
    assert not [name for name in made if "aten.stack" in name or "aten.cat" in name]


@needs_triton
def test_is_an_operator_that_compiles():
    given = problem(torch.float32, 4, 2, 8, ending=True)
    inputs = (given["qkv"].unflatten(-1, (3, 2, 8)), None, None, given["bias"], *[None] * 4, given["mask"], None, None)
    torch.library.opcheck(operator.flash_bias_forward, inputs)

    def attend(*inputs):
        return packed_flash_bias_attention(*inputs, Backend.TRITON)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(given, "dense", 2, compiled), run(given, "dense", 2, attend), strict=True):
        assert torch.equal(got, want)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[B, I, N, 3, H, D\]"):
        packed_flash_bias_attention(torch.zeros(1, 4, 4, 2, 2, 8))
