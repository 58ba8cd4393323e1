"""Gated output against fp64 and beside plain PyTorch. On a CPU the kernels run in Triton's interpreter."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pairformer_fast.config import Backend
from pairformer_fast.kernels.gated_output import api, gated_output, operator
from pairformer_fast.kernels.layer_norm import NormParameters
from tests.kernels.cases import DEVICE, FLOOR, assert_as_exact

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")

LEAVES = ("z", "attended", "norm_weight", "norm_bias", "gate_weight", "out_weight")

MULTIPLES = {"max": 2.0, "mean": 1.5}
"""Errors allowed, in units of what plain PyTorch loses in the same dtype."""

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16")
"""Triton's interpreter cannot multiply bf16."""


@dataclass(frozen=True)
class Case:
    """Sizes and features of one problem; ``order`` lists the layouts of ``z`` and of ``attended``."""

    i: int
    j: int
    c: int
    hd: int
    b: int = 1
    order: tuple[str, str] = ("plain", "plain")
    dropout: str = ""
    bias: bool = True
    dtype: torch.dtype = torch.float32
    of_parameters: torch.dtype | None = None

    def __str__(self) -> str:
        features = "-".join([*self.order, self.dropout, "bias" * self.bias])
        return f"B{self.b}-I{self.i}-J{self.j}-C{self.c}-HD{self.hd}-{features}"


@dataclass
class Inputs:
    """Tensors that may have gradients, the mask of dropout, and the gradient that arrives."""

    leaves: dict[str, Tensor]
    dropout: Tensor | None
    dout: Tensor


def laid_out(x: Tensor, order: str) -> Tensor:
    """The same values ``[B, I, J, X]`` laid out otherwise."""
    if order.startswith("transposed"):
        return laid_out(x.transpose(1, 2), order.removeprefix("transposed").strip() or "plain").transpose(1, 2)
    if order == "slab":
        frame = x.new_full((x.shape[0], x.shape[1] + 3, x.shape[2] + 2, x.shape[3]), torch.nan)
        frame[:, 2:-1, 1:-1] = x
        return frame[:, 2:-1, 1:-1]
    return x.contiguous()


def make(case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE, dtype or case.dtype)

    of_parameters = case.of_parameters or case.dtype
    shape = (case.b, case.i, case.j)
    leaves = {
        "z": laid_out(0.5 + 2 * draw(*shape, case.c), case.order[0]),
        "attended": laid_out(draw(*shape, case.hd), case.order[1]),
        "norm_weight": 1 + 0.3 * draw(case.c, dtype=of_parameters),
        "norm_bias": 0.3 * draw(case.c, dtype=of_parameters),
        "gate_weight": draw(case.hd, case.c, dtype=of_parameters) * case.c**-0.5,
        "out_weight": draw(case.c, case.hd, dtype=of_parameters) * case.hd**-0.5,
    }
    if not case.bias:
        del leaves["norm_bias"]
    sizes = {"rows": (case.b, 1, case.j, case.c), "columns": (case.b, case.i, 1, case.c), "tokens": (*shape, 1)}
    dropout = None
    if case.dropout:
        keep = torch.rand(*sizes[case.dropout], generator=generator) < 0.75
        dropout = keep.to(DEVICE, case.dtype) / 0.75
    return Inputs({name: x.requires_grad_() for name, x in leaves.items()}, dropout, draw(*shape, case.c))


def apply(leaves: dict[str, Tensor], dropout: Tensor | None, backend: Backend = Backend.TRITON) -> Tensor:
    norm = NormParameters(leaves["norm_weight"], leaves.get("norm_bias"), 1e-4)
    weights = leaves["gate_weight"], leaves["out_weight"]
    return gated_output(leaves["z"], leaves["attended"], norm, *weights, dropout, backend=backend)


def results(inputs: Inputs, backend: Backend = Backend.TRITON, function: Callable = apply) -> dict[str, Tensor]:
    """Output and all gradients."""
    out = function(inputs.leaves, inputs.dropout, backend)
    gradients = torch.autograd.grad(out, list(inputs.leaves.values()), inputs.dout.to(out.dtype))
    return {"out": out.detach()} | dict(zip(inputs.leaves, gradients, strict=True))


def exact(inputs: Inputs) -> dict[str, Tensor]:
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.leaves.items()}
    dropout = None if inputs.dropout is None else inputs.dropout.double()
    return results(Inputs(leaves, dropout, inputs.dout.double()), Backend.REFERENCE)


def check(case: Case) -> None:
    inputs = make(case)
    assert_as_exact(results(inputs), results(inputs, Backend.REFERENCE), exact(inputs), FLOOR[case.dtype], MULTIPLES)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert torch.equal(got[name], x), name


SMALL = Case(3, 17, 24, 32, b=2, dropout="rows")

SIZES = [
    Case(1, 1, 16, 16),
    Case(17, 5, 24, 48, b=2, dropout="columns"),
    Case(2, 130, 64, 32, bias=False),
    Case(1, 63, 128, 128, dropout="rows"),
    Case(3, 33, 128, 256, dropout="tokens"),
    Case(1, 17, 256, 256),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_output_and_gradients_are_exact(case, dtype):
    check(Case(**{**vars(case), "dtype": dtype}))


def test_single_representation():
    check(Case(1, 37, 384, 384, b=2, dtype=torch.float16))


ORDERS = ["plain", "transposed", "slab", "transposed slab"]


@pytest.mark.parametrize("order", [*zip(ORDERS, ORDERS, strict=True), ("plain", "transposed"), ("transposed", "slab")])
def test_layouts_of_memory_change_nothing(order):
    case = Case(5, 11, 24, 32, b=2, order=order, dropout="columns")
    check(case)
    inputs = make(case)
    got = results(inputs)
    assert got["out"].stride() == torch.empty_like(inputs.leaves["z"]).stride()


def test_parameters_in_fp32_beside_half_a_representation():
    case = Case(3, 40, 32, 64, dtype=torch.float16, of_parameters=torch.float32, dropout="rows")
    check(case)
    assert results(make(case))["gate_weight"].dtype == torch.float32


@pytest.mark.parametrize("where", ["itself", "elsewhere"])
@pytest.mark.parametrize("order", [("plain", "plain"), ("transposed slab", "plain")], ids=str)
@pytest.mark.parametrize("backend", [Backend.TRITON, Backend.REFERENCE])
def test_out_takes_the_result(order, where, backend):
    inputs = make(Case(4, 35, 24, 32, order=order, dropout="columns"))
    want = apply(inputs.leaves, inputs.dropout, backend).detach()
    z = inputs.leaves["z"].detach()
    out = z if where == "itself" else torch.empty_like(z)
    version = out._version
    norm = NormParameters(inputs.leaves["norm_weight"], inputs.leaves["norm_bias"], 1e-4)
    weights = inputs.leaves["gate_weight"], inputs.leaves["out_weight"]
    with torch.no_grad():
        got = gated_output(z, inputs.leaves["attended"], norm, *weights, inputs.dropout, out=out, backend=backend)
    assert got is out
    assert out._version > version
    assert torch.equal(out, want)
    with pytest.raises(RuntimeError, match="while a gradient is wanted"):
        gated_output(z, inputs.leaves["attended"], norm, *weights, out=out, backend=backend)


def test_a_slab_in_place_leaves_the_rest_alone():
    inputs = make(SMALL)
    z = inputs.leaves["z"].detach().transpose(1, 2)
    want = z.clone()
    attended = inputs.leaves["attended"].detach().transpose(1, 2)
    norm = NormParameters(inputs.leaves["norm_weight"].detach(), None)
    weights = [inputs.leaves[name].detach() for name in ("gate_weight", "out_weight")]
    part = slice(4, 11)
    want[:, part] = gated_output(z[:, part], attended[:, part], norm, *weights, backend=Backend.TRITON)
    gated_output(z[:, part], attended[:, part], norm, *weights, out=z[:, part], backend=Backend.TRITON)
    assert torch.equal(z, want)


def test_gradient_that_arrives_expanded():
    inputs = make(SMALL)
    got, want = (
        torch.autograd.grad(apply(inputs.leaves, inputs.dropout, backend).sum(), list(inputs.leaves.values()))
        for backend in (Backend.TRITON, Backend.REFERENCE)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_chunks_of_the_backward_pass_and_the_same_bits_again():
    from pairformer_fast.kernels.gated_output import triton_backward

    inputs = make(Case(3, 100, 32, 32, dropout="rows"))
    leaves = [x.detach() for x in inputs.leaves.values()]
    norm = NormParameters(leaves[2], leaves[3], 1e-4)
    dropout = None if inputs.dropout is None else inputs.dropout.expand(leaves[0].shape)
    arguments = (inputs.dout, *leaves[:2], norm, *leaves[4:], dropout, torch.float32)
    truth = exact(inputs)
    for chunk in (64, 200, triton_backward.CHUNK):
        first, second = (triton_backward.backward(*arguments, chunk=chunk) for _ in range(2))
        for name, a, b in zip(LEAVES, first, second, strict=True):
            assert torch.equal(a, b), name
            torch.testing.assert_close(a.double(), truth[name], atol=2e-5, rtol=1e-5, msg=f"{name}, chunk {chunk}")


@pytest.mark.parametrize("bias", [True, False])
def test_operators_pass_opcheck(bias):
    inputs = make(Case(1, 3, 16, 16, bias=bias, dropout="rows" * bias))
    leaves = [inputs.leaves.get(name) for name in LEAVES]
    z = inputs.leaves["z"]
    arguments = (*leaves, None if inputs.dropout is None else inputs.dropout.expand(z.shape), 1e-5, torch.float32)
    torch.library.opcheck(operator.gated_output, arguments)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    torch.library.opcheck(operator.gated_output_backward, (inputs.dout, *detached))
    torch.library.opcheck(operator.gated_output_into, (*detached, torch.zeros_like(z)))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_graph_breaks(dynamic):
    inputs = make(SMALL)
    torch._dynamo.reset()
    engine = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(apply, fullgraph=True, dynamic=dynamic, backend=engine)
    assert_same(results(inputs, function=compiled), results(inputs))


def test_compiles_in_place():
    inputs = make(SMALL)
    leaves = {name: x.detach() for name, x in inputs.leaves.items()}
    want = apply(leaves, inputs.dropout)

    def update(z: Tensor) -> Tensor:
        norm = NormParameters(leaves["norm_weight"], leaves["norm_bias"], 1e-4)
        weights = leaves["gate_weight"], leaves["out_weight"]
        gated_output(z, leaves["attended"], norm, *weights, inputs.dropout, out=z, backend=Backend.TRITON)
        return z + 1

    torch._dynamo.reset()
    engine = "inductor" if DEVICE == "cuda" else "aot_eager"
    z = leaves["z"].clone()
    assert torch.equal(torch.compile(update, fullgraph=True, backend=engine)(z), want + 1)
    assert torch.equal(z, want)


def test_activation_checkpointing_changes_nothing():
    inputs = make(SMALL)
    recomputed = results(inputs, function=lambda *given: checkpoint(apply, *given, use_reentrant=False))
    assert_same(recomputed, results(inputs))


def test_second_derivatives_are_refused():
    inputs = make(SMALL)
    z = inputs.leaves["z"]
    (gradient,) = torch.autograd.grad(apply(inputs.leaves, None).sin().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="gated_output_backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("narrow", [torch.float16, BF16])
def test_autocast_rounds_products_alone(narrow):
    """A representation in fp32 keeps what its dtype holds, with products as they are in the narrow dtype."""
    inputs = make(Case(2, 40, 64, 64, dropout="rows"))
    with torch.autocast(DEVICE, narrow):
        got, plain = (results(inputs, backend) for backend in (Backend.TRITON, Backend.REFERENCE))
    assert {x.dtype for x in got.values()} == {torch.float32}
    assert_as_exact(got, plain, exact(inputs), 1e-5, MULTIPLES)
    assert not torch.equal(got["out"], results(inputs)["out"])


def test_autocast_leaves_fp64_alone():
    inputs = make(Case(2, 4, 16, 16, dtype=torch.float64))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same(results(inputs, Backend.AUTO), exact(inputs))


def test_reference_passes_gradcheck():
    inputs = make(Case(1, 3, 4, 4, dtype=torch.float64, dropout="rows"))

    def function(*leaves: Tensor) -> Tensor:
        return apply(dict(zip(LEAVES, leaves, strict=True)), inputs.dropout, Backend.REFERENCE)

    assert torch.autograd.gradcheck(function, tuple(inputs.leaves.values()))


def arguments() -> dict:
    inputs = make(Case(2, 5, 16, 32))
    leaves = {name: x.detach() for name, x in inputs.leaves.items()}
    return {
        "norm": NormParameters(leaves.pop("norm_weight"), leaves.pop("norm_bias")),
        "dropout": None,
        **leaves,
    }


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("z", torch.zeros(5, 16), ValueError, r"z must be \[B, I, J, C\]"),
        ("z", torch.zeros(1, 2, 5, 16, dtype=torch.int64), TypeError, "z must be floating point"),
        ("attended", torch.zeros(1, 5, 2, 32), ValueError, r"attended must be .* = \[1, 2, 5, 32\]"),
        ("attended", torch.zeros(1, 2, 5, 32).long(), TypeError, "attended must be floating point"),
        ("gate_weight", torch.zeros(16, 32), ValueError, r"gate_weight must be .* = \[32, 16\]"),
        ("out_weight", torch.zeros(32, 16), ValueError, r"out_weight must be .* = \[16, 32\]"),
        ("norm", NormParameters(torch.ones(15), None), ValueError, "norm.weight must be"),
        ("dropout", torch.zeros(1, 3, 5, 16), ValueError, "dropout must be broadcastable"),
        ("dropout", torch.zeros(1, 1, 5, 16).double(), TypeError, "dropout must have the dtype of z"),
        ("dropout", torch.zeros(1, 1, 5, 16).requires_grad_(), RuntimeError, "detach it"),
        ("out", torch.zeros(1, 2, 5, 8), ValueError, "pass out=z"),
        ("out", torch.zeros(1, 2, 5, 16).double(), ValueError, "out must be like z"),
        ("backend", "cuda", ValueError, "cuda"),
    ],
)
def test_errors_say_what_to_change(name, value, error, message):
    if isinstance(value, NormParameters):
        value = NormParameters(value.weight.to(DEVICE), None)
    elif isinstance(value, Tensor):
        value = value.detach().to(DEVICE).requires_grad_(value.requires_grad)
    with pytest.raises(error, match=message):
        gated_output(**(arguments() | {name: value}))


def test_triton_refuses_what_its_kernels_cannot_hold():
    widest = api.MOST_CHANNELS[4]
    inputs = make(Case(1, 2, widest + 8, 16))
    with pytest.raises(ValueError, match=f"up to {widest} channels"):
        apply(inputs.leaves, None)
    assert apply(inputs.leaves, None, Backend.AUTO).isfinite().all()
    with pytest.raises(TypeError, match="choose backend 'reference'"):
        apply(make(Case(1, 2, 16, 16, dtype=torch.float64)).leaves, None)


@pytest.mark.gpu
@pytest.mark.parametrize("order", [("plain", "plain"), ("plain", "transposed"), ("transposed", "plain")], ids=str)
@pytest.mark.parametrize("channels", [64, 128, 256])
def test_many_tiles_in_bf16(channels, order):
    check(Case(200, 333, channels, channels, order=order, dropout="rows", dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 128, 256])
def test_many_tiles_of_fp32_under_autocast(channels):
    inputs = make(Case(200, 333, channels, channels, dropout="columns"))
    with torch.autocast(DEVICE, torch.bfloat16):
        got, plain = (results(inputs, backend) for backend in (Backend.TRITON, Backend.REFERENCE))
    assert_as_exact(got, plain, exact(inputs), 1e-5, MULTIPLES)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    torch.use_deterministic_algorithms(False)  # which would fill 4 GB with NaN
    inputs = make(Case(1, 40, 128, 128, dtype=torch.bfloat16))
    leaves = {name: x.detach() for name, x in inputs.leaves.items()}
    want = apply(leaves, None)
    count = 2**31 // 128 + 64
    z = torch.zeros(1, 1, count, 128, dtype=torch.bfloat16, device=DEVICE)
    z[:, :, -40:] = leaves["z"]
    attended = torch.zeros_like(z)
    attended[:, :, -40:] = leaves["attended"]
    norm = NormParameters(leaves["norm_weight"], leaves["norm_bias"], 1e-4)
    weights = leaves["gate_weight"], leaves["out_weight"]
    gated_output(z, attended, norm, *weights, out=z, backend=Backend.TRITON)
    torch.testing.assert_close(z[:, :, -40:], want, rtol=1.6e-2, atol=1e-2)


@pytest.mark.gpu
def test_cuda_graph_replays_forward_and_backward():
    inputs = make(Case(5, 40, 64, 64, dropout="rows", dtype=torch.bfloat16))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(inputs)
    with torch.no_grad():
        inputs.leaves["attended"].mul_(0.5)
    graph.replay()
    assert_same(captured, results(inputs))
