"""The SwiGLU transition with its residual: against fp64, within PyTorch, and what it refuses.

On a CPU the kernels run in Triton's interpreter (``conftest.py``), whose products of bf16 are wrong: there, fp16 stands
for all narrow dtypes.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pairformer_fast.config import Backend
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.transition import operator, transition
from tests.kernels.cases import DEVICE

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")

NARROW = torch.bfloat16 if DEVICE == "cuda" else torch.float16
PARAMETERS = ("norm_weight", "norm_bias", "a_weight", "b_weight", "out_weight")

MULTIPLES = {"max": 5.0, "mean": 2.5}
"""Errors allowed, in units of what plain PyTorch loses in the same dtypes."""

SHARED_BYTES = 227 * 1024
"""What one block may take on sm_90."""

SLACK = {torch.float32: 3e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Error allowed beside that, relative to the results, by dtype of the products."""


@dataclass(frozen=True)
class Case:
    """Sizes, dtypes and features of one problem."""

    shape: tuple[int, ...]
    c: int = 16
    hidden: int = 64
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype = torch.float32
    compute: torch.dtype | None = None
    bias: bool = True
    mask: bool = True
    transposed: bool = False

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        dtypes = [str(x).removeprefix("torch.") for x in (self.dtype, self.compute) if x is not None]
        flags = [name for name in ("bias", "mask", "transposed") if getattr(self, name)]
        return "-".join([sizes, f"C{self.c}", f"H{self.hidden}", *dtypes, *flags])


Inputs = dict[str, Tensor | None]


def make(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = case.parameters) -> Tensor:
        x = torch.randn(*size, generator=generator, dtype=torch.float64) * scale
        return x.to(DEVICE, dtype).requires_grad_()

    def tokens() -> Tensor:
        if not case.transposed:
            return draw(*case.shape, case.c, dtype=case.dtype)
        b, i, j = case.shape
        wide = draw(b, j, i + 3, case.c, dtype=case.dtype).detach()
        return wide[:, :, 1 : i + 1].transpose(1, 2).requires_grad_()

    x, dout = tokens(), tokens()
    keep = torch.rand(*case.shape, generator=generator) < 0.7
    keep[..., -1] = False
    return {
        "x": x,
        "norm_weight": draw(case.c),
        "norm_bias": draw(case.c) if case.bias else None,
        "a_weight": draw(case.hidden, case.c, scale=(2 / case.c) ** 0.5),
        "b_weight": draw(case.hidden, case.c, scale=case.c**-0.5),
        "out_weight": draw(case.c, case.hidden, scale=case.hidden**-0.5),
        "mask": keep.to(DEVICE) if case.mask else None,
        "dout": dout.detach(),
    }


def arguments(inputs: Inputs) -> tuple:
    norm = NormParameters(inputs["norm_weight"], inputs["norm_bias"])
    return inputs["x"], norm, *(inputs[name] for name in (*PARAMETERS[2:], "mask"))


def call(inputs: Inputs, backend: Backend = Backend.TRITON, out: Tensor | None = None) -> Tensor:
    return transition(*arguments(inputs), out=out, backend=backend)


def results(inputs: Inputs, backend: Backend = Backend.TRITON, compute: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output and all gradients."""
    leaves = {name: inputs[name] for name in ("x", *PARAMETERS) if inputs[name] is not None}
    with torch.autocast(DEVICE, compute, enabled=compute is not None):
        out = call(inputs, backend)
    gradients = torch.autograd.grad(out, leaves.values(), inputs["dout"])
    return {"out": out.detach()} | {f"gradient of {k}": x for k, x in zip(leaves, gradients, strict=True)}


def exact(inputs: Inputs) -> dict[str, Tensor]:
    """The same in fp64, from its definition."""
    leaves = {k: x.detach().double().requires_grad_() for k, x in inputs.items() if x is not None and k != "mask"}
    dout = leaves.pop("dout").detach()
    x, bias = leaves["x"], leaves.get("norm_bias")
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], leaves["norm_weight"], bias, 1e-5)
    hidden = torch.nn.functional.silu(y @ leaves["a_weight"].T) * (y @ leaves["b_weight"].T)
    update = hidden @ leaves["out_weight"].T
    out = x + (update if inputs["mask"] is None else update * inputs["mask"][..., None])
    gradients = torch.autograd.grad(out, leaves.values(), dout)
    return {"out": out.detach()} | {f"gradient of {k}": g for k, g in zip(leaves, gradients, strict=True)}


def check(case: Case) -> None:
    inputs = make(case)
    truth, got = exact(inputs), results(inputs, compute=case.compute)
    plain = results(inputs, Backend.REFERENCE, case.compute)
    assert got.keys() == truth.keys()
    for name, want in truth.items():
        assert got[name].dtype == plain[name].dtype, name
        assert got[name].shape == want.shape, name
        assert got[name].isfinite().all(), name
        error, loss = (got[name].double() - want).abs(), (plain[name].double() - want).abs()
        slack = SLACK[case.compute or case.dtype]
        for kind, measure in (("max", torch.max), ("mean", torch.mean)):
            allowed = MULTIPLES[kind] * measure(loss) + slack * measure(want.abs())
            assert measure(error) <= allowed, f"{name}: {kind} {measure(error):.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 1, 1)),
        Case((1, 17, 3)),
        Case((2, 5, 13), c=24, hidden=40, bias=False),
        Case((2, 3, 7), mask=False, parameters=torch.float16),
        Case((2, 5, 9), transposed=True),
        Case((1, 63), c=24, hidden=96),
        Case((1, 1, 130), c=64, hidden=256),
        Case((1, 3, 21), c=128, hidden=512),
        Case((1, 17), c=256, hidden=512, mask=False),
        Case((1, 2, 63), dtype=NARROW, parameters=NARROW),
        Case((1, 3, 30), c=64, hidden=264, dtype=NARROW, transposed=True),
        Case((1, 3, 50), c=128, hidden=512, compute=NARROW),
        Case((1, 2, 17), c=256, hidden=1024, compute=NARROW),
        Case((1, 40), c=384, hidden=1536, dtype=NARROW),
    ],
    ids=str,
)
def test_output_and_gradients_are_as_exact_as_plain_pytorch(case):
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("c", [64, 128, 256])
def test_production_sizes_on_a_gpu(c):
    bf16 = torch.bfloat16
    check(Case((1, 130, 191), c=c, hidden=4 * c, dtype=bf16, parameters=bf16))
    check(Case((2, 63, 130), c=c, hidden=4 * c, compute=bf16, transposed=True))
    check(Case((1, 1000), c=c, hidden=2 * c, compute=bf16))


@pytest.mark.gpu
def test_tokens_beyond_31_bits():
    case = Case((1, 4100, 4100), c=128, hidden=256, dtype=torch.bfloat16)
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    inputs = make(replace(case, shape=(1, 2, 4100)))
    x = inputs["x"].detach()
    whole = torch.zeros(1, 4100, 4100, 128, dtype=torch.bfloat16, device=DEVICE)
    mask = torch.zeros(1, 4100, 4100, dtype=torch.bool, device=DEVICE)
    whole[:, -2:], mask[:, -2:] = x, inputs["mask"]
    with torch.no_grad():
        got = call(inputs | {"x": whole, "mask": mask}, out=whole)
        assert torch.equal(got[:, -2:], call(inputs | {"x": x}))
        assert not got[:, :-2].any()


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_in_place_on_a_slab_is_the_same_and_leaves_the_rest(transposed):
    inputs = make(Case((2, 7, 9), transposed=transposed))
    inputs = {name: None if x is None else x.detach() for name, x in inputs.items()}
    want = call(inputs)
    z = inputs["x"]
    z.copy_(before := z.clone())
    slab = inputs | {"x": z[:, 2:5], "mask": inputs["mask"][:, 2:5]}
    out = call(slab, out=slab["x"])
    assert out is slab["x"]
    assert torch.equal(z[:, 2:5], want[:, 2:5])
    assert torch.equal(z[:, :2], before[:, :2])
    assert torch.equal(z[:, 5:], before[:, 5:])


@pytest.mark.parametrize("backend", [Backend.TRITON, Backend.REFERENCE])
def test_result_is_written_to_out(backend):
    inputs = make(Case((1, 3, 5)))
    x, out = inputs["x"], torch.empty_like(inputs["x"])
    before = x.detach().clone()
    with torch.no_grad():
        assert call(inputs, backend, out=out) is out
        assert torch.equal(out, call(inputs, backend))
    assert torch.equal(x, before)


def test_masked_tokens_are_returned_as_they_are():
    inputs = make(Case((2, 4, 9), dtype=NARROW))
    out, dropped = call(inputs), ~inputs["mask"]
    assert torch.equal(out[dropped], inputs["x"][dropped])
    assert not torch.equal(out, inputs["x"])
    (gradient,) = torch.autograd.grad(out, inputs["x"], inputs["dout"])
    assert torch.equal(gradient[dropped], inputs["dout"][dropped])


def test_gradient_of_a_broadcast_sum():
    inputs = make(Case((1, 3, 5)))
    got = torch.autograd.grad(call(inputs).sum(), inputs["x"])
    want = torch.autograd.grad(call(inputs, Backend.REFERENCE).sum(), inputs["x"])
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


def test_repeats_bit_by_bit():
    inputs = make(Case((1, 9, 30), c=64, hidden=128, compute=NARROW))
    first = results(inputs, compute=NARROW)
    for name, x in results(inputs, compute=NARROW).items():
        assert torch.equal(x, first[name]), name


def test_many_tokens_are_split_between_programs():
    inputs = make(Case((1, 4, 401)))
    for name, x in results(inputs).items():
        torch.testing.assert_close(x, exact(inputs)[name].float(), atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m)


def operator_inputs(inputs: Inputs, *, detached: bool = False) -> tuple:
    names = ("x", *PARAMETERS, "mask")
    tensors = [None if inputs[name] is None else inputs[name].detach() for name in names]
    return (*(tensors if detached else [inputs[name] for name in names]), 1e-5, torch.float32)


@pytest.mark.parametrize("case", [Case((1, 3, 5)), Case((2, 7), bias=False, mask=False)], ids=str)
def test_operators_pass_opcheck(case):
    inputs = make(case)
    detached = operator_inputs(inputs, detached=True)
    torch.library.opcheck(operator.transition_forward, operator_inputs(inputs))
    torch.library.opcheck(operator.transition_into, (torch.zeros_like(detached[0]), *detached))
    torch.library.opcheck(operator.transition_backward, (inputs["dout"], *detached))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_graph_breaks(dynamic):
    inputs = make(Case((1, 3, 5), compute=NARROW))
    torch._dynamo.reset()
    compiled = torch.compile(
        call, fullgraph=True, dynamic=dynamic, backend="inductor" if DEVICE == "cuda" else "aot_eager"
    )
    with torch.autocast(DEVICE, NARROW):
        got, want = compiled(inputs), call(inputs)
    assert torch.equal(got, want)
    for x in ("x", "a_weight"):
        gradients = (torch.autograd.grad(y, inputs[x], inputs["dout"], retain_graph=True)[0] for y in (got, want))
        assert torch.equal(*gradients)


def test_in_place_compiles():
    inputs = {name: None if x is None else x.detach() for name, x in make(Case((1, 3, 5))).items()}
    want, z = call(inputs), inputs["x"].clone()
    torch._dynamo.reset()
    engine = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(lambda z: call(inputs | {"x": z}, out=z) * 2, fullgraph=True, backend=engine)
    assert torch.equal(compiled(z), want * 2)
    assert torch.equal(z, want)


def test_activation_checkpointing_changes_nothing():
    inputs = make(Case((1, 3, 5)))
    got, want = (
        torch.autograd.grad(out, [inputs["x"], inputs["out_weight"]], inputs["dout"])
        for out in (checkpoint(call, inputs, use_reentrant=False), call(inputs))
    )
    assert all(map(torch.equal, got, want))


def test_production_kernels_compile_for_sm_90(tmp_path):
    script = Path(__file__).with_name("compile_transition.py")
    # The interpreter that the other tests use leaves no compiler; a cache of its own, so that it compiles.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == {"forward_kernel", "tokens_kernel", "weights_kernel"}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_BYTES, kernel
        assert kernel["wgmma"], f"no tensor core products: {kernel}"
        assert kernel["copies"], f"no bulk copies: {kernel}"
        assert not kernel["overwritten"], f"miscompiled: {kernel}"


@pytest.mark.gpu
def test_cuda_graph_replays_forward_and_backward():
    inputs = make(Case((1, 40, 40), c=128, hidden=512, compute=torch.bfloat16))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(inputs, compute=torch.bfloat16)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(inputs, compute=torch.bfloat16)
    with torch.no_grad():
        inputs["x"].mul_(0.5)
        inputs["a_weight"].mul_(0.5)
    graph.replay()
    for name, x in results(inputs, compute=torch.bfloat16).items():
        assert torch.equal(captured[name], x), name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 16)}, ValueError, r"x must be \[B, I, J, C\]"),
        ({"x": torch.zeros(1, 0, 5, 16)}, ValueError, "no empty dimension"),
        ({"norm_weight": torch.zeros(15)}, ValueError, r"norm.weight must be \[C\] = \[16\]"),
        ({"a_weight": torch.zeros(64, 15)}, ValueError, r"a_weight must be \[hidden, C\] = \[hidden, 16\]"),
        ({"b_weight": torch.zeros(63, 16)}, ValueError, "b_weight must have the shape of a_weight"),
        ({"out_weight": torch.zeros(64, 16)}, ValueError, r"out_weight must be \[C, hidden\] = \[16, 64\]"),
        ({"out_weight": torch.zeros(16, 64, dtype=torch.int64)}, TypeError, "out_weight must be floating point"),
        ({"mask": torch.ones(1, 3, 5)}, TypeError, "mask > 0.5"),
        ({"mask": torch.ones(1, 3, 4, dtype=torch.bool)}, ValueError, r"mask must be \[1, 3, 5\]"),
        ({"mask": torch.ones(1, 3, 5, dtype=torch.bool, device="meta")}, ValueError, "mask must be on the device"),
    ],
)
def test_misfits_are_named(change, error, message):
    change = {name: x if x.is_meta else x.to(DEVICE) for name, x in change.items()}
    with pytest.raises(error, match=message):
        call(make(Case((1, 3, 5))) | change)


def test_kernels_refuse_what_they_cannot_take():
    inputs = make(Case((1, 3, 5)))
    odd = {name: torch.zeros(size, device=DEVICE) for name, size in (("a_weight", (60, 16)), ("b_weight", (60, 16)))}
    odd = inputs | odd | {"out_weight": torch.zeros(16, 60, device=DEVICE)}
    with pytest.raises(ValueError, match="multiples of 8"):
        call(odd)
    assert torch.equal(call(odd, Backend.AUTO), inputs["x"])
    strided = torch.zeros(1, 3, 5, 32, device=DEVICE)[..., ::2]
    with pytest.raises(ValueError, match="contiguous"):
        call(inputs | {"x": strided})
    with torch.no_grad(), pytest.raises(ValueError, match="out with contiguous channels"):
        call(inputs, out=strided)


def test_out_is_refused_where_it_does_not_fit_or_a_gradient_is_needed():
    inputs = make(Case((1, 3, 5)))
    x = inputs["x"].detach()
    with pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
        call(inputs | {"x": x}, out=x)
    with torch.no_grad():
        with pytest.raises(ValueError, match="out must have the shape of x"):
            call(inputs, out=x[:, 1:])
        with pytest.raises(TypeError, match="out must have the dtype of x"):
            call(inputs, out=x.double())
