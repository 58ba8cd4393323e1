"""What the transitions (SwiGLU with its residual and without, ReLU) have to do: against fp64, in PyTorch, for an H100.

On a CPU the kernels run in Triton's interpreter (``conftest.py``), whose products of bf16 are wrong: there, fp16 stands
for all narrow dtypes.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pairformer_fast.config import Backend
from tests.kernels.cases import DEVICE
from tests.kernels.compiling import compiled_for_sm_90
from tests.kernels.transitions import NARROW, RELU, SWIGLU, UPDATE, Case

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")


@pytest.fixture(params=[SWIGLU, UPDATE, RELU], ids=str)
def op(request):
    return request.param


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
def test_output_and_gradients_are_as_exact_as_plain_pytorch(op, case):
    op.check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("c", [64, 128, 256])
def test_production_sizes_on_a_gpu(op, c):
    bf16 = torch.bfloat16
    op.check(Case((1, 130, 191), c=c, hidden=4 * c, dtype=bf16, parameters=bf16))
    op.check(Case((2, 63, 130), c=c, hidden=4 * c, compute=bf16, transposed=True))
    op.check(Case((1, 1000), c=c, hidden=2 * c, compute=bf16))
    op.check(Case((1, 63, 65), c=c, hidden=2 * c))


def test_gradient_of_a_broadcast_sum(op):
    inputs = op.make(Case((1, 3, 5)))
    got = torch.autograd.grad(op.call(inputs).sum(), inputs["x"])
    want = torch.autograd.grad(op.call(inputs, Backend.REFERENCE).sum(), inputs["x"])
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


def test_repeats_bit_by_bit(op):
    inputs = op.make(Case((1, 9, 30), c=64, hidden=128, compute=NARROW))
    first = op.results(inputs, compute=NARROW)
    for name, x in op.results(inputs, compute=NARROW).items():
        assert torch.equal(x, first[name]), name


def test_many_tokens_are_split_between_programs(op):
    inputs = op.make(Case((1, 4, 401)))
    truth = op.exact(inputs)
    for name, x in op.results(inputs).items():
        torch.testing.assert_close(x, truth[name].float(), atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("case", [Case((1, 3, 5)), Case((2, 7), bias=False, mask=False)], ids=str)
def test_operators_pass_opcheck(op, case):
    inputs = op.make(case)
    operators = torch.ops.pairformer_fast
    forward, backward = (getattr(operators, f"{op.operator}_{direction}") for direction in ("forward", "backward"))
    torch.library.opcheck(forward, op.operator_arguments(inputs))
    torch.library.opcheck(backward, (inputs["dout"], *op.operator_arguments(inputs, detached=True)))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_graph_breaks(op, dynamic):
    inputs = op.make(Case((1, 3, 5), compute=NARROW))
    torch._dynamo.reset()
    engine = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(op.call, fullgraph=True, dynamic=dynamic, backend=engine)
    with torch.autocast(DEVICE, NARROW):
        got, want = compiled(inputs), op.call(inputs)
    assert torch.equal(got, want)
    leaves = [inputs[name] for name in op.leaves]
    gradients = [torch.autograd.grad(y, leaves, inputs["dout"], retain_graph=True) for y in (got, want)]
    assert all(map(torch.equal, *gradients))


def test_activation_checkpointing_changes_nothing(op):
    inputs = op.make(Case((1, 3, 5)))
    got, want = (
        torch.autograd.grad(out, [inputs["x"], inputs[op.leaves[-1]]], inputs["dout"])
        for out in (checkpoint(op.call, inputs, use_reentrant=False), op.call(inputs))
    )
    assert all(map(torch.equal, got, want))


def test_production_kernels_compile_for_sm_90(tmp_path):
    kernels = compiled_for_sm_90("compile_transitions.py", tmp_path)
    names = {f"{op}.{name}" for op in (SWIGLU, RELU) for name in ("forward_kernel", "tokens_kernel", "weights_kernel")}
    assert {kernel["kernel"] for kernel in kernels} == names
    for kernel in kernels:
        assert kernel["copies"], f"no bulk copies: {kernel}"


@pytest.mark.gpu
def test_cuda_graph_replays_forward_and_backward(op):
    inputs = op.make(Case((1, 40, 40), c=128, hidden=512, compute=torch.bfloat16))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op.results(inputs, compute=torch.bfloat16)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op.results(inputs, compute=torch.bfloat16)
    with torch.no_grad():
        inputs["x"].mul_(0.5)
        inputs[next(iter(op.parameters))].mul_(0.5)
    graph.replay()
    for name, x in op.results(inputs, compute=torch.bfloat16).items():
        assert torch.equal(captured[name], x), name
