"""flash_bias_attention against an independent fp64 oracle that drops masked keys by indexing."""

from dataclasses import dataclass, replace
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
        f"{letter}{size}" for letter, size in zip({4: "BNHD", 5: "BINHD", 6: "ABINHD"}[len(shape)], shape, strict=True)
    )


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    tables: dict[str, Tensor]
    mask: Tensor | None
    pair_mask: Tensor | None = None
    gate: Tensor | None = None
    dense_tiles: Tensor | None = None

    def leaves(self) -> dict[str, Tensor]:
        gate = {} if self.gate is None else {"gate": self.gate}
        return {"q": self.q, "k": self.k, "v": self.v, **self.tables, **gate}

    def having(self, leaves: dict[str, Tensor]) -> "Case":
        """The same case of other leaves."""
        tables = {name: leaves[name] for name in self.tables}
        return replace(self, **{name: x for name, x in leaves.items() if name not in tables}, tables=tables)

    def to(self, dtype: torch.dtype) -> "Case":
        """Leaves of the same values, recording gradients, in another dtype."""
        return self.having({name: x.detach().to(dtype).requires_grad_() for name, x in self.leaves().items()})

    def attend(self, backend: Backend, **arguments) -> Tensor:
        bias = self.tables.get("bias")
        if "phi_q" in self.tables:
            bias = Factors(**self.tables, dense_tiles=self.dense_tiles)
        return flash_bias_attention(
            self.q, self.k, self.v, bias, self.mask, backend, pair_mask=self.pair_mask, gate=self.gate, **arguments
        )


def make_case(
    shape, bias="none", mask="none", dtype=torch.float64, rank=5, seed=0, keys=None, pair_mask=False, gate=False
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    queries, heads = shape[-3:-1]
    keys = keys or queries
    leading = shape[: max(1, len(shape) - 4)]
    tables = {}
    dense_tiles = None
    if bias == "dense":
        tables = {"bias": draw(*leading, heads, queries, keys)}
    elif bias != "none":
        tables = {"phi_q": draw(*leading, heads, queries, rank), "phi_k": draw(*leading, heads, keys, rank)}
    if bias in ("table", "mixed"):
        tables["table"] = draw(heads, 7)
    if bias == "mixed":
        tables["dense"] = draw(*leading, heads, queries, keys)
        dense_tiles = torch.rand(*leading, heads, -(-queries // 64), -(-keys // 64), generator=generator) < 0.5
    sizes = [(*shape[:-3], tokens, *shape[-2:]) for tokens in (queries, keys, keys)]
    return Case(
        *(draw(*size) for size in sizes),
        tables,
        make_mask(mask, (*shape[:-3], keys), generator),
        torch.rand(*leading, queries, keys, generator=generator) < 0.3 if pair_mask else None,
        draw(*shape) if gate else None,
        dense_tiles,
    )


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


def oracle(case: Case) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the keys that are kept, one row and head at a time."""
    shape, keys = case.q.shape, case.k.shape[-3]
    single = len(shape) == 4
    batch = shape[0] if single else shape[:-4].numel()
    rows = 1 if single else shape[-4]
    q, k, v = (x.reshape(batch, rows, *x.shape[-3:]) for x in (case.q, case.k, case.v))
    keep = torch.ones(batch, rows, shape[-3], keys, dtype=torch.bool)
    if case.mask is not None:
        keep &= case.mask.reshape(batch, rows, 1, keys)
    if case.pair_mask is not None:
        keep &= case.pair_mask.reshape(batch, 1, -1, keys)
    bias = oracle_bias(case, batch)
    out, lse = torch.zeros_like(q), q.new_zeros(batch, rows, shape[-2], shape[-3])
    queries = list(range(shape[-3]))
    blocks = [queries] if case.pair_mask is None else [[n] for n in queries]
    for b, i, h, block in product(range(batch), range(rows), range(shape[-2]), blocks):
        kept = keep[b, i, block[0]].nonzero().squeeze(1)
        logits = q[b, i, block, h] @ k[b, i, kept, h].T / shape[-1] ** 0.5 + bias[b, h, block][:, kept]
        out[b, i, block, h] = logits.softmax(-1) @ v[b, i, kept, h]
        lse[b, i, h, block] = logits.logsumexp(-1)
    out = out.reshape(shape)
    return out if case.gate is None else out / (1 + (-case.gate).exp()), lse.reshape(*shape[:-3], shape[-2], shape[-3])


def oracle_bias(case: Case, batch: int) -> Tensor:
    queries, heads = case.q.shape[-3:-1]
    keys = case.k.shape[-3]
    if not case.tables:
        return case.q.new_zeros(batch, heads, queries, keys)
    if "bias" in case.tables:
        return case.tables["bias"].reshape(batch, heads, queries, keys)
    bias = (case.tables["phi_q"] @ case.tables["phi_k"].mT).reshape(batch, heads, queries, keys)
    if "table" in case.tables:
        reach = case.tables["table"].shape[1] // 2
        offsets = [[max(-reach, min(reach, n - m)) + reach for m in range(keys)] for n in range(queries)]
        bias = bias + case.tables["table"][:, torch.tensor(offsets)]
    if case.dense_tiles is not None:
        dense = case.tables["dense"].reshape(bias.shape)
        flags = case.dense_tiles.reshape(batch, heads, -1, case.dense_tiles.shape[-1])
        for b, h, n, m in flags.nonzero().tolist():
            tile = b, h, slice(64 * n, 64 * n + 64), slice(64 * m, 64 * m + 64)
            bias[tile] = dense[tile]
    return bias


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

    out, (want, _) = case.attend(backend), oracle(truth)
    assert out.dtype == dtype
    assert out.shape == case.q.shape
    assert_close("output", out, want, max_error, mean_error)

    grads = torch.autograd.grad((out * weight).sum(), case.leaves().values())
    wants = torch.autograd.grad((want * weight.double()).sum(), truth.leaves().values())
    for name, got, want in zip(case.leaves(), grads, wants, strict=True):
        assert_close(f"gradient of {name}", got, want, max_error, mean_error)


FEATURES = {
    "fewer_keys": {"bias": "dense", "keys": 9},
    "more_keys": {"bias": "factors", "keys": 29},
    "table": {"bias": "table"},
    "table_fewer_keys": {"bias": "table", "keys": 3},
    "table_more_keys": {"bias": "table", "keys": 29},
    "pair_mask": {"pair_mask": True},
    "pair_mask_dense": {"bias": "dense", "pair_mask": True},
    "pair_mask_factors": {"bias": "factors", "pair_mask": True},
    "gate": {"bias": "factors", "gate": True},
    "everything": {"bias": "mixed", "keys": 29, "pair_mask": True, "gate": True},
}


def check_against_oracle(case: Case, backend: Backend) -> None:
    truth = case.to(torch.float64)
    leaves = case.leaves().values()
    weight = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(1), dtype=case.q.dtype)
    out, (want, _) = case.attend(backend), oracle(truth)
    assert_close("output", out, want, 1e-5, 1e-6)
    grads = torch.autograd.grad((out * weight).sum(), leaves)
    wants = torch.autograd.grad((want * weight.double()).sum(), truth.leaves().values())
    for name, got, want in zip(case.leaves(), grads, wants, strict=True):
        assert_close(f"gradient of {name}", got, want, 1e-5, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("mask", ["none", "padded", "empty_rows"])
@pytest.mark.parametrize("shape", [(2, 3, 17, 2, 8), (2, 17, 3, 24), (2, 2, 3, 5, 2, 8)], ids=shape_id)
def test_features_match_oracle(shape, mask, feature, backend):
    check_against_oracle(make_case(shape, mask=mask, dtype=torch.float32, **FEATURES[feature]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "keys"), [(70, 70), (64, 129), (130, 63)])
def test_flagged_tiles_take_the_dense_bias(tokens, keys, backend):
    case = make_case((1, 2, tokens, 2, 8), "mixed", "holes", torch.float32, keys=keys)
    assert case.dense_tiles.any()
    assert not case.dense_tiles.all()
    check_against_oracle(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_bias_outside_flagged_tiles_is_never_read(backend):
    case = make_case((1, 2, 70, 2, 8), "mixed", dtype=torch.float32)
    want = case.attend(backend)
    unflagged = ~case.dense_tiles.repeat_interleave(64, -2).repeat_interleave(64, -1)[..., :70, :70]
    with torch.no_grad():
        case.tables["dense"][unflagged] = torch.nan
    got = case.attend(backend)
    assert torch.equal(got, want)
    for name, grad in zip(case.leaves(), torch.autograd.grad(got.sum(), case.leaves().values()), strict=True):
        assert grad.isfinite().all(), f"gradient of {name}"


@pytest.mark.parametrize("shape", [(2, 3, 17, 2, 8), (2, 17, 3, 24), (2, 2, 3, 5, 2, 8)], ids=shape_id)
@pytest.mark.parametrize("mask", ["none", "empty_rows"])
@pytest.mark.parametrize("feature", FEATURES)
def test_log_sum_exp_matches_oracle(feature, mask, shape):
    case = make_case(shape, mask=mask, dtype=torch.float32, **FEATURES[feature])
    truth = case.to(torch.float64)
    (out, lse), (_, want) = case.attend(Backend.REFERENCE, return_lse=True), oracle(truth)
    assert torch.equal(out, case.attend(Backend.REFERENCE))
    assert lse.dtype == torch.float32
    assert lse.shape == want.shape
    empty = want == -torch.inf
    assert (lse[empty] == -torch.inf).all()
    assert_close("log-sum-exp", lse[~empty], want[~empty], 1e-5, 1e-6)
    grads, wants = (
        torch.autograd.grad(x[~empty].sin().sum(), leaves, allow_unused=True, materialize_grads=True)
        for x, leaves in ((lse, case.leaves().values()), (want, truth.leaves().values()))
    )
    for name, got, want in zip(case.leaves(), grads, wants, strict=True):
        assert_close(f"gradient of {name}", got, want, 1e-5, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features_in_half_precision(feature, dtype, backend):
    case = make_case((2, 3, 17, 2, 8), mask="holes", dtype=dtype, **FEATURES[feature])
    step = torch.finfo(dtype).eps
    with torch.no_grad():
        assert_close("output", case.attend(backend), oracle(case.to(torch.float64))[0], 6 * step, step)


@pytest.mark.parametrize("backend", BACKENDS)
def test_table_may_be_fp32_beside_a_half_precision_bias(backend):
    case = make_case((1, 2, 17, 2, 8), "table", dtype=torch.float16)
    want = case.attend(backend)
    case.tables["table"] = case.tables["table"].detach().float().requires_grad_()
    got = case.attend(backend)
    assert torch.equal(got, want)
    (grad,) = torch.autograd.grad(got.sum(), case.tables["table"])
    assert grad.dtype == torch.float32


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
        assert_close("output", case.attend(backend), oracle(case.to(torch.float64))[0], 6 * step, step)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_bias_is_exact_argmax(backend):
    case = make_case((1, 3, 17, 2, 8), "dense", "holes", torch.float32)
    with torch.no_grad():
        case.tables["bias"].mul_(1e4)
        assert_close("output", case.attend(backend), oracle(case.to(torch.float64))[0], 1e-5, 1e-6)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", ["none", "empty_rows"])
def test_gradcheck_of_reference(bias, mask):
    case = make_case((2, 3, 4, 2, 3), bias, mask, rank=2)

    def attend(*leaves):
        return case.having(dict(zip(case.leaves(), leaves, strict=True))).attend(Backend.REFERENCE)

    assert torch.autograd.gradcheck(attend, tuple(case.leaves().values()))


@pytest.mark.parametrize("feature", FEATURES)
def test_gradcheck_of_reference_with_log_sum_exp(feature):
    case = make_case((1, 2, 4, 2, 3), mask="holes", rank=2, **{**FEATURES[feature], "keys": 5})

    def attend(*leaves):
        out, lse = case.having(dict(zip(case.leaves(), leaves, strict=True))).attend(Backend.REFERENCE, return_lse=True)
        return out, lse.masked_fill(lse.isinf(), 0)

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
