"""flash_bias_attention against an independent fp64 oracle that drops masked keys by indexing."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from pairformer_fast.config import Backend
from pairformer_fast.kernels.flash_bias import Factors, flash_bias_attention, reference

BACKENDS = [Backend.REFERENCE, Backend.TORCH]
TRIANGLE_SHAPES = [(1, 1, 1, 2, 8), (2, 17, 17, 2, 24), (1, 5, 63, 2, 32)]
SINGLE_SHAPES = [(1, 1, 2, 8), (2, 17, 3, 24), (1, 63, 4, 24)]
MASKS = ["none", "full", "padded", "holes", "empty_rows"]
BIASES = ["none", "dense", "factors"]


def shape_id(shape):
    return "-".join(
        f"{letter}{size}" for letter, size in zip("BINHD" if len(shape) == 5 else "BNHD", shape, strict=True)
    )


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    tables: dict[str, Tensor]
    mask: Tensor | None

    def leaves(self) -> dict[str, Tensor]:
        return {"q": self.q, "k": self.k, "v": self.v, **self.tables}

    def to(self, dtype: torch.dtype) -> "Case":
        """Leaves of the same values, recording gradients, in another dtype."""
        q, k, v, *tables = (x.detach().to(dtype).requires_grad_() for x in self.leaves().values())
        return Case(q, k, v, dict(zip(self.tables, tables, strict=True)), self.mask)

    def attend(self, backend: Backend) -> Tensor:
        bias = Factors(**self.tables) if "phi_q" in self.tables else self.tables.get("bias")
        return flash_bias_attention(self.q, self.k, self.v, bias, self.mask, backend)


def make_case(shape, bias="none", mask="none", dtype=torch.float64, rank=5, seed=0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    batch, tokens, heads = shape[0], shape[-3], shape[-2]
    tables = {}
    if bias == "dense":
        tables = {"bias": draw(batch, heads, tokens, tokens)}
    elif bias == "factors":
        tables = {"phi_q": draw(batch, heads, tokens, rank), "phi_k": draw(batch, heads, tokens, rank)}
    return Case(*(draw(*shape) for _ in range(3)), tables, make_mask(mask, shape[:-2], generator))


def make_mask(kind, shape, generator):
    if kind == "none":
        return None
    mask = torch.ones(shape, dtype=torch.bool)
    if kind == "padded":
        mask[-1, ..., max(1, shape[-1] // 2) :] = False
    elif kind in ("holes", "empty_rows"):
        mask = torch.rand(shape, generator=generator) < 0.6
        mask[..., 0] = True
    if kind == "empty_rows":
        mask[-1 if len(shape) == 2 else (slice(None), -1)] = False
    return mask


def oracle(case: Case) -> Tensor:
    q, k, v = (x if x.ndim == 5 else x.unsqueeze(1) for x in (case.q, case.k, case.v))
    mask = case.mask
    if mask is None:
        mask = torch.ones(case.q.shape[:-2], dtype=torch.bool)
    mask = mask.reshape(q.shape[:3])
    bias = case.tables.get("bias")
    if "phi_q" in case.tables:
        bias = case.tables["phi_q"] @ case.tables["phi_k"].mT
    heads = []
    for b, i, h in product(range(q.shape[0]), range(q.shape[1]), range(q.shape[3])):
        keys = mask[b, i].nonzero().squeeze(1)
        logits = q[b, i, :, h] @ k[b, i, keys, h].T / q.shape[-1] ** 0.5
        if bias is not None:
            logits = logits + bias[b, h][:, keys]
        heads.append(logits.softmax(-1) @ v[b, i, keys, h])
    out = torch.stack(heads).reshape(*q.shape[:2], q.shape[3], q.shape[2], q.shape[4]).transpose(2, 3)
    return out.reshape(case.q.shape)


def assert_close(name, got, want, max_error, mean_error):
    assert got.isfinite().all(), f"{name} is not finite"
    error = (got.double() - want.double()).abs()
    scale = max(1.0, want.abs().max().item())
    assert error.max() <= max_error * scale, f"{name}: max error {error.max():.2e} at scale {scale:.2e}"
    assert error.mean() <= mean_error * scale, f"{name}: mean error {error.mean():.2e} at scale {scale:.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", TRIANGLE_SHAPES + SINGLE_SHAPES, ids=shape_id)
def test_forward_and_gradients_match_oracle(shape, mask, bias, backend, dtype):
    case = make_case(shape, bias, mask, dtype)
    truth = case.to(torch.float64)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    max_error, mean_error = (1e-12, 1e-13) if dtype == torch.float64 else (1e-5, 1e-6)

    out, want = case.attend(backend), oracle(truth)
    assert out.dtype == dtype
    assert out.shape == case.q.shape
    assert_close("output", out, want, max_error, mean_error)

    grads = torch.autograd.grad((out * weight).sum(), case.leaves().values())
    wants = torch.autograd.grad((want * weight.double()).sum(), truth.leaves().values())
    for name, got, want in zip(case.leaves(), grads, wants, strict=True):
        assert_close(f"gradient of {name}", got, want, max_error, mean_error)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("shape", [(2, 4, 17, 2, 24), (2, 17, 2, 24)], ids=shape_id)
def test_rows_without_keys_give_zeros_and_zero_gradients(shape, bias, backend):
    case = make_case(shape, bias, "empty_rows", torch.float32)
    out = case.attend(backend)
    empty = ~case.mask.any(-1)
    assert empty.any()
    assert (out[empty] == 0).all()
    for name, grad in zip(case.leaves(), torch.autograd.grad(out[empty].sum(), case.leaves().values()), strict=True):
        assert (grad == 0).all(), f"gradient of {name}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", BIASES)
def test_masked_keys_have_no_influence_and_no_gradient(bias, backend):
    case = make_case((2, 4, 17, 2, 24), bias, "holes", torch.float32)
    out = case.attend(backend)
    dropped = ~case.mask
    for grad in torch.autograd.grad(out.sum(), (case.k, case.v)):
        assert (grad[dropped] == 0).all()
    with torch.no_grad():
        case.k[dropped] = 1e3
        case.v[dropped] = -1e3
        torch.testing.assert_close(case.attend(backend), out, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", ["none", "holes", "empty_rows"])
def test_half_precision(mask, bias, backend, dtype):
    case = make_case((2, 5, 63, 2, 32), bias, mask, dtype)
    step = torch.finfo(dtype).eps
    with torch.no_grad():
        assert_close("output", case.attend(backend), oracle(case.to(torch.float64)), 6 * step, step)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_bias_is_exact_argmax(backend):
    case = make_case((1, 3, 17, 2, 8), "dense", "holes", torch.float32)
    with torch.no_grad():
        case.tables["bias"].mul_(1e4)
        assert_close("output", case.attend(backend), oracle(case.to(torch.float64)), 1e-5, 1e-6)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", ["none", "empty_rows"])
def test_gradcheck_of_reference(bias, mask):
    case = make_case((2, 3, 4, 2, 3), bias, mask, rank=2)

    def attend(q, k, v, *tables):
        return Case(q, k, v, dict(zip(case.tables, tables, strict=True)), case.mask).attend(Backend.REFERENCE)

    assert torch.autograd.gradcheck(attend, tuple(case.leaves().values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", ["none", "holes"])
def test_strides_do_not_matter(mask, bias, backend):
    """Ending-node attention transposes the pair representation; biases and masks come permuted or expanded."""
    case = make_case((2, 17, 17, 2, 24), bias, mask, torch.float32)
    with torch.no_grad():
        want = case.attend(backend)
        strided = Case(
            *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, case.k)),
            case.v.new_zeros(*case.v.shape[:-1], 48)[..., ::2].copy_(case.v),
            {name: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for name, x in case.tables.items()},
            None if case.mask is None else case.mask.mT.contiguous().mT,
        )
        torch.testing.assert_close(strided.attend(backend), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", ["dense", "factors"])
def test_expanded_inputs_equal_copies(bias, backend):
    base = make_case((1, 1, 17, 1, 24), bias, "holes", torch.float32)
    shape = (2, 5, 17, 3, 24)
    expanded = Case(
        *(x.expand(shape) for x in (base.q, base.k, base.v)),
        {name: x.expand(2, 3, -1, -1) for name, x in base.tables.items()},
        base.mask.expand(shape[:3]),
    )
    want = base.attend(backend).expand(shape)
    torch.testing.assert_close(expanded.attend(backend), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_form_is_one_row_of_the_triangle_form(backend):
    case = make_case((2, 17, 3, 24), "dense", "padded", torch.float32)
    one_row = Case(*(x.unsqueeze(1) for x in (case.q, case.k, case.v)), case.tables, case.mask.unsqueeze(1))
    assert torch.equal(case.attend(backend), one_row.attend(backend).squeeze(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", BIASES)
def test_repetition_is_bitwise_equal(bias, backend):
    case = make_case((1, 5, 63, 2, 32), bias, "holes", torch.float32)
    with torch.no_grad():
        assert torch.equal(case.attend(backend), case.attend(backend))


@pytest.mark.parametrize("rows_per_slab", [1, 2])
def test_slabs_of_the_reference_do_not_change_results(monkeypatch, rows_per_slab):
    case = make_case((2, 5, 17, 2, 24), "dense", "empty_rows", torch.float32)
    with torch.no_grad():
        whole = case.attend(Backend.REFERENCE)
        monkeypatch.setattr(reference, "SLAB_BYTES", rows_per_slab * 2 * 2 * 17 * 17 * 4)
        torch.testing.assert_close(case.attend(Backend.REFERENCE), whole, atol=1e-7, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_lower_precision(backend):
    case = make_case((1, 3, 17, 2, 24), "dense", "holes", torch.float32)
    with torch.no_grad():
        want = case.attend(backend)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(case.attend(backend), want)


def test_auto_is_torch_and_unknown_backends_are_named():
    case = make_case((1, 3, 17, 2, 24), "factors")
    assert torch.equal(case.attend(Backend.AUTO), case.attend(Backend.TORCH))
    with pytest.raises(ValueError, match="cudnn"):
        case.attend("cudnn")


def replace(**changes):
    case = make_case((2, 3, 7, 2, 8), "dense", "holes", torch.float32)
    arguments = {"q": case.q, "k": case.k, "v": case.v, "bias": case.tables["bias"], "mask": case.mask}
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"q": torch.zeros(3, 7, 2)}, ValueError, ["q", "[3, 7, 2]"]),
        ({"q": torch.zeros(2, 3, 7, 2, 8, dtype=torch.int64)}, TypeError, ["q", "int64"]),
        ({"q": torch.zeros(2, 0, 7, 2, 8)}, ValueError, ["q", "[2, 0, 7, 2, 8]"]),
        ({"k": torch.zeros(2, 3, 6, 2, 8)}, ValueError, ["k", "[2, 3, 7, 2, 8]", "[2, 3, 6, 2, 8]"]),
        ({"v": torch.zeros(2, 3, 7, 2, 8).double()}, TypeError, ["v", "float32", "float64"]),
        ({"v": torch.zeros(2, 3, 7, 2, 8, device="meta")}, ValueError, ["v", "cpu", "meta"]),
        ({"bias": torch.zeros(2, 2, 7, 6)}, ValueError, ["bias", "[2, 2, 7, 7]", "[2, 2, 7, 6]"]),
        ({"bias": torch.zeros(2, 2, 7, 7).bfloat16()}, TypeError, ["bias", "float32", "bfloat16"]),
        ({"bias": 1.0}, TypeError, ["bias", "float"]),
        ({"bias": Factors(torch.zeros(2, 2, 7, 4), torch.zeros(2, 2, 7, 5))}, ValueError, ["phi_q", "phi_k", "4", "5"]),
        ({"bias": Factors(torch.zeros(2, 2, 6, 4), torch.zeros(2, 2, 7, 4))}, ValueError, ["phi_q", "[2, 2, 6, 4]"]),
        ({"bias": Factors(torch.zeros(2, 2, 7, 0), torch.zeros(2, 2, 7, 0))}, ValueError, ["phi_q", "R >= 1"]),
        ({"mask": torch.ones(2, 3, 7)}, TypeError, ["mask", "bool", "float32"]),
        ({"mask": torch.ones(2, 7, dtype=torch.bool)}, ValueError, ["mask", "[2, 3, 7]", "[2, 7]"]),
    ],
)
def test_errors_name_argument_and_values(changes, error, words):
    with pytest.raises(error) as caught:
        flash_bias_attention(**replace(**changes))
    for word in words:
        assert word in str(caught.value)
