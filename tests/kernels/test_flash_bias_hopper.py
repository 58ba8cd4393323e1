"""The Hopper kernels through the public function, against fp64 and beside PyTorch with weights in bf16.

Every new shape of a problem compiles three or four kernels for seconds each, so shapes are few and used again.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")

import triton

from pairformer_fast.config import Backend
from pairformer_fast.kernels.flash_bias import Factors, flash_bias_attention, hopper_tiles, launch
from pairformer_fast.kernels.flash_bias.hopper_tiles import KINDS
from tests.kernels import cases
from tests.kernels.cases import DEVICE, Inputs, assert_identical, make, torch_results


def why_skipped() -> str:
    if not torch.cuda.is_available():
        return "no CUDA GPU here: run `make gpu-test` on a machine that has one"
    capability = torch.cuda.get_device_capability()
    if capability != launch.HOPPER:
        return f"the Hopper kernels need compute capability {launch.HOPPER}, but this GPU has {capability}"
    if not launch._gluon_known():
        return f"the Hopper kernels are not used with Triton {triton.__version__}"
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_skipped()), reason=why_skipped())]

MULTIPLES = {"max": 5.0, "mean": 2.5}
"""Errors allowed, in units of what PyTorch loses: it rounds weights, but not their gradients."""

SLACK = 2.0**-9
"""Error allowed beside that, relative to the results: one rounding to bf16."""

LSE_SLACK = 1e-4

Case = partial(cases.Case, dtype=torch.bfloat16, d=32, r=16)
Results = dict[str, Tensor]


def attend(inputs: Inputs, *, single: bool = False) -> Results:
    """Output, log-sum-exp and all gradients of the public function; the one row is dropped on the way if ``single``."""
    rowless = {"q", "k", "v", "gate"} if single else set()

    def without_row(x: Tensor | None) -> Tensor | None:
        return x.squeeze(1) if single and x is not None else x

    leaves = {name: x.squeeze(1) if name in rowless else x for name, x in inputs.leaves.items()}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    bias = leaves.get("dense")
    if "phi_q" in leaves:
        bias = Factors(leaves["phi_q"], leaves["phi_k"], dense=bias, dense_tiles=inputs.dense_tiles)
    q, k, v = (leaves[name] for name in "qkv")
    mask, gate = without_row(inputs.mask), leaves.get("gate")
    outputs = flash_bias_attention(q, k, v, bias, mask, Backend.TRITON, gate=gate, return_lse=True)
    arriving = [without_row(inputs.dout), without_row(inputs.dlse)]
    gradients = dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), arriving), strict=True))
    results = {"out": outputs[0].detach(), "lse": outputs[1].detach()}
    results |= {f"gradient of {name}": x for name, x in gradients.items()}
    return {
        name: x.unsqueeze(1) if single and name.split()[-1] in {"out", "lse", *rowless} else x
        for name, x in results.items()
    }


def hopper_takes(inputs: Inputs) -> bool:
    q, k, v, terms, *_ = inputs.arguments()
    return launch.hopper_takes(q, k, v, terms, inputs.pair_mask)


def compare(got: Results, inputs: Inputs, slack: float = SLACK) -> None:
    """Maximum and mean error of everything."""
    truth, plain = torch_results(inputs, torch.float64), torch_results(inputs, torch.bfloat16, torch.float32)
    assert got.keys() == truth.keys()
    for name, want in truth.items():
        assert got[name].shape == want.shape, name
        assert got[name].dtype == plain[name].dtype, name
        finite = want.isfinite()
        assert torch.equal(got[name].isfinite(), finite), f"{name} is not finite where it should be, or the reverse"
        assert torch.equal(got[name][~finite].double(), want[~finite]), name
        error, loss, size = (x[finite].abs() for x in (got[name].double() - want, plain[name].double() - want, want))
        if not size.numel():
            continue
        if name == "lse":
            assert error.max() <= MULTIPLES["max"] * loss.max() + LSE_SLACK * max(1.0, size.max().item()), (
                f"{error.max():.1e}"
            )
            continue
        for kind, measure in (("max", torch.max), ("mean", torch.mean)):
            allowed = MULTIPLES[kind] * measure(loss) + slack * measure(size)
            assert measure(error) <= allowed, f"{name}: {kind} {measure(error):.1e}, allowed {allowed:.1e}"


def check(inputs: Inputs, slack: float = SLACK) -> None:
    assert hopper_takes(inputs)
    compare(attend(inputs), inputs, slack)


PROBLEMS = [
    Case(17, "dense", m=63, i=1),
    Case(63, "mixed", d=16, r=7, masks="rows", gate=True),
    Case(63, "none", b=2, d=24, masks="rows empty"),
    Case(77, "factors", i=1, m=300, d=64, r=64),
    Case(191, "factors", b=2, i=5, r=32, masks="rows padded empty", gate=True),
    Case(191, "mixed", i=4, m=259, r=33),
    Case(191, "mixed", d=64, r=1, masks="rows"),
    Case(191, "dense", d=48, masks="rows empty"),
    Case(191, "factors", d=48, r=96),
    Case(256, "factors", i=6, h=4, r=32),
    Case(1000, "none", d=16, masks="rows"),
    Case(1000, "factors", h=4, r=32),
    Case(1000, "mixed", i=2, masks="rows padded empty", gate=True),
    Case(1000, "dense", masks="rows padded"),
]


@pytest.mark.parametrize("case", PROBLEMS, ids=str)
def test_against_fp64(case):
    check(make(case))


@pytest.mark.parametrize("case", [Case(1, i=5), Case(1, "mixed", masks="rows", gate=True)], ids=str)
def test_one_token(case):
    # The gradient of a logit is the difference of two equal numbers, one of them made from the rounded output.
    check(make(case), slack=2.0**-4)


def test_single_attention():
    inputs = make(Case(384, "dense", i=1, h=16, d=24, masks="rows"))
    assert hopper_takes(inputs)
    compare(attend(inputs, single=True), inputs)


BASE = Case(130, i=5, masks="rows", gate=True)


@pytest.fixture(scope="module")
def base() -> Inputs:
    return make(BASE)


def with_leaves(inputs: Inputs, **leaves: Tensor) -> Inputs:
    return replace(inputs, leaves=inputs.leaves | leaves)


def test_transposed_pair_representation_changes_nothing(base):
    moved = with_leaves(
        base, **{x: base.leaves[x].transpose(1, 2).contiguous().transpose(1, 2) for x in (*"qkv", "gate")}
    )
    moved.mask, moved.dout = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (base.mask, base.dout))
    moved.dlse = base.dlse.transpose(1, 3).contiguous().transpose(1, 3)
    assert not moved.leaves["q"].is_contiguous()
    assert hopper_takes(moved)
    assert_identical(attend(moved), attend(base))


def test_slices_of_one_projection_change_nothing(base):
    together = torch.stack([base.leaves[name] for name in (*"qkv", "gate")], dim=3)
    sliced = with_leaves(base, **dict(zip((*"qkv", "gate"), together.unbind(3), strict=True)))
    assert hopper_takes(sliced)
    assert_identical(attend(sliced), attend(base))


def test_broadcast_and_strided_inputs_beside_q_k_v(base):
    leaves = base.leaves
    odd = with_leaves(
        base,
        phi_q=leaves["phi_q"][:, :1].expand_as(leaves["phi_q"]),
        phi_k=leaves["phi_k"].mT.contiguous().mT,
        gate=leaves["gate"][:, :, :1].expand_as(leaves["gate"]),
    )
    odd.mask = base.mask[:, :1].expand_as(base.mask)
    odd.dout, odd.dlse = base.dout[:1, :1, :1, :1, :1].expand_as(base.dout), base.dlse[..., :1].expand_as(base.dlse)
    check(odd)


def misaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


def widened(x: Tensor) -> Tensor:
    return torch.cat([x, x[..., :1]], -1)[..., :-1]


def broadcast(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


@pytest.mark.parametrize("change", [misaligned, widened, broadcast])
@pytest.mark.parametrize("name", list("qkv"))
def test_what_the_copy_engine_cannot_read_goes_to_the_general_kernels(base, name, change):
    assert not hopper_takes(with_leaves(base, **{name: change(base.leaves[name])}))


def test_the_general_kernels_are_right_where_the_copy_engine_cannot_read(base):
    q, k, v = (base.leaves[name] for name in "qkv")
    changed = with_leaves(base, q=broadcast(q), k=misaligned(k), v=widened(v))
    compare(attend(changed), changed)


def test_both_kinds_of_kernels_agree(monkeypatch, base):
    got = attend(base)
    monkeypatch.setattr(launch, "hopper_takes", lambda *_: False)
    for name, want in attend(base).items():
        finite = want.isfinite()
        distance, size = (x[finite].double().norm() for x in (got[name] - want, want))
        assert distance <= (2e-5 if name == "lse" else 8e-3) * size, f"{name}: {distance / size:.1e}"


@pytest.mark.parametrize("form", ["none", "factors", "dense", "mixed"])
def test_the_production_problem_is_taken(form):
    assert hopper_takes(make(Case(768, form, i=2, h=4, r=32, masks="rows", gate=True)))


def watched(name: str, run: Callable, ran: list[str]) -> Callable:
    def watch(*args, **options):
        ran.append(name)
        return run(*args, **options)

    return watch


def test_the_hopper_kernels_run_where_the_problem_is_taken(monkeypatch, base):
    from pairformer_fast.kernels.flash_bias import hopper_backward, hopper_forward

    ran: list[str] = []
    monkeypatch.setattr(hopper_forward, "forward", watched("forward", hopper_forward.forward, ran))
    monkeypatch.setattr(hopper_backward, "backward", watched("backward", hopper_backward.backward, ran))
    attend(base)
    assert ran == ["forward", "backward"]


def test_other_problems_are_not_taken(base):
    for case in (replace(BASE, dtype=torch.float16), replace(BASE, d=20), replace(BASE, d=96)):
        assert not hopper_takes(make(case)), case
    assert not hopper_takes(with_leaves(base, table=torch.zeros(2, 7, device=DEVICE)))
    assert not hopper_takes(make(replace(BASE, masks="pairs")))


def test_memory_is_poisoned_before_it_is_written():
    assert torch.empty(8, device=DEVICE, dtype=torch.bfloat16).isnan().all(), (
        "no test here would see what is not written"
    )


@pytest.mark.parametrize("rows", [slice(None), slice(1, 2)], ids=["everywhere", "in one row"])
def test_logits_far_outside_the_range_of_exp2(base, rows):
    from pairformer_fast.kernels.flash_bias import hopper_forward

    sharp = with_leaves(base, q=base.leaves["q"].clone())
    sharp.leaves["q"][:, rows] *= 100
    q, k, v, terms, mask, _, gate = sharp.arguments()
    marked = hopper_forward.forward(q, k, v, terms, mask, gate)[1].isnan()
    scaled = torch.zeros(BASE.i, dtype=torch.bool, device=DEVICE)
    scaled[rows] = True
    assert torch.equal(marked.any(-1).any(-1).any(0), scaled)
    # Where one key has all the weight, gradients of logits are differences of nearly equal numbers.
    check(sharp, slack=2.0**-6)


def test_dense_bias_that_hides_keys_and_whole_queries():
    case = Case(130, "dense", i=5, masks="rows")
    inputs = make(case)
    inputs.leaves["dense"][..., 100:] = -1e9
    hidden = torch.zeros(case.n, dtype=torch.bool, device=DEVICE)
    hidden[[3, 4, 70, 129]] = True
    inputs.dout[:, :, hidden], inputs.dlse[..., hidden] = 0, 0
    blind = with_leaves(inputs, dense=inputs.leaves["dense"].masked_fill(hidden[:, None], -1e9))
    assert hopper_takes(blind)
    got = attend(blind)
    # In fp32 nothing is left of the logits beside 1e9, so these queries see all keys alike.
    v, keep = blind.leaves["v"].double(), blind.mask.double()
    mean = torch.einsum("bim,bimhd->bihd", keep / keep.sum(-1, keepdim=True), v)[:, :, None]
    assert (got["out"][:, :, hidden] - mean).norm() <= 0.01 * mean.expand_as(got["out"][:, :, hidden]).norm()
    assert (got["lse"][..., hidden] / -1e9 - 1).abs().max() <= 5e-3
    expected = torch_results(inputs, torch.float64)
    got["out"][:, :, hidden] = expected["out"][:, :, hidden].to(torch.bfloat16)
    got["lse"][..., hidden] = expected["lse"][..., hidden].float()
    compare(got, inputs)


def test_a_nan_stays_where_it_belongs(base):
    want = attend(base)
    for name, tainted in (("q", (0, 2, 77, 1, slice(None))), ("v", (0, 2, slice(None), 1, 9))):
        poisoned = with_leaves(base, **{name: base.leaves[name].clone()})
        poisoned.mask = base.mask.clone()
        poisoned.mask[0, 2, 77] = True
        poisoned.leaves[name][0, 2, 77, 1, 9] = torch.nan
        got = attend(poisoned)
        spread = torch.zeros_like(want["out"], dtype=torch.bool)
        spread[tainted] = True
        assert torch.equal(got["out"].isnan(), spread), name
        lse_spread = torch.zeros_like(want["lse"], dtype=torch.bool)
        lse_spread[0, 2, 1, 77] = name == "q"
        assert torch.equal(got["lse"].isnan(), lse_spread), name
        others = [0, 1, 3, 4]
        assert torch.equal(got["out"][:, others], want["out"][:, others]), name
        assert torch.equal(got["gradient of q"][:, others], want["gradient of q"][:, others]), name


def test_queries_without_keys_ignore_the_gradient_of_their_lse():
    inputs = make(replace(BASE, masks="rows empty"))
    want = attend(inputs)
    inputs.dlse[:, -1] = torch.nan
    assert_identical(attend(inputs), want)
    for name in ("out", *(f"gradient of {leaf}" for leaf in ("q", "k", "v", "gate"))):
        assert (want[name][:, -1] == 0).all(), name


def entries(kind: str, dim: int, rank: int) -> list[dict[str, Any]]:
    """Entries of the table among which the choice is made for factors of ``rank``."""
    wide = [x for x in hopper_tiles._table()["kernels"][kind] if x["dim"] == dim and x["rank"] >= rank]
    return [x for x in wide if x["rank"] == min(x["rank"] for x in wide)]


def shipped() -> Iterator[tuple[int, int, int]]:
    """Width of a head, rank, and how many entries the longest list for them has."""
    table = hopper_tiles._table()["kernels"]
    for dim, rank in sorted({(x["dim"], x["rank"]) for kind in KINDS for x in table[kind]}):
        for index in range(max(len(entries(kind, dim, rank)) for kind in KINDS)):
            yield dim, rank, index


@pytest.fixture
def only_tiles(monkeypatch) -> Iterator[Callable[[int, int, int], None]]:
    """Leave the table of tiles one entry of each kind."""

    def keep(dim: int, rank: int, index: int) -> None:
        some = {kind: entries(kind, dim, rank) for kind in KINDS}
        kept = {kind: [found[index % len(found)]] for kind, found in some.items()}
        monkeypatch.setattr(hopper_tiles, "_table", lambda: {"kernels": kept})
        hopper_tiles.choose.cache_clear()

    yield keep
    hopper_tiles.choose.cache_clear()


@pytest.mark.parametrize("form", ["factors", "mixed"])
@pytest.mark.parametrize(("dim", "rank", "index"), list(shipped()))
def test_shipped_tiles_are_right_and_repeat_bitwise(only_tiles, dim, rank, index, form):
    only_tiles(dim, rank, index)
    inputs = make(Case(300, form, b=2, i=5, m=200, d=dim, r=rank, masks="rows empty", gate=True))
    check(inputs)
    want = attend(inputs)
    for _ in range(4):
        assert_identical(attend(inputs), want)


@pytest.mark.parametrize("tokens", [64, 128, 192, 256])
@pytest.mark.parametrize("form", ["factors", "dense", "mixed"])
def test_many_rows_repeat_bitwise(form, tokens):
    """With few tokens the producer is far ahead of the consumers, and overwrites what they give back at once."""
    inputs = make(Case(tokens, form, b=4, i=tokens, h=4, r=32))
    assert hopper_takes(inputs)
    want = attend(inputs)
    for _ in range(20):
        assert_identical(attend(inputs), want)


def peak_beside(run) -> tuple[Results, int]:
    """What ``run`` returns, and the most memory that it held at a time, its results included."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    return results, torch.cuda.max_memory_allocated() - before


def size_of(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("form", ["factors", "dense"])
def test_memory_is_that_of_the_results(form):
    inputs = make(Case(256, form, i=64, h=4, r=32))
    leaves = [x.requires_grad_() for x in inputs.leaves.values()]
    bias = Factors(*leaves[3:]) if form == "factors" else leaves[3]
    assert hopper_takes(inputs)
    attend_once = partial(flash_bias_attention, *leaves[:3], bias, backend=Backend.TRITON, return_lse=True)
    (out, lse), forward = peak_beside(attend_once)
    assert forward <= size_of(out, lse) + 2**16
    backward = partial(torch.autograd.grad, out, leaves, inputs.dout, retain_graph=True)
    gradients, held = peak_beside(backward)
    # Shares of the rows, for which every multiprocessor has a few work items at a time, and the bias transposed.
    shares = 2**24 if form == "factors" else 2**25
    assert held <= size_of(*gradients) + 2 * size_of(lse) + shares
