"""The SwiGLU transition beside what ``test_transitions.py`` asks of it: in place, to given memory, what it refuses."""

from dataclasses import replace

import pytest
import torch

from pairformer_fast.config import Backend
from pairformer_fast.kernels.transition import operator
from tests.kernels.cases import DEVICE
from tests.kernels.transitions import NARROW, SWIGLU, UPDATE, Case

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")

call, make = SWIGLU.call, SWIGLU.make


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


@pytest.mark.parametrize("backend", [Backend.TRITON, Backend.REFERENCE])
def test_update_alone_is_what_the_residual_is_added_to(backend):
    inputs = make(Case((2, 4, 9), transposed=True))
    x = inputs["x"].detach().clone()
    with torch.no_grad():
        update, whole = UPDATE.call(inputs, backend), call(inputs, backend)
        assert torch.equal(x + update, whole)
        assert update[inputs["mask"]].abs().min() > 0
        assert not update[~inputs["mask"]].any()
        assert UPDATE.call(inputs, backend, out=inputs["x"]) is inputs["x"]
    assert torch.equal(inputs["x"], update)


@pytest.mark.parametrize("op", [SWIGLU, UPDATE], ids=str)
@pytest.mark.parametrize("case", [Case((1, 3, 5)), Case((2, 7), bias=False, mask=False)], ids=str)
def test_operator_that_writes_to_out_passes_opcheck(op, case):
    arguments = op.operator_arguments(op.make(case), detached=True)
    torch.library.opcheck(operator.transition_into, (torch.zeros_like(arguments[0]), *arguments))


def test_in_place_compiles():
    inputs = {name: None if x is None else x.detach() for name, x in make(Case((1, 3, 5))).items()}
    want, z = call(inputs), inputs["x"].clone()
    torch._dynamo.reset()
    engine = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(lambda z: call(inputs | {"x": z}, out=z) * 2, fullgraph=True, backend=engine)
    assert torch.equal(compiled(z), want * 2)
    assert torch.equal(z, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 16)}, ValueError, r"x must be \[B, I, J, C\]"),
        ({"x": torch.zeros(1, 0, 5, 16)}, ValueError, "no empty dimension"),
        ({"norm_weight": torch.zeros(15)}, ValueError, r"norm.weight must be \[C\] = \[16\]"),
        ({"a_weight": torch.zeros(64, 15)}, ValueError, r"a_weight must be \[hidden, C\] = \[hidden, 16\]"),
        ({"b_weight": torch.zeros(63, 16)}, ValueError, r"b_weight must be \[hidden, C\] = \[64, 16\]"),
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
