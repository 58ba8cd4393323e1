"""The transition with ReLU and offsets beside what ``test_transitions.py`` asks of it."""

import pytest
import torch

from pairformer_fast.config import Backend
from tests.kernels.cases import DEVICE
from tests.kernels.transitions import RELU, Case

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")

call, make = RELU.call, RELU.make


def test_update_of_masked_tokens_is_zero():
    inputs = make(Case((2, 4, 9)))
    for backend in (Backend.TRITON, Backend.REFERENCE):
        assert not call(inputs, backend)[~inputs["mask"]].any()


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
