"""Queries that are marked by a NaN are done again, and nothing else is touched.

On a CPU the kernel runs in Triton's interpreter (``conftest.py``), where bf16 products are wrong.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")

from pairformer_fast.kernels.flash_bias import triton_redo
from tests.kernels.cases import DEVICE, FLOOR, Case, Inputs, make, torch_results

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")  # queries without keys, NumPy

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
UNTOUCHED = 7.0


def redo(inputs: Inputs, marked: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, both ``UNTOUCHED`` before, after the queries ``marked`` were done again."""
    q, k, v, terms, mask, _, gate = inputs.arguments()
    batch, rows, queries, heads, _ = q.shape
    out = torch.full_like(q, UNTOUCHED)
    lse = torch.full((batch, rows, heads, queries), UNTOUCHED, device=DEVICE)
    for query in marked:
        lse[query] = torch.nan
    triton_redo.redo(q, k, v, terms, mask, gate, out, lse)
    return out, lse


def assert_done_again(inputs: Inputs, marked: list[tuple[int, ...]]) -> None:
    """Blocks of 64 queries with a mark hold the right answer, and the others what they held."""
    out, lse = redo(inputs, marked)
    expected = torch_results(inputs, torch.float64)
    done = torch.zeros_like(lse, dtype=torch.bool)
    for b, i, h, n in marked:
        done[b, i, h, n // triton_redo.BLOCK * triton_redo.BLOCK :][: triton_redo.BLOCK] = True
    by_token = done.transpose(2, 3)
    assert (out[~by_token] == UNTOUCHED).all()
    assert (lse[~done] == UNTOUCHED).all()
    size = expected["out"].abs().max()
    assert (out.double() - expected["out"])[by_token].abs().max() <= 2 * FLOOR[DTYPE] * size
    torch.testing.assert_close(lse[done], expected["lse"][done].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["none", "factors", "dense", "mixed"])
def test_marked_queries_are_done_again(form):
    inputs = make(Case(70, form, DTYPE, i=2, m=40, masks="rows", gate=form == "mixed"))
    inputs.leaves["q"] *= 100
    assert torch_results(inputs, torch.float64)["lse"].abs().max() > 100
    assert_done_again(inputs, [(0, 0, 1, 5), (0, 0, 1, 63), (0, 1, 0, 69)])


def test_every_program_looks_at_its_own_queries(monkeypatch):
    monkeypatch.setattr(triton_redo, "TILES_PER_PROGRAM", 4)
    inputs = make(Case(17, dtype=DTYPE, b=2, i=3, h=3))
    assert_done_again(inputs, [(0, 0, 0, 0), (0, 1, 2, 16), (1, 2, 2, 3)])


def test_marked_queries_without_keys_give_zero():
    inputs = make(Case(17, dtype=DTYPE, i=2, masks="rows empty", gate=True))
    out, lse = redo(inputs, [(0, 1, 0, 3)])
    assert (out[0, 1, :, 0] == 0).all()
    assert lse[0, 1, 0].isneginf().all()


def test_without_a_mark_nothing_is_touched():
    out, lse = redo(make(Case(17, dtype=DTYPE, i=2)), [])
    assert (out == UNTOUCHED).all()
    assert (lse == UNTOUCHED).all()
