"""Triangle multiplication against fp64, and beside plain PyTorch in the same dtype.

On a CPU the kernels run in Triton's interpreter (``conftest.py``), so problems are small.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pairformer_fast.config import Backend
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.triangle_multiplication import TriangleWeights, operator, triangle_multiplication
from pairformer_fast.model.triangle_multiplication import TriangleMultiplication
from tests.kernels.cases import DEVICE, FLOOR, assert_as_exact, assert_identical, with_strides

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")

from pairformer_fast.kernels.triangle_multiplication import triton_backward, triton_forward
from pairformer_fast.kernels.triangle_multiplication.triton_common import Tiles

MULTIPLES = {"max": 4.0, "mean": 2.5}
"""Errors allowed, in units of what plain PyTorch loses in the same dtype."""

DIRECTIONS = pytest.mark.parametrize("incoming", [False, True], ids=["outgoing", "incoming"])
NAMES = operator.DIFFERENTIABLE


@dataclass(frozen=True)
class Case:
    """Sizes and features of one problem; ``compute`` is what autocast says."""

    n: int
    c: int = 16
    h: int = 16
    b: int = 1
    dtype: torch.dtype = torch.float32
    compute: torch.dtype | None = None
    bias: bool = True
    dropout: str = ""
    offsets: bool = False

    def __str__(self) -> str:
        types = "-".join(str(x).removeprefix("torch.") for x in (self.dtype, self.compute) if x is not None)
        features = f"{'' if self.bias else '-nobias'}{'-offsets' if self.offsets else ''}{self.dropout}"
        return f"B{self.b}-N{self.n}-C{self.c}-H{self.h}-{types}{features}"


@dataclass(frozen=True)
class Problem:
    """Tensors of a problem; ``leaves`` by the names of the operator."""

    leaves: dict[str, Tensor]
    mask: Tensor
    dropout: Tensor | None
    dy: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        leaves = {name: x.to(dtype) for name, x in self.leaves.items()}
        return Problem(leaves, self.mask, None if self.dropout is None else self.dropout.to(dtype), self.dy.to(dtype))


def make(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        x = mean + scale * torch.randn(*size, generator=generator, dtype=torch.float64)
        return x.to(DEVICE, case.dtype)

    b, n, c, h = case.b, case.n, case.c, case.h
    leaves = {"z": draw(b, n, n, c, scale=2, mean=0.5)}
    for name, width in (("norm_in", c), ("norm_out", h)):
        leaves[f"{name}_weight"] = draw(width, scale=0.2, mean=1)
        if case.bias:
            leaves[f"{name}_bias"] = draw(width, scale=0.2)
    leaves |= {name: draw(h, c, scale=c**-0.5) for name in ("a", "a_gate", "b", "b_gate")}
    leaves |= {"gate": draw(c, c, scale=c**-0.5), "out": draw(c, h, scale=h**-0.5)}
    if case.offsets:
        leaves["offsets"] = draw(4 * h + 2 * c, scale=0.5)
    mask = torch.rand(b, n, n, generator=generator) < 0.8
    mask[:, :, n - n // 5 :] = False
    dropout = None
    if case.dropout:
        shape = (b, 1, n, c) if case.dropout == "rows" else (b, n, 1, c)
        dropout = ((torch.rand(shape, generator=generator) < 0.75) / 0.75).to(DEVICE, case.dtype)
    return Problem(leaves, mask.to(DEVICE), dropout, draw(b, n, n, c))


def update(problem: Problem, incoming: bool, backend: Backend = Backend.TRITON, **options) -> Tensor:
    x = problem.leaves
    weights = TriangleWeights(
        NormParameters(x["norm_in_weight"], x.get("norm_in_bias")),
        NormParameters(x["norm_out_weight"], x.get("norm_out_bias"), 1e-4),
        *(x[name] for name in ("a", "a_gate", "b", "b_gate", "gate", "out")),
        x.get("offsets"),
    )
    return triangle_multiplication(
        x["z"], problem.mask, weights, problem.dropout, incoming=incoming, backend=backend, **options
    )


def results(problem: Problem, incoming: bool, function=update, **options) -> dict[str, Tensor]:
    """Output and every gradient."""
    leaves = {name: x.detach().requires_grad_() for name, x in problem.leaves.items()}
    out = function(replace(problem, leaves=leaves), incoming, **options)
    gradients = torch.autograd.grad(out, list(leaves.values()), problem.dy)
    return {"output": out.detach()} | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}


def check(case: Case, incoming: bool) -> None:
    problem, compute = make(case), case.compute or case.dtype
    truth = results(problem.to(torch.float64), incoming, backend=Backend.REFERENCE)
    with torch.autocast(DEVICE, compute, enabled=case.compute is not None):
        plain = results(problem, incoming, backend=Backend.REFERENCE)
        got = results(problem, incoming)
    assert_as_exact(got, plain, truth, FLOOR[compute], MULTIPLES)


def set_tiles(monkeypatch: pytest.MonkeyPatch, tiles: Tiles) -> None:
    for module, names in (
        (triton_forward, ("project_tiles", "output_tiles")),
        (triton_backward, ("update_tiles", "edges_tiles")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda *_: tiles)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tiles where the interpreter runs programs one by one."""
    if DEVICE == "cpu":
        set_tiles(monkeypatch, Tiles(256, 64, 4, 1, programs=1))


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The same sums of fp32, in another order."""
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, atol=1e-5 * x.abs().max().item(), rtol=0, msg=name)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of rows in the backward pass, of a problem that would fit into one."""
    monkeypatch.setattr(triton_backward, "CHUNK_TOKENS", 64)


CASES = [
    Case(1),
    Case(17, c=24, h=40, bias=False),
    Case(9, c=16, h=24, b=2, dropout="rows"),
    Case(20, c=64, h=64, dtype=torch.float16, dropout="columns"),
    Case(18, c=40, h=64, compute=torch.float16, dropout="rows"),
    Case(11, c=24, h=40, b=2, dropout="rows", offsets=True),
    Case(18, c=40, h=64, compute=torch.float16, offsets=True),
]
GPU_CASES = [
    Case(130, c=128, h=128, dtype=torch.bfloat16, dropout="rows"),
    Case(63, c=64, h=64, b=2, dtype=torch.bfloat16),
    Case(63, c=256, h=256, dtype=torch.bfloat16),
    Case(257, c=128, h=128, compute=torch.bfloat16, dropout="columns"),
    Case(130, c=128, h=32, compute=torch.bfloat16, bias=False),
    Case(130, c=64, h=128, compute=torch.float16),
    Case(130, c=128, h=128, compute=torch.bfloat16, dropout="rows", offsets=True),
    Case(130, c=64, h=128, dtype=torch.bfloat16, offsets=True),
    Case(63, c=128, h=128),
    Case(63, c=256, h=64),
]


@DIRECTIONS
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.gpu) for case in GPU_CASES)], ids=str)
def test_output_and_gradients_are_those_of_plain_pytorch(case, incoming, small_chunks):
    check(case, incoming)


@pytest.mark.parametrize("case", [Case(9, c=40, h=24, dropout="rows"), Case(10, c=16, h=72, offsets=True)], ids=str)
def test_small_tiles_of_tokens_and_channels_give_the_same(case, small_chunks, monkeypatch):
    want = results(make(case), False)
    for tiles in (Tiles(64, 16, 4, 1), Tiles(16, 32, 4, 1, programs=1)):
        set_tiles(monkeypatch, tiles)
        assert_close(results(make(case), False), want)


@DIRECTIONS
def test_reference_is_the_module_of_the_model(incoming):
    torch.manual_seed(0)
    module = TriangleMultiplication(16, 24, incoming=incoming).to(DEVICE).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.5)
    z = torch.randn(2, 7, 7, 16, device=DEVICE).double()
    mask = torch.rand(2, 7, 7, device=DEVICE) < 0.7
    got = triangle_multiplication(z, mask, TriangleWeights.of(module), incoming=incoming, backend=Backend.REFERENCE)
    torch.testing.assert_close(got, module(z, mask))


def test_offsets_of_a_module_are_taken():
    torch.manual_seed(0)
    module, z, mask = TriangleMultiplication(16, 24), torch.randn(1, 5, 5, 16), torch.ones(1, 5, 5, dtype=torch.bool)
    plain = TriangleWeights.of(module)
    assert plain.offsets is None
    module.linear_g, module.linear_b_p = torch.nn.Linear(16, 16), torch.nn.Linear(16, 24)
    torch.nn.init.normal_(module.linear_z.weight)
    with_offsets = TriangleWeights.of(module)
    update = triangle_multiplication(z, mask, with_offsets, incoming=False, residual=False, backend=Backend.REFERENCE)
    x = module.layer_norm_in(z)
    a = module.linear_a_g(x).sigmoid() * module.linear_a_p(x)
    b = module.linear_b_g(x).sigmoid() * module.linear_b_p(x)
    product = module.layer_norm_out(torch.einsum("zikc,zjkc->zijc", a, b))
    torch.testing.assert_close(update, module.linear_g(x).sigmoid() * module.linear_z(product))


@DIRECTIONS
def test_update_without_the_residual(incoming, small_chunks):
    problem = make(Case(11, c=24, h=16, b=2, dropout="rows", offsets=True))
    truth = results(problem.to(torch.float64), incoming, backend=Backend.REFERENCE, residual=False)
    plain = results(problem, incoming, backend=Backend.REFERENCE, residual=False)
    assert_as_exact(results(problem, incoming, residual=False), plain, truth, FLOOR[torch.float32], MULTIPLES)
    with_z = update(problem.to(torch.float64), incoming, Backend.REFERENCE)
    torch.testing.assert_close(truth["output"], with_z - problem.leaves["z"].double())


@DIRECTIONS
def test_any_strides_give_the_same(incoming, small_chunks):
    problem = make(Case(13, c=16, h=16, b=2, dropout="columns"))
    want = results(problem, incoming)
    leaves = problem.leaves | {"z": problem.leaves["z"].transpose(1, 2).contiguous().transpose(1, 2)}
    spread = replace(
        problem,
        leaves=leaves,
        mask=with_strides(problem.mask, [2, 0, 1]),
        dropout=with_strides(problem.dropout, [3, 1, 0, 2]),
        dy=with_strides(problem.dy, [1, 3, 0, 2]),
    )
    assert_close(results(spread, incoming), want)


def test_broadcast_gradients_are_taken():
    problem = make(Case(5))
    ones = replace(problem, dy=torch.ones_like(problem.dy))
    broadcast = replace(problem, dy=torch.ones((), device=DEVICE).expand(problem.dy.shape))
    assert_identical(results(broadcast, False), results(ones, False))


@DIRECTIONS
@pytest.mark.parametrize("slab_rows", [1, 11, 1000])
def test_slabs_change_nothing(slab_rows, incoming):
    problem = make(Case(21, c=16, h=16, b=2, dropout="columns"))
    got, want = update(problem, incoming, slab_rows=slab_rows), update(problem, incoming)
    assert_close({"output": got}, {"output": want})


@DIRECTIONS
@pytest.mark.parametrize("layout", ["plain", "transposed", "gaps"])
def test_in_place_update_is_that_of_a_new_tensor(layout, incoming):
    problem = make(Case(19, b=2))
    want = update(problem, incoming, slab_rows=8)
    z = problem.leaves["z"]
    match layout:
        case "plain":
            z = z.clone()
        case "transposed":
            z = z.transpose(1, 2).contiguous().transpose(1, 2)
        case "gaps":
            z = torch.nn.functional.pad(z, (0, 16, 1, 2, 3, 4))[:, 3:-4, 1:-2, :16]
    got = update(replace(problem, leaves=problem.leaves | {"z": z}), incoming, slab_rows=8, out=z)
    assert got is z
    assert torch.equal(z, want)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TORCH, Backend.TRITON])
def test_out_may_be_another_tensor(backend):
    problem = make(Case(5))
    want, before = update(problem, False, backend), problem.leaves["z"].clone()
    out = torch.empty_like(before)
    assert update(problem, False, backend, out=out) is out
    assert torch.equal(out, want)
    assert torch.equal(problem.leaves["z"], before)


@DIRECTIONS
@pytest.mark.parametrize("slab_rows", [1, 4, None])
@pytest.mark.parametrize(
    "case",
    [
        Case(9, c=24, h=40, b=2, dropout="rows", offsets=True),
        Case(9, c=16, h=24, bias=False, compute=torch.bfloat16),
        Case(9, dtype=torch.float64),
    ],
    ids=str,
)
def test_slabs_of_plain_pytorch_are_the_reference(case, slab_rows, incoming):
    problem = make(case)
    with torch.autocast(DEVICE, case.compute, enabled=case.compute is not None):
        want = update(problem, incoming, Backend.REFERENCE)
        got = update(problem, incoming, Backend.TORCH, slab_rows=slab_rows)
        update_alone = update(problem, incoming, Backend.TORCH, slab_rows=slab_rows, residual=False)
        z = problem.leaves["z"].clone()
        update(replace(problem, leaves=problem.leaves | {"z": z}), incoming, Backend.TORCH, slab_rows=4, out=z)
    tolerance = 2e-2 if case.compute else 1e-5
    for result in (got, z, problem.leaves["z"] + update_alone):
        torch.testing.assert_close(result, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", [Backend.TORCH, Backend.TRITON])
def test_masked_edges_may_hold_anything(backend):
    problem = make(Case(10))
    problem.mask[:, 2] = False
    problem.mask[:, :, 3] = False
    want = update(problem, False, backend)
    z = problem.leaves["z"].clone()
    z[:, 2, 3] = torch.nan
    got = update(replace(problem, leaves=problem.leaves | {"z": z}), False, backend)
    others = torch.ones(10, 10, dtype=torch.bool, device=DEVICE)
    others[2, 3] = False
    assert torch.equal(got[:, others], want[:, others])


def test_nothing_kept_leaves_the_layer_norm_of_zeros():
    problem = replace(make(Case(6)), mask=torch.zeros(1, 6, 6, dtype=torch.bool, device=DEVICE))
    truth = results(problem.to(torch.float64), False, backend=Backend.REFERENCE)
    plain = results(problem, False, backend=Backend.REFERENCE)
    assert_as_exact(results(problem, False), plain, truth, FLOOR[torch.float32], MULTIPLES)


@DIRECTIONS
def test_repeats_are_identical(incoming, small_chunks):
    problem = make(Case(19, b=2))
    assert_identical(results(problem, incoming), results(problem, incoming))


@pytest.mark.gpu
def test_repeats_are_identical_in_bf16():
    problem = make(Case(300, c=128, h=128, compute=torch.bfloat16))
    with torch.autocast("cuda", torch.bfloat16):
        assert_identical(results(problem, False), results(problem, False))


def test_gradients_keep_the_dtypes_of_parameters():
    problem = make(Case(6, offsets=True))
    leaves = problem.leaves | {"z": problem.leaves["z"].half()}
    mixed = replace(problem, leaves=leaves, dy=problem.dy.half())
    got = results(mixed, False)
    assert got["output"].dtype == got["gradient of z"].dtype == torch.float16
    assert {got[f"gradient of {name}"].dtype for name in NAMES if name != "z"} == {torch.float32}


def operator_arguments(problem: Problem, incoming: bool) -> tuple:
    tensors = [problem.leaves.get(name) for name in NAMES]
    compute = problem.leaves["z"].dtype
    return *tensors, problem.mask, problem.dropout, 1e-5, 1e-4, incoming, True, None, compute


@pytest.mark.parametrize("case", [Case(5, bias=False), Case(5, b=2, dropout="rows", offsets=True)], ids=str)
def test_operators_pass_opcheck(case):
    problem = make(case)
    leaves = {name: x.requires_grad_() for name, x in problem.leaves.items()}
    arguments = operator_arguments(replace(problem, leaves=leaves), False)
    torch.library.opcheck(operator.triangle_multiplication_forward, arguments)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    torch.library.opcheck(operator.triangle_multiplication_into, (torch.zeros_like(problem.dy), *detached))
    backward = problem.dy, *detached[:-2], detached[-1]
    torch.library.opcheck(operator.triangle_multiplication_backward, backward)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_graph_breaks(dynamic):
    problem = make(Case(6, dropout="rows"))
    torch._dynamo.reset()
    engine = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(update, fullgraph=True, dynamic=dynamic, backend=engine)
    assert_identical(results(problem, False, compiled), results(problem, False))


def test_compiles_in_place_under_autocast():
    problem = make(Case(6))
    torch._dynamo.reset()
    engine = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(update, fullgraph=True, backend=engine)
    z = problem.leaves["z"].clone()
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        want = update(problem, False)
        compiled(replace(problem, leaves=problem.leaves | {"z": z}), False, out=z)
    assert torch.equal(z, want)


def test_activation_checkpointing_changes_nothing():
    problem = make(Case(6, dropout="rows"))

    def recomputed(problem: Problem, incoming: bool) -> Tensor:
        return checkpoint(update, problem, incoming, use_reentrant=False)

    assert_identical(results(problem, True, recomputed), results(problem, True))


@pytest.mark.gpu
def test_cuda_graph_replays_forward_and_backward():
    problem = make(Case(130, c=64, h=64, compute=torch.bfloat16))
    leaves = {name: x.requires_grad_() for name, x in problem.leaves.items()}

    def run() -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16):
            out = update(replace(problem, leaves=leaves), False)
        return out, *torch.autograd.grad(out, list(leaves.values()), problem.dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        leaves["z"].mul_(0.5)
    graph.replay()
    for got, want in zip(captured, run(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_memory_is_two_edges_and_a_slab():
    n, c = 512, 128
    problem = make(Case(n, c=c, h=c, dtype=torch.bfloat16))
    z = problem.leaves["z"]
    update(problem, False, out=z, slab_rows=64)  # cuBLAS keeps the workspace of its first product
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    update(problem, False, out=z, slab_rows=64)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= (2 + 64 / n + 0.05) * z.nbytes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: {"z": p["z"][:, :4]}, ValueError, r"z must be \[B, N, N, C\]"),
        (lambda p: {"z": p["z"].long()}, TypeError, "z must be floating point"),
        (lambda p: {"mask": p["mask"].float()}, TypeError, "mask must be torch.bool"),
        (lambda p: {"mask": p["mask"][:, :4]}, ValueError, "mask must be"),
        (lambda p: {"gate": p["gate"][:8]}, ValueError, "weights.gate must be"),
        (lambda p: {"a": p["a"][:8]}, ValueError, "weights.a_gate must be"),
        (lambda p: {"norm_in_weight": p["norm_in_weight"][:8]}, ValueError, "norm.weight must be"),
        (lambda p: {"norm_out_bias": p["norm_out_bias"][:8]}, ValueError, "norm_out.bias must be"),
        (lambda p: {"dropout": p["z"].half()}, TypeError, "dropout must have the dtype of z"),
        (lambda p: {"dropout": p["z"][..., :3]}, ValueError, "dropout must be broadcastable"),
        (lambda p: {"dropout": p["z"].clone().requires_grad_()}, ValueError, "dropout has no gradient"),
        (lambda p: {"out": p["z"].half()}, ValueError, "out must be like z"),
        (lambda p: {"slab_rows": 0}, ValueError, "slab_rows must be"),
        (lambda p: {"z": p["z"].double()}, TypeError, "backend 'triton' takes bf16"),
        (lambda p: {"z": p["z"].transpose(2, 3).contiguous().transpose(2, 3)}, ValueError, "contiguous in memory"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    problem = make(Case(6, c=16, h=16))
    changed = change(problem.leaves | {"mask": problem.mask})
    leaves = problem.leaves | {name: x for name, x in changed.items() if name in NAMES and name != "out"}
    if isinstance(changed.get("out"), Tensor):
        options = {"out": changed["out"]}
    else:
        options = {name: x for name, x in changed.items() if name == "slab_rows"}
    mask, dropout = changed.get("mask", problem.mask), changed.get("dropout")
    with pytest.raises(error, match=message):
        update(replace(problem, leaves=leaves, mask=mask, dropout=dropout), False, **options)


def test_out_is_refused_where_something_requires_a_gradient():
    problem = make(Case(5))
    problem.leaves["gate"].requires_grad_()
    z = problem.leaves["z"]
    with pytest.raises(RuntimeError, match="out is for inference"):
        update(problem, False, out=z)
    with torch.no_grad():
        update(problem, False, out=z)


def test_too_wide_products_are_left_to_pytorch():
    problem = make(Case(3, c=16, h=264))
    with pytest.raises(ValueError, match="C_hidden up to 256"):
        update(problem, False)
    assert torch.equal(update(problem, False, Backend.AUTO), update(problem, False, Backend.REFERENCE))
