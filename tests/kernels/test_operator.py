"""The operator of the Triton kernels within PyTorch: opcheck, compilation, checkpointing, CUDA graphs.

On a CPU the kernels run in Triton's interpreter (``conftest.py``).
"""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pairformer_fast.config import Backend
from pairformer_fast.kernels.flash_bias import Factors, flash_bias_attention, operator

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")

KINDS = ["none", "dense", "factors", "everything"]
LEAVES = ("q", "k", "v", "bias", "phi_q", "phi_k", "table", "dense", "gate")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    return request.param


def make_inputs(kind: str, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, rows, queries, keys, heads, dim, rank = 1, 2, 5, 7, 2, 8, 3

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device).requires_grad_()

    def flags(*size: int) -> Tensor:
        return (torch.rand(*size, generator=generator) < 0.6).to(device)

    inputs = {
        name: draw(batch, rows, length, heads, dim) for name, length in zip("qkv", (queries, keys, keys), strict=True)
    }
    if kind == "dense":
        inputs["bias"] = draw(batch, heads, queries, keys)
    if kind in ("factors", "everything"):
        inputs |= {"phi_q": draw(batch, heads, queries, rank), "phi_k": draw(batch, heads, keys, rank)}
    if kind == "everything":
        inputs |= {"table": draw(heads, 5), "gate": draw(batch, rows, queries, heads, dim)}
        inputs |= {"dense": draw(batch, heads, queries, keys), "dense_tiles": flags(batch, heads, 1, 1)}
        inputs |= {"mask": flags(batch, rows, keys), "pair_mask": flags(batch, queries, keys)}
        inputs["mask"][0, 0] = False
    return inputs


def attend(inputs: dict[str, Tensor], backend: Backend = Backend.TRITON) -> tuple[Tensor, Tensor]:
    bias: Tensor | Factors | None = inputs.get("bias")
    if "phi_q" in inputs:
        parts = {name: inputs.get(name) for name in ("table", "dense", "dense_tiles")}
        bias = Factors(inputs["phi_q"], inputs["phi_k"], **parts)
    masks = {name: inputs.get(name) for name in ("mask", "pair_mask", "gate")}
    return flash_bias_attention(*(inputs[x] for x in "qkv"), bias, backend=backend, return_lse=True, **masks)


def loss(out: Tensor, lse: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
    return (out * weight).sum() + lse.masked_fill(lse.isinf(), 0).sin().sum()


def gradients(inputs: dict[str, Tensor], function=attend) -> dict[str, Tensor]:
    leaves = {name: inputs[name] for name in LEAVES if name in inputs}
    return dict(zip(leaves, torch.autograd.grad(loss(*function(inputs)), leaves.values()), strict=True))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert torch.equal(gradient, want[name]), f"gradient of {name}"


def assert_close(name: str, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5, msg=lambda text: f"{name}: {text}")


def operator_arguments(inputs: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    names = ("q", "k", "v", "dense", "phi_q", "phi_k", "table", "dense_tiles", "mask", "pair_mask", "gate")
    return tuple(inputs.get("bias") if name == "dense" and "bias" in inputs else inputs.get(name) for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_those_of_the_reference(kind, device):
    inputs = make_inputs(kind, device)
    for name, got, want in zip(["out", "lse"], attend(inputs), attend(inputs, Backend.REFERENCE), strict=True):
        assert_close(name, got, want)
    want = gradients(inputs, lambda inputs: attend(inputs, Backend.REFERENCE))
    for name, got in gradients(inputs).items():
        assert_close(name, got, want[name])


@pytest.mark.parametrize("layout", ["single", "several_leading_dimensions"])
def test_other_layouts_are_those_of_the_reference(layout, device):
    inputs = make_inputs("everything", device)
    for name in inputs.keys() - {"table"}:
        x = inputs[name].detach()
        if layout != "single":
            x = torch.stack([x, x.flip(-1)])
        elif name in ("q", "k", "v", "mask", "gate"):
            x = x[:, -1]
        inputs[name] = x.requires_grad_(x.is_floating_point())
    want = gradients(inputs, lambda inputs: attend(inputs, Backend.REFERENCE))
    for name, got in gradients(inputs).items():
        assert_close(name, got, want[name])


def test_factors_too_wide_for_the_kernel_become_a_table(device):
    inputs = make_inputs("everything", device)
    for name in ("phi_q", "phi_k"):
        wide = inputs[name].detach().repeat(1, 1, 1, 44)[..., : operator.MAX_RANK + 1]
        inputs[name] = (wide / 6).requires_grad_()
    want = gradients(inputs, lambda inputs: attend(inputs, Backend.REFERENCE))
    for name, got in gradients(inputs, torch.autocast(device, torch.bfloat16)(attend)).items():
        assert_close(name, got, want[name])


@pytest.mark.parametrize("kind", ["dense", "everything"])
def test_forward_operator_passes_opcheck(kind, device):
    torch.library.opcheck(operator.flash_bias_forward, operator_arguments(make_inputs(kind, device)))


@pytest.mark.parametrize("kind", ["dense", "everything"])
def test_backward_operator_passes_opcheck(kind, device):
    arguments = [x if x is None else x.detach() for x in operator_arguments(make_inputs(kind, device))]
    out, lse = operator.flash_bias_forward(*arguments)
    dlse = torch.ones_like(lse) if kind == "everything" else None
    needs = [True, False, True, True, *([kind == "everything"] * 4)]
    torch.library.opcheck(operator.flash_bias_backward, (out.clone(), dlse, out, lse, *arguments, needs))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", ["dense", "everything"])
def test_compiles_without_graph_breaks(kind, dynamic, device):
    inputs = make_inputs(kind, device)
    engine = "inductor" if device == "cuda" else "aot_eager"
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend=engine)
    for got, want in zip(compiled(inputs), attend(inputs), strict=True):
        assert torch.equal(got, want)
    assert_same(gradients(inputs, compiled), gradients(inputs))


@pytest.mark.parametrize("kind", ["none", "everything"])
def test_activation_checkpointing_changes_nothing(kind, device):
    inputs = make_inputs(kind, device)
    recomputed = gradients(inputs, lambda inputs: checkpoint(attend, inputs, use_reentrant=False))
    assert_same(recomputed, gradients(inputs))


def test_autocast_changes_nothing(device):
    inputs = make_inputs("everything", device)
    want = gradients(inputs)
    with torch.autocast(device, torch.bfloat16):
        assert_same(gradients(inputs), want)


@pytest.mark.parametrize("wanted", [("q",), ("k", "table"), ("phi_k", "gate"), ("v", "dense")], ids="+".join)
def test_only_gradients_that_are_needed_are_computed(wanted, device):
    inputs = make_inputs("everything", device)
    want = gradients(inputs)
    computed = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.pairformer_fast.flash_bias_backward.default:
                computed.append(len(result))
            return result

    partial = {name: x if name in wanted or not x.is_floating_point() else x.detach() for name, x in inputs.items()}
    leaves = {name: partial[name] for name in LEAVES if name in wanted}
    with Recorder():
        got = torch.autograd.grad(loss(*attend(partial)), leaves.values())
    assert_same(dict(zip(leaves, got, strict=True)), {name: want[name] for name in leaves})
    assert computed == [len(wanted)]


@pytest.mark.parametrize("index", [0, 1], ids=["output", "lse"])
def test_either_result_may_go_unused(index, device):
    inputs = make_inputs("factors", device)
    names = ["q", "k", "phi_q", "phi_k"]
    got, want = (
        torch.autograd.grad(attend(inputs, backend)[index].sin().sum(), [inputs[name] for name in names])
        for backend in (Backend.TRITON, Backend.REFERENCE)
    )
    for name, of_triton, of_reference in zip(names, got, want, strict=True):
        assert_close(name, of_triton, of_reference)


def test_second_derivatives_are_refused(device):
    inputs = make_inputs("none", device)
    out, _ = attend(inputs)
    (gradient,) = torch.autograd.grad(out.sin().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="flash_bias_backward"):
        gradient.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graph_replays_forward_and_backward(kind):
    inputs = make_inputs(kind, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(inputs)
    with torch.no_grad():
        inputs["q"].mul_(0.5)
    graph.replay()
    assert_same(captured, gradients(inputs))
