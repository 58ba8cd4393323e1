"""The transition with ReLU and offsets: against fp64, within PyTorch, and what it refuses.

On a CPU the kernels run in Triton's interpreter (``conftest.py``), whose products of bf16 are wrong: there, fp16 stands
for all narrow dtypes.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pairformer_fast.config import Backend
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.relu_transition import operator, relu_transition
from tests.kernels.cases import DEVICE

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")

NARROW = torch.bfloat16 if DEVICE == "cuda" else torch.float16
LAYERS = ("weight_1", "offset_1", "weight_2", "offset_2")
LEAVES = ("x", "norm_weight", "norm_bias", *LAYERS)

MULTIPLES = {"max": 5.0, "mean": 2.5}
"""Errors allowed, in units of what plain PyTorch loses in the same dtypes."""

SLACK = {torch.float32: 3e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Error allowed beside that, relative to the results, by dtype of the products."""

SHARED_BYTES = 227 * 1024
"""What one block may take on sm_90."""


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
        "weight_1": draw(case.hidden, case.c, scale=(2 / case.c) ** 0.5),
        "offset_1": draw(case.hidden),
        "weight_2": draw(case.c, case.hidden, scale=case.hidden**-0.5),
        "offset_2": draw(case.c),
        "mask": keep.to(DEVICE) if case.mask else None,
        "dout": dout.detach(),
    }


def call(inputs: Inputs, backend: Backend = Backend.TRITON) -> Tensor:
    norm = NormParameters(inputs["norm_weight"], inputs["norm_bias"])
    layers = (inputs[name] for name in LAYERS)
    return relu_transition(inputs["x"], norm, *layers, inputs["mask"], backend=backend)


def results(inputs: Inputs, backend: Backend = Backend.TRITON, compute: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output and all gradients."""
    leaves = {name: inputs[name] for name in LEAVES if inputs[name] is not None}
    with torch.autocast(DEVICE, compute, enabled=compute is not None):
        out = call(inputs, backend)
    gradients = torch.autograd.grad(out, leaves.values(), inputs["dout"])
    return {"out": out.detach()} | {f"gradient of {k}": x for k, x in zip(leaves, gradients, strict=True)}


def exact(inputs: Inputs) -> dict[str, Tensor]:
    """The same in fp64, from its definition."""
    leaves = {k: inputs[k].detach().double().requires_grad_() for k in LEAVES if inputs[k] is not None}
    x, bias = leaves["x"], leaves.get("norm_bias")
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], leaves["norm_weight"], bias, 1e-5)
    hidden = (y @ leaves["weight_1"].T + leaves["offset_1"]).clamp(min=0)
    out = hidden @ leaves["weight_2"].T + leaves["offset_2"]
    out = out if inputs["mask"] is None else out * inputs["mask"][..., None]
    gradients = torch.autograd.grad(out, leaves.values(), inputs["dout"].double())
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
        Case((2, 5, 13), c=24, hidden=40, bias=False),
        Case((2, 3, 7), mask=False, parameters=torch.float16),
        Case((2, 5, 9), transposed=True),
        Case((1, 63), c=24, hidden=96),
        Case((1, 3, 21), c=128, hidden=512),
        Case((1, 17), c=256, hidden=512, mask=False),
        Case((1, 2, 63), dtype=NARROW, parameters=NARROW),
        Case((1, 3, 30), c=64, hidden=264, dtype=NARROW, transposed=True),
        Case((1, 3, 50), c=128, hidden=512, compute=NARROW),
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
    check(Case((1, 63, 65), c=c, hidden=2 * c))


def test_update_of_masked_tokens_is_zero():
    inputs = make(Case((2, 4, 9)))
    for backend in (Backend.TRITON, Backend.REFERENCE):
        assert not call(inputs, backend)[~inputs["mask"]].any()


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
    truth = exact(inputs)
    for name, x in results(inputs).items():
        torch.testing.assert_close(x, truth[name].float(), atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("case", [Case((1, 3, 5)), Case((2, 7), bias=False, mask=False)], ids=str)
def test_operators_pass_opcheck(case):
    inputs = make(case)
    tensors = [inputs[name] for name in (*LEAVES, "mask")]
    detached = [None if x is None else x.detach() for x in tensors]
    torch.library.opcheck(operator.relu_transition_forward, (*tensors, 1e-5, torch.float32))
    torch.library.opcheck(operator.relu_transition_backward, (inputs["dout"], *detached, 1e-5, torch.float32))


def test_compiles_without_graph_breaks():
    inputs = make(Case((1, 3, 5), compute=NARROW))
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    with torch.autocast(DEVICE, NARROW):
        got, want = compiled(inputs), call(inputs)
    assert torch.equal(got, want)
    for x in ("x", "offset_1"):
        gradients = (torch.autograd.grad(y, inputs[x], inputs["dout"], retain_graph=True)[0] for y in (got, want))
        assert torch.equal(*gradients)


def test_activation_checkpointing_changes_nothing():
    inputs = make(Case((1, 3, 5)))
    got, want = (
        torch.autograd.grad(out, [inputs["x"], inputs["offset_2"]], inputs["dout"])
        for out in (checkpoint(call, inputs, use_reentrant=False), call(inputs))
    )
    assert all(map(torch.equal, got, want))


def test_production_kernels_compile_for_sm_90(tmp_path):
    script = Path(__file__).with_name("compile_relu_transition.py")
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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 16)}, ValueError, r"x must be \[B, I, J, C\]"),
        ({"norm_weight": torch.zeros(15)}, ValueError, r"norm.weight must be \[C\] = \[16\]"),
        ({"weight_1": torch.zeros(64, 15)}, ValueError, r"weight_1 must be \[hidden, C\] = \[hidden, 16\]"),
        ({"offset_1": torch.zeros(63)}, ValueError, r"offset_1 must be \[hidden\] = \[64\]"),
        ({"weight_2": torch.zeros(64, 16)}, ValueError, r"weight_2 must be \[C, hidden\] = \[16, 64\]"),
        ({"offset_2": torch.zeros(16, dtype=torch.int64)}, TypeError, "offset_2 must be floating point"),
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
    odd = make(Case((1, 3, 5), hidden=60))
    with pytest.raises(ValueError, match="multiples of 8"):
        call(odd)
    assert torch.equal(call(odd, Backend.AUTO), call(odd, Backend.REFERENCE))
