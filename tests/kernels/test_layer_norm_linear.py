"""Layer norm and linear layers against fp64, beside what plain PyTorch loses in the same dtype.

On a CPU the kernel runs in Triton's interpreter, with products of fp16; those of bf16 are wrong there. Products of fp32
are PyTorch's.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pairformer_fast.config import Backend
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm_linear import layer_norm_linear, operator
from tests.kernels.cases import DEVICE, FLOOR, assert_as_exact

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
MULTIPLES = {"max": 3.0, "mean": 3.0}
"""Errors allowed, in units of what PyTorch loses."""

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes and features of one problem."""

    rows: int
    columns: int
    c: int = 64
    outputs: int | None = 48
    planes: int | None = 4
    batch: int = 1
    order: str = "plain"
    transposed: bool = False
    bias: bool = True
    dtype: torch.dtype = HALF
    parameters: torch.dtype | None = None
    autocast: bool = False

    def __str__(self) -> str:
        sizes = f"B{self.batch}-I{self.rows}-J{self.columns}-C{self.c}-O{self.outputs}-P{self.planes}"
        features = "-transposed" * self.transposed + "-autocast" * self.autocast + "-unbiased" * (not self.bias)
        return f"{sizes}-{self.order}{features}-{str(self.dtype).removeprefix('torch.')}"


@dataclass
class Problem:
    """Tensors that may have gradients, and the gradients that arrive."""

    case: Case
    leaves: dict[str, Tensor]
    arriving: dict[str, Tensor]

    def results(self, backend: Backend, dtype: torch.dtype | None = None) -> Results:
        """Outputs and gradients, in ``dtype`` throughout if given."""
        leaves = {
            name: (x if dtype is None else x.to(dtype)).detach().requires_grad_() for name, x in self.leaves.items()
        }
        with torch.autocast(DEVICE, HALF, enabled=self.case.autocast and dtype is None):
            outputs = apply(leaves, self.case.transposed, backend)
        arriving = [self.arriving[name].to(x.dtype) for name, x in outputs.items()]
        found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), arriving)
        return {name: x.detach() for name, x in outputs.items()} | {
            f"gradient of {name}": x for name, x in zip(leaves, found, strict=True)
        }


def apply(leaves: dict[str, Tensor], transposed: bool = False, backend: Backend = Backend.TRITON) -> Results:
    norm = NormParameters(leaves["norm_weight"], leaves.get("norm_bias"), 1e-4)
    weights = leaves.get("weight"), leaves.get("planar_weight")
    tokens, planar = layer_norm_linear(leaves["z"], norm, *weights, transposed=transposed, backend=backend)
    return {name: x for name, x in (("tokens", tokens), ("planar", planar)) if x is not None}


def make(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(0)
    b, i, j, c = case.batch, case.rows, case.columns, case.c

    def draw(*size: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(*size, generator=generator, dtype=torch.float64)
        return drawn.to(DEVICE, dtype or case.parameters or case.dtype)

    match case.order:
        case "plain":
            z = draw(b, i, j, c, dtype=case.dtype)
        case "transposed":
            z = draw(b, j, i, c, dtype=case.dtype).transpose(1, 2)
        case "slab":
            z = draw(b, i + 5, j + 2, c, dtype=case.dtype)[:, 3 : i + 3, :j]
        case "transposed slab":
            z = draw(b, j, i + 5, c, dtype=case.dtype)[:, :, 3 : i + 3].transpose(1, 2)
    leaves, arriving = {"z": z.mul_(2).add_(1), "norm_weight": 1 + 0.3 * draw(c)}, {}
    if case.bias:
        leaves["norm_bias"] = 0.3 * draw(c)
    if case.outputs:
        leaves["weight"] = draw(case.outputs, c) * c**-0.5
        arriving["tokens"] = draw(b, i, j, case.outputs, dtype=HALF)
        if case.transposed:
            arriving["tokens"] = arriving["tokens"].transpose(1, 2).contiguous().transpose(1, 2)
    if case.planes:
        leaves["planar_weight"] = draw(case.planes, c) * c**-0.5
        arriving["planar"] = draw(b, case.planes, i, j, dtype=HALF)
    return Problem(case, leaves, arriving)


def check(problem: Problem) -> Results:
    """Dtypes, layouts, and the largest and the mean error of everything."""
    case = problem.case
    got, truth = problem.results(Backend.TRITON), problem.results(Backend.REFERENCE, torch.float64)
    plain = problem.results(Backend.REFERENCE)
    assert_as_exact(got, plain, truth, FLOOR[HALF if case.autocast else case.dtype], MULTIPLES)
    if "planar" in got:
        assert got["planar"].is_contiguous()
    if "tokens" in got:
        tokens = got["tokens"].transpose(1, 2) if case.transposed else got["tokens"]
        assert tokens.is_contiguous()
    return got


CASES = [
    Case(1, 1, c=16, outputs=16, planes=1),
    Case(17, 1, c=24, outputs=72),
    Case(1, 63, c=64, outputs=192, planes=16, transposed=True),
    Case(3, 130, c=128, outputs=384, bias=False),
    Case(2, 17, c=256, outputs=100, planes=64, batch=2),
    Case(17, 63, outputs=None, planes=16, order="transposed"),
    Case(9, 17, planes=None, batch=2, transposed=True),
    Case(9, 19, batch=2, order="transposed"),
    Case(9, 19, batch=2, order="transposed", transposed=True),
    Case(5, 33, batch=2, order="slab"),
    Case(5, 33, batch=2, order="transposed slab", transposed=True),
    Case(9, 17, dtype=torch.float32, autocast=True),
    Case(9, 17, dtype=torch.float32, autocast=True, transposed=True, batch=2),
    Case(9, 17, parameters=torch.float32),
    Case(9, 17, c=256, dtype=torch.float32, batch=2),
    Case(9, 17, dtype=torch.float32, order="transposed", transposed=True),
    Case(9, 17, dtype=torch.float32, outputs=None, order="slab"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_exact(case):
    check(make(case))


@pytest.mark.gpu
@pytest.mark.parametrize("c", [64, 128, 256])
@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_production_shapes_on_a_gpu(c, transposed, dtype):
    autocast = dtype == torch.float32
    check(make(Case(130, 191, c=c, outputs=3 * c, dtype=dtype, autocast=autocast, transposed=transposed)))


@pytest.mark.gpu
def test_fp16_on_a_gpu():
    check(make(Case(63, 130, c=128, outputs=384, dtype=torch.float16)))


@pytest.mark.gpu
def test_more_entries_than_32_bits_count():
    case = Case(2900, 2900, c=256, outputs=16, planes=None)
    z = torch.zeros(1, case.rows, case.columns, case.c, dtype=HALF, device=DEVICE)
    problem = make(replace(case, rows=1, columns=64))
    z[0, -1, -64:] = problem.leaves["z"][0, 0]
    with torch.no_grad():
        got = apply(problem.leaves | {"z": z})["tokens"][0, -1, -64:]
        assert torch.equal(got, apply(problem.leaves)["tokens"][0, 0])


@pytest.mark.parametrize("resident", [0, 1], ids=["streamed", "resident"])
@pytest.mark.parametrize(
    "case",
    [
        Case(9, 17, outputs=100, planes=5, batch=2),
        Case(3, 70, order="transposed", planes=None, c=24),
        Case(3, 70, outputs=None, planes=16, transposed=True),
    ],
    ids=str,
)
def test_kernels_with_resident_and_streamed_weights(case, resident, monkeypatch):
    from pairformer_fast.kernels.layer_norm_linear import triton_forward

    tiles = triton_forward.Tiles(32, 64, 4, 2, resident)
    monkeypatch.setattr(triton_forward, "tile_sizes", lambda *sizes: tiles)
    check(make(case))


def test_gradients_by_many_partial_sums(monkeypatch):
    from pairformer_fast.kernels.layer_norm_linear import products

    monkeypatch.setattr(products, "CHUNK", 16)
    monkeypatch.setattr(products, "MOST_CHUNKS", 5)
    check(make(Case(7, 19, batch=2)))
    check(make(Case(5, 16, order="transposed", transposed=True)))


def test_same_bits_again():
    problem = make(Case(9, 63, batch=2))
    first, second = (problem.results(Backend.TRITON) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("used", ["tokens", "planar"])
def test_either_result_may_go_unused(used):
    problem = make(Case(5, 7, dtype=torch.float32))
    leaves = {name: x.detach().requires_grad_() for name, x in problem.leaves.items()}
    arriving = problem.arriving[used].float()
    got, want = (
        torch.autograd.grad(apply(leaves, backend=backend)[used], list(leaves.values()), arriving, allow_unused=True)
        for backend in (Backend.TRITON, Backend.REFERENCE)
    )
    for name, x, y in zip(leaves, got, want, strict=True):
        torch.testing.assert_close(x, torch.zeros_like(x) if y is None else y, atol=1e-4, rtol=1e-4, msg=name)


def test_only_z_needs_a_gradient():
    problem = make(Case(5, 7, dtype=torch.float32))
    leaves = {name: x.detach().requires_grad_(name == "z") for name, x in problem.leaves.items()}
    (got,) = torch.autograd.grad(apply(leaves)["tokens"].sin().sum(), leaves["z"])
    (want,) = torch.autograd.grad(apply(leaves, backend=Backend.REFERENCE)["tokens"].sin().sum(), leaves["z"])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def operator_arguments(problem: Problem) -> tuple:
    names = ("z", "norm_weight", "norm_bias", "weight", "planar_weight")
    return tuple(problem.leaves.get(name) for name in names)


@pytest.mark.parametrize(
    "case",
    [
        Case(3, 5),
        Case(3, 5, outputs=None, bias=False, order="transposed"),
        Case(3, 5, batch=2, order="transposed slab", transposed=True),
        Case(3, 5, planes=None, order="slab", dtype=torch.float32),
    ],
    ids=str,
)
def test_operators_pass_opcheck(case):
    problem = make(case)
    leaves = tuple(x if x is None else x.requires_grad_() for x in operator_arguments(problem))
    # Gradients that arrive spread out and in one line take other products of cuBLAS, which round otherwise.
    bounds = {"atol": 0.05, "rtol": 0.05} if case.dtype == torch.bfloat16 else {}
    torch.library.opcheck(operator.forward, (*leaves, 1e-5, case.transposed, case.dtype), **bounds)
    detached = tuple(x if x is None else x.detach() for x in leaves)
    arriving = (problem.arriving.get(name) for name in ("tokens", "planar"))
    arriving = [x if x is None else x.to(case.dtype) for x in arriving]
    torch.library.opcheck(operator.backward, (*arriving, *detached, 1e-5, case.dtype))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_compiles_without_graph_breaks(autocast, dynamic):
    problem = make(Case(3, 5, dtype=torch.float32, autocast=autocast))
    leaves = {name: x.requires_grad_() for name, x in problem.leaves.items()}
    torch._dynamo.reset()
    engine = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(apply, fullgraph=True, dynamic=dynamic, backend=engine)
    results = []
    for function in (apply, compiled):
        with torch.autocast(DEVICE, HALF, enabled=autocast):
            outputs = function(leaves)
        loss = sum(x.float().sin().sum() for x in outputs.values())
        results.append([*outputs.values(), *torch.autograd.grad(loss, list(leaves.values()))])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_activation_checkpointing_changes_nothing():
    problem = make(Case(3, 5))
    leaves = {name: x.requires_grad_() for name, x in problem.leaves.items()}
    got, want = (
        torch.autograd.grad(function()["tokens"].float().sin().sum(), list(leaves.values()), allow_unused=True)
        for function in (lambda: checkpoint(apply, leaves, use_reentrant=False), lambda: apply(leaves))
    )
    for name, x, y in zip(leaves, got, want, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
def test_cuda_graph_replays_forward_and_backward(transposed):
    problem = make(Case(33, 65, transposed=transposed))
    problem.results(Backend.TRITON)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        problem.results(Backend.TRITON)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.results(Backend.TRITON)
    problem.leaves["z"].mul_(0.5)
    graph.replay()
    for name, x in problem.results(Backend.TRITON).items():
        assert torch.equal(captured[name], x), name


@pytest.mark.parametrize("backend", [Backend.AUTO, Backend.TRITON])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": torch.zeros(3, 5, 8)}, ValueError, r"z must be \[B, I, J, C\]"),
        ({"weight": None, "planar_weight": None}, ValueError, "nothing to compute"),
        ({"weight": torch.zeros(4, 9)}, ValueError, r"weight must be \[rows, C\] = \[at least 1, 8\]"),
        ({"planar_weight": torch.zeros(4, 8).long()}, TypeError, "planar_weight must be floating"),
        ({"planar_weight": torch.zeros(65, 8)}, ValueError, "up to 64 rows, but has 65"),
        ({"norm": torch.zeros(9)}, ValueError, "norm.weight must be"),
    ],
)
def test_errors_say_what_to_change(change, error, message, backend):
    given = {"z": torch.zeros(1, 3, 5, 8), "weight": torch.zeros(4, 8), "planar_weight": None, "norm": torch.ones(8)}
    given = {name: x if x is None else x.to(DEVICE) for name, x in (given | change).items()}
    with pytest.raises(error, match=message):
        layer_norm_linear(
            given["z"], NormParameters(given["norm"], None), given["weight"], given["planar_weight"], backend=backend
        )


def test_triton_refuses_what_it_cannot_compute():
    z, norm = torch.zeros(1, 3, 5, 512, device=DEVICE), NormParameters(torch.ones(512, device=DEVICE), None)
    weight = torch.zeros(4, 512, device=DEVICE)
    with pytest.raises(ValueError, match="up to 256 channels"):
        layer_norm_linear(z, norm, weight, backend=Backend.TRITON)
    assert layer_norm_linear(z, norm, weight)[0].shape == (1, 3, 5, 4)
    with pytest.raises(TypeError, match="float64"):
        layer_norm_linear(
            z[..., :8].double(),
            NormParameters(norm.weight[:8].double(), None),
            weight[:, :8].double(),
            backend=Backend.TRITON,
        )
