"""Layer norm and its backward pass against fp64. On a CPU the kernels run in Triton's interpreter."""

from itertools import product

import pytest
import torch
from torch import Tensor

from pairformer_fast.config import Backend
from pairformer_fast.kernels.layer_norm import NormParameters, layer_norm, layer_norm_backward
from tests.kernels.cases import DEVICE

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")

BACKENDS = [Backend.REFERENCE, Backend.TRITON]
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Error allowed, relative to the largest entry: one rounding, or a few of fp32."""

SHAPES = [(1, 1, 1, 16), (1, 17, 3, 24), (2, 5, 63, 64), (1, 2, 130, 128), (1, 9, 4, 256), (1, 7, 384), (5, 40)]
ORDERS = ["plain", "transposed", "slab", "transposed slab"]


def draw(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def norm_of(channels: int, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> NormParameters:
    return NormParameters(
        1 + 0.5 * draw(channels, dtype=dtype, seed=1), draw(channels, dtype=dtype, seed=2) if bias else None, 1e-4
    )


def pairs(order: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """``[2, 9, 19, 24]`` in several layouts."""
    x = draw(2, 19, 21, 24, dtype=dtype, seed=seed)
    match order:
        case "plain":
            return x[:, :9, :19].contiguous()
        case "transposed":
            return x[:, :, :9].contiguous().transpose(1, 2)
        case "slab":
            return x[:, 4:13, 2:]
    return x[:, :, 5:14].transpose(1, 2)


def exact(x: Tensor, norm: NormParameters, dy: Tensor, residual: Tensor | None) -> dict[str, Tensor]:
    """Everything in fp64 by PyTorch's own layer norm."""
    bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    leaves = [t.double().requires_grad_() for t in (x, norm.weight, bias)]
    y = torch.nn.functional.layer_norm(leaves[0], x.shape[-1:], *leaves[1:], norm.eps)
    dx, dweight, dbias = torch.autograd.grad(y, leaves, dy.double())
    return {"y": y.detach(), "dx": dx if residual is None else dx + residual, "dweight": dweight, "dbias": dbias}


def computed(
    x: Tensor, norm: NormParameters, dy: Tensor, residual: Tensor | None, backend: Backend
) -> dict[str, Tensor]:
    names = ("dx", "dweight", "dbias")
    return {"y": layer_norm(x, norm, backend=backend)} | dict(
        zip(names, layer_norm_backward(x, norm, dy, residual, backend=backend), strict=True)
    )


def check(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, truth in want.items():
        of_parameter = name in ("dweight", "dbias")
        assert got[name].dtype == (torch.float32 if of_parameter else dtype), name
        assert got[name].shape == truth.shape, name
        error = (got[name].double() - truth).abs().max().item()
        allowed = 4 * ROUNDING[torch.float32 if of_parameter else dtype] * max(1.0, truth.abs().max().item())
        assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_are_exact(shape, backend):
    x, dy, norm = 2 + 3 * draw(*shape), draw(*shape, seed=3), norm_of(shape[-1])
    check(computed(x, norm, dy, None, backend), exact(x, norm, dy, None), x.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_dtypes_with_residual_and_without_offset(dtype, backend):
    x, dy, residual = (draw(2, 4, 33, 64, dtype=dtype, seed=seed) for seed in range(3))
    norm = norm_of(64, dtype, bias=False)
    check(computed(x, norm, dy, residual, backend), exact(x, norm, dy, residual), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("of_x", "of_dy"), [*zip(ORDERS, ORDERS, strict=True), *product(ORDERS[:2], ORDERS[1:3])])
def test_layouts_of_memory_change_nothing(of_x, of_dy, backend):
    x, dy, residual, norm = pairs(of_x), pairs(of_dy, seed=3), pairs(of_x, seed=4), norm_of(24)
    got = computed(x, norm, dy, residual, backend)
    check(got, exact(x, norm, dy, residual), x.dtype)
    assert got["y"].is_contiguous()
    assert got["dx"].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_in_another_dtype(backend):
    x, norm = draw(2, 3, 5, 32), norm_of(32)
    got = layer_norm(x, norm, dtype=torch.float16, backend=backend)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), layer_norm(x, norm, backend=backend), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_that_arrives_expanded_and_in_another_dtype(backend):
    x, norm = draw(2, 3, 5, 32), norm_of(32)
    dy = draw(2, 3, 1, 1, dtype=torch.bfloat16, seed=3).expand(x.shape)
    check(computed(x, norm, dy, None, backend), exact(x, norm, dy, None), x.dtype)


def test_large_mean_loses_no_variance():
    x = 1000 + draw(1, 2, 40, 128)
    norm = norm_of(128)
    got = layer_norm(x, norm, backend=Backend.TRITON).double()
    assert (got - exact(x, norm, torch.ones_like(x), None)["y"]).abs().max() < 1e-3


def test_more_tiles_than_programs_and_the_same_bits_again(monkeypatch):
    from pairformer_fast.kernels.layer_norm import triton_backward

    monkeypatch.setattr(triton_backward, "PROGRAMS", 2)
    x, dy, norm = draw(1, 3, 130, 64), draw(1, 3, 130, 64, seed=3), norm_of(64)
    first, second = (computed(x, norm, dy, None, Backend.TRITON) for _ in range(2))
    check(first, exact(x, norm, dy, None), x.dtype)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_parameters_of_a_module():
    module = torch.nn.LayerNorm(8, eps=1e-3, bias=False)
    norm = NormParameters.of(module)
    assert norm.weight is module.weight
    assert norm.bias is None
    assert norm.eps == 1e-3
    with pytest.raises(ValueError, match="elementwise_affine=True"):
        NormParameters.of(torch.nn.LayerNorm(8, elementwise_affine=False))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 8, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"x": torch.zeros(2, 0, 8)}, ValueError, "no empty dimension"),
        ({"norm": NormParameters(torch.ones(9), None)}, ValueError, r"norm.weight must be \[C\] = \[8\]"),
        ({"norm": NormParameters(torch.ones(8), torch.ones(9))}, ValueError, "norm.bias must be"),
        ({"norm": NormParameters(torch.ones(8).long(), None)}, TypeError, "norm.weight must be floating"),
        ({"dy": torch.zeros(2, 3, 9)}, ValueError, "dy must have the shape"),
        ({"residual": torch.zeros(3, 8)}, ValueError, "residual must have the shape"),
        ({"x": torch.zeros(2, 3, 8).double(), "backend": Backend.TRITON}, TypeError, "bf16, fp16 and fp32"),
        ({"x": torch.zeros(2, 8, 3).mT, "backend": Backend.TRITON}, ValueError, "contiguous"),
        ({"backend": "cuda"}, ValueError, "cuda"),
    ],
)
def test_errors_say_what_to_change(change, error, message):
    given = {"x": torch.zeros(2, 3, 8), "norm": NormParameters(torch.ones(8), torch.zeros(8)), "residual": None}
    given |= {"dy": torch.zeros(2, 3, 8), "backend": Backend.AUTO} | change
    norm = given["norm"]
    given["norm"] = NormParameters(*(None if t is None else t.to(DEVICE) for t in (norm.weight, norm.bias)))
    given |= {name: t.to(DEVICE) for name, t in given.items() if isinstance(t, Tensor)}
    with pytest.raises(error, match=message):
        layer_norm_backward(given["x"], given["norm"], given["dy"], given["residual"], backend=given["backend"])


def test_triton_without_a_gpu_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="move them to a GPU"):
        layer_norm(torch.zeros(2, 8), NormParameters(torch.ones(8), None), backend=Backend.TRITON)
