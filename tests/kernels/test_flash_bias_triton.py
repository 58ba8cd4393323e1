"""The Triton kernels against fp64, beside what plain PyTorch loses in the same dtype on the same inputs.

On a CPU the kernels run in Triton's interpreter (``conftest.py``), where bf16 products are wrong; on a GPU the same
small cases run compiled, and the larger ones follow.
"""

from dataclasses import replace
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from pairformer_fast.kernels.flash_bias.terms import TILE
from pairformer_fast.kernels.launching import precision
from tests.kernels.cases import DEVICE, FLOOR, Case, Inputs, assert_identical, make, torch_results, with_strides

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")

import triton
import triton.language as tl

from pairformer_fast.kernels.flash_bias import triton_backward, triton_forward, triton_tiles
from pairformer_fast.kernels.flash_bias.triton_common import VECTOR, Matrix, Tokens, matrix_pointer, token_pointers
from pairformer_fast.kernels.flash_bias.triton_tiles import KINDS, Tiles

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")  # queries without keys, NumPy


def triton_results(inputs: Inputs, tiles: dict[str, Tiles] | None = None) -> dict[str, Tensor]:
    """Output, log-sum-exp and all gradients of the kernels."""
    tiles = tiles or {}
    out, lse = triton_forward.forward(*inputs.arguments(), tiles=tiles.get("forward"))
    q, k, v, *others = inputs.arguments()
    gradients = triton_backward.backward(
        inputs.dout, inputs.dlse, q, k, v, out, lse, *others, frozenset(inputs.leaves), tiles=tiles
    )._asdict()
    assert {name for name, gradient in gradients.items() if gradient is not None} == inputs.leaves.keys()
    for name, leaf in inputs.leaves.items():
        assert gradients[name].dtype == leaf.dtype
        assert gradients[name].shape == leaf.shape
        assert gradients[name].is_contiguous()
    return {"out": out, "lse": lse} | {f"gradient of {name}": gradients[name] for name in inputs.leaves}


def check(case: Case, tiles: dict[str, Tiles] | None = None) -> None:
    """Maximum and mean error of everything against fp64, in units of what plain PyTorch loses."""
    inputs = make(case)
    got, truth = triton_results(inputs, tiles), torch_results(inputs, torch.float64)
    plain = torch_results(inputs, case.dtype)
    for name, want in truth.items():
        finite = want.isfinite()
        assert torch.equal(got[name].isfinite(), finite), f"{name} is not finite where it should be, or the reverse"
        floor = FLOOR[torch.float32 if name == "lse" else case.dtype]
        size = max(1.0, want[finite].abs().max().item()) if finite.any() else 1.0
        error, loss = ((x.double() - want)[finite].abs() for x in (got[name], plain[name]))
        if error.numel():
            assert error.max() <= 2 * loss.max() + floor * size, (
                f"{name}: max {error.max():.1e}, plain {loss.max():.1e}"
            )
            assert error.mean() <= 2 * loss.mean() + floor * size / 4, f"{name}: mean {error.mean():.1e}"


SMALL = [
    Case(1, r=1),
    Case(1, "mixed_table", masks="rows", gate=True),
    Case(17, "none", b=2, masks="rows"),
    Case(17, "dense", m=29, d=24, masks="pairs"),
    Case(17, r=7, b=2, masks="rows pairs empty", gate=True),
    Case(17, "table", i=1, h=3, m=9, w=0),
    Case(17, "table", i=2, m=40, w=30, masks="rows"),
    Case(63, r=16, d=32, i=2),
    Case(63, "table", r=33, i=2, h=1, d=24, w=12, masks="pairs empty"),
    Case(63, r=33, d=24, i=2, dtype=torch.float16, masks="rows empty", gate=True),
    Case(17, "mixed_table", dtype=torch.float16, b=2, masks="rows"),
    Case(70, "mixed", i=2, h=1, masks="rows pairs empty"),
    Case(70, "mixed_table", i=1, h=2, m=90, w=9),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_problems(case):
    check(case)


SMALL_TILES = [
    {kind: Tiles(16, 16, 1, 1, 1) for kind in KINDS},
    {kind: Tiles(16, 32, 4, 1, 1) for kind in KINDS},
    {kind: Tiles(64, 16, 2, 1, 1) for kind in KINDS},
]


@pytest.mark.parametrize("tiles", SMALL_TILES, ids=lambda tiles: "x".join(map(str, tiles["forward"][:3])))
def test_any_tiles_give_the_same_answer(tiles):
    check(Case(40, "mixed_table", i=5, h=1, m=35, w=6, masks="rows"), tiles)


def test_a_block_of_queries_may_span_two_flags():
    wide = Tiles(128, 32, 2, 1, 1)
    tiles = {"forward": wide, "backward_dq": wide, "backward_dkv": wide}
    case = Case(130, "mixed_table", i=2, h=1, m=70, w=9)
    first, second = make(case).dense_tiles[0, 0, :2]
    assert not torch.equal(first, second)
    check(case, tiles)


def test_repetition_is_bitwise_equal():
    inputs = make(Case(40, "mixed_table", i=4, masks="rows pairs", gate=True))
    assert_identical(triton_results(inputs), triton_results(inputs))


def test_queries_without_keys_give_zero_whatever_gradient_arrives():
    inputs = make(Case(17, "mixed_table", masks="rows empty", gate=True))
    inputs.dlse[:, -1] = torch.nan
    results = triton_results(inputs)
    assert results["lse"][:, -1].isneginf().all()
    for name in ("out", *(f"gradient of {leaf}" for leaf in ("q", "k", "v", "gate"))):
        assert (results[name][:, -1] == 0).all(), name
    assert all(x.isfinite().all() for name, x in results.items() if name != "lse")


def test_strides_change_nothing():
    inputs = make(Case(17, "mixed_table", m=20, b=2, masks="rows pairs", gate=True))
    strided = replace(inputs)
    strided.leaves = {
        name: with_strides(x, {2: [1, 0], 4: [0, 2, 3, 1], 5: [0, 2, 1, 3, 4]}[x.ndim])
        for name, x in inputs.leaves.items()
    }
    strided.mask, strided.pair_mask = (with_strides(x, [2, 0, 1]) for x in (inputs.mask, inputs.pair_mask))
    strided.dense_tiles = with_strides(inputs.dense_tiles, [1, 0, 3, 2])
    strided.dout, strided.dlse = with_strides(inputs.dout, [4, 3, 2, 1, 0]), with_strides(inputs.dlse, [3, 2, 1, 0])
    assert not strided.leaves["q"].is_contiguous()
    assert_identical(triton_results(strided), triton_results(inputs))


def test_broadcast_inputs_change_nothing():
    inputs = make(Case(17, b=2, masks="rows", gate=True))
    first = {name: x[:1] if name.startswith("phi") else x[:, :1] for name, x in inputs.leaves.items()}
    shapes = {name: x.shape for name, x in inputs.leaves.items()}
    broadcast = replace(inputs, leaves={name: x.expand(shapes[name]) for name, x in first.items()})
    broadcast.mask, broadcast.dout = (
        inputs.mask[:, :1].expand_as(inputs.mask),
        inputs.dout[..., :1].expand_as(inputs.dout),
    )
    copies = replace(broadcast, leaves={name: x.contiguous() for name, x in broadcast.leaves.items()})
    copies.mask, copies.dout = broadcast.mask.contiguous(), broadcast.dout.contiguous()
    assert_identical(triton_results(broadcast), triton_results(copies))


@pytest.mark.parametrize("needs", ["q", "v", "phi_k", "table", "dense+gate"])
def test_any_gradients_can_be_asked_for(needs):
    needs = set(needs.split("+"))
    inputs = make(Case(17, "mixed_table", i=2, gate=True))
    q, k, v, *others = inputs.arguments()
    out, lse = triton_forward.forward(q, k, v, *others)
    everything, some = (
        triton_backward.backward(inputs.dout, None, q, k, v, out, lse, *others, frozenset(names))._asdict()
        for names in (inputs.leaves, needs)
    )
    assert {name for name, x in some.items() if x is not None} == needs
    assert_identical(some, {name: everything[name] for name in needs})


@pytest.mark.parametrize("capability", [(9, 0), (8, 0), (12, 0), None], ids=str)
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_every_shape_has_tiles(dtype, capability):
    for kind in KINDS:
        for dim, rank, n in [(8, 0, 1), (32, 32, 1024), (128, 128, 10**6)]:
            tiles = triton_tiles.tile_sizes(kind, dtype, dim, rank, n, capability)
            assert {tiles.block_m, tiles.block_n} <= {16, 32, 64, 128}
            assert tiles.block_n <= TILE
            assert tiles.group in (1, 2, 4)
            if kind == "backward_pairs":
                assert tiles.block_m <= TILE, "a tile of the dense gradient lies within one flag"


def test_tf32_is_used_only_where_it_is_asked_for(monkeypatch):
    assert precision(torch.float32) == "ieee"
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert precision(torch.float32) == "tf32"
    assert precision(torch.bfloat16) == "ieee"


LARGE = [
    *(Case(n, form, i=5, r=16, d=32) for n in (1, 17, 63, 191) for form in ("none", "dense", "factors", "mixed_table")),
    *(Case(191, "factors", i=4, r=r, d=32) for r in (1, 7, 33, 64, 128)),
    *(Case(130, "mixed", i=4, r=16, d=d, masks="rows") for d in (8, 16, 24, 48, 64, 96, 128)),
    Case(1000, "table", i=3, r=32, d=32, w=32, masks="rows"),
    Case(1000, "mixed_table", i=2, r=33, d=24, w=70, masks="rows pairs empty", gate=True),
    Case(1000, "dense", i=3, d=64, masks="rows empty"),
    Case(191, "mixed_table", b=2, i=7, m=259, r=48, d=48, w=64, masks="rows pairs empty", gate=True),
    Case(384, "dense", i=1, h=16, d=24, masks="rows"),
    Case(384, "factors", i=48, h=4, r=32, d=32, masks="rows", lse=False),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_problems(case, dtype):
    check(replace(case, dtype=dtype))


def shipped_tiles() -> list[tuple[str, int, Tiles]]:
    """Every entry of every GPU in the table, with the size of the dtype for which it is meant."""
    table = triton_tiles._table()
    entries = {
        (kind, entry.get("bytes", 4), Tiles(*entry["tiles"]))
        for architecture in table.keys() - {"interpreter"}
        for kind in KINDS
        for entry in table[architecture][kind]
    }
    return sorted(entries)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "size", "tiles"), shipped_tiles(), ids=str)
def test_shipped_tiles_are_right_and_repeat_bitwise(kind, size, tiles):
    case = Case(191, "mixed_table", b=2, i=5, m=130, r=32, d=32, w=20, masks="rows pairs empty", gate=True)
    case = replace(case, dtype={2: torch.bfloat16, 4: torch.float32}[size])
    check(case, {kind: tiles})
    inputs = make(case)
    want = triton_results(inputs, {kind: tiles})
    for _ in range(3):
        assert_identical(triton_results(inputs, {kind: tiles}), want)


@pytest.mark.gpu
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.builds(
        Case,
        n=st.integers(1, 300),
        form=st.sampled_from(["none", "dense", "factors", "table", "mixed", "mixed_table"]),
        dtype=st.sampled_from(list(FLOOR)),
        b=st.integers(1, 2),
        i=st.integers(1, 6),
        m=st.integers(1, 300),
        h=st.integers(1, 4),
        d=st.sampled_from([8, 24, 32, 40, 64, 128]),
        r=st.sampled_from([1, 7, 32, 65]),
        w=st.integers(0, 200),
        masks=st.sampled_from(["", "rows", "pairs", "rows pairs empty"]),
        gate=st.booleans(),
        lse=st.booleans(),
    )
)
def test_any_shape(case):
    check(case)


@triton.jit
def offsets_kernel(x, y, offsets):
    tl.store(offsets, matrix_pointer(x, 1, 0).to(tl.int64) - x.pointer.to(tl.int64))
    p_y = token_pointers(y, 0, 1, 0, 0, 16, 16)
    tl.store(offsets + 1, tl.max((p_y.to(tl.int64) - y.pointer.to(tl.int64)).reshape(256), 0))


def test_strides_in_units_may_exceed_32_bits():
    there = torch.zeros(1, dtype=torch.bfloat16, device=DEVICE)
    offsets = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    x = Matrix(there, b=2**31 // 8, y=1, unit=VECTOR)
    y = Tokens(there, i=2**30, n=2**30 // 8, d=2**29, unit=VECTOR)
    offsets_kernel[(1,)](x, y, offsets)
    assert offsets.tolist() == [2 * 2**31, 2 * (8 * 2**30 + 15 * 2**30 + 15 * 2**29)]


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    case = Case(65, b=2, i=2, r=16, d=32, masks="rows", dtype=torch.bfloat16)
    inputs = make(case)
    far = replace(inputs, leaves=dict(inputs.leaves))
    storage = torch.empty(2**31 + 2 * inputs.leaves["q"].numel(), dtype=case.dtype, device=DEVICE)
    for name in "qkv":
        x = inputs.leaves[name]
        strides = (2**31, *x.stride()[1:])
        far.leaves[name] = storage.as_strided(x.shape, strides).copy_(x)
        assert_identical(triton_results(far), triton_results(inputs))
        far.leaves[name] = x
