"""What flash_bias_attention refuses, and which implementation it takes."""

import pytest
import torch
from torch import Tensor

from pairformer_fast.config import Backend
from pairformer_fast.kernels.flash_bias import Factors, api, flash_bias_attention


def arguments(**changes) -> dict[str, Tensor | Factors]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 2, 8, generator=generator)
    bias = torch.randn(2, 2, 7, 7, generator=generator)
    return {"q": q, "k": k, "v": v, "bias": bias, "mask": torch.ones(2, 3, 7, dtype=torch.bool), **changes}


def test_auto_is_torch_on_a_cpu_and_unknown_backends_are_named():
    got, want = (flash_bias_attention(**arguments(), backend=backend) for backend in (Backend.AUTO, Backend.TORCH))
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="cudnn"):
        flash_bias_attention(**arguments(), backend="cudnn")


def test_auto_is_the_reference_where_the_log_sum_exp_is_wanted():
    results = (
        flash_bias_attention(**arguments(), backend=backend, return_lse=True)
        for backend in (Backend.AUTO, Backend.REFERENCE)
    )
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_torch_refuses_to_return_the_log_sum_exp():
    with pytest.raises(ValueError, match=r"return_lse.*'reference'.*'triton'"):
        flash_bias_attention(**arguments(), backend=Backend.TORCH, return_lse=True)


@pytest.mark.parametrize(
    ("installed", "interpreted", "dtype", "dim", "error", "words"),
    [
        (False, False, torch.float32, 8, RuntimeError, r"pip install 'pairformer_fast\[gpu\]'"),
        (True, False, torch.float32, 8, RuntimeError, "CUDA device, but got cpu"),
        (True, True, torch.float64, 8, TypeError, "float64"),
        (True, True, torch.float32, 136, ValueError, "up to 128, but q has 136"),
    ],
)
def test_explicit_triton_never_falls_back(monkeypatch, installed, interpreted, dtype, dim, error, words):
    monkeypatch.setattr(api, "HAS_TRITON", installed)
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    q = torch.zeros(1, 3, 5, 2, dim, dtype=dtype)
    with pytest.raises(error, match=words):
        flash_bias_attention(q, q, q, backend=Backend.TRITON)


PHI = torch.zeros(2, 2, 7, 4)
FLAGS = torch.ones(2, 2, 1, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"q": torch.zeros(3, 7, 2)}, ValueError, ["q", "[3, 7, 2]"]),
        ({"q": torch.zeros(2, 3, 7, 2, 8, dtype=torch.int64)}, TypeError, ["q", "int64"]),
        ({"q": torch.zeros(2, 0, 7, 2, 8)}, ValueError, ["q", "[2, 0, 7, 2, 8]"]),
        ({"q": torch.zeros(2, 2, 3, 7, 2, 8)}, ValueError, ["k", "[*, I, M, H, D]", "[2, 2, 3, M, 2, 8]"]),
        ({"k": torch.zeros(2, 3, 0, 2, 8)}, ValueError, ["k", "[2, 3, 0, 2, 8]"]),
        ({"k": torch.zeros(2, 4, 7, 2, 8)}, ValueError, ["k", "[2, 3, M, 2, 8]", "[2, 4, 7, 2, 8]"]),
        ({"k": torch.zeros(2, 3, 6, 2, 8)}, ValueError, ["v", "[2, 3, 6, 2, 8]", "[2, 3, 7, 2, 8]"]),
        ({"v": torch.zeros(2, 3, 7, 2, 8).double()}, TypeError, ["v", "float32", "float64"]),
        ({"v": torch.zeros(2, 3, 7, 2, 8, device="meta")}, ValueError, ["v", "cpu", "meta"]),
        ({"bias": torch.zeros(2, 2, 7, 6)}, ValueError, ["bias", "[2, 2, 7, 7]", "[2, 2, 7, 6]"]),
        ({"bias": torch.zeros(2, 2, 7, 7).bfloat16()}, TypeError, ["bias", "float32", "bfloat16"]),
        ({"bias": 1.0}, TypeError, ["bias", "float"]),
        ({"bias": Factors(PHI, torch.zeros(2, 2, 7, 5))}, ValueError, ["phi_q", "phi_k", "4", "5"]),
        ({"bias": Factors(torch.zeros(2, 2, 6, 4), PHI)}, ValueError, ["phi_q", "[2, 2, 7, R]", "[2, 2, 6, 4]"]),
        ({"bias": Factors(torch.zeros(2, 2, 7, 0), torch.zeros(2, 2, 7, 0))}, ValueError, ["phi_q", "R >= 1"]),
        ({"bias": Factors(PHI, PHI, table=torch.zeros(3, 5))}, ValueError, ["table", "[2, an odd", "[3, 5]"]),
        ({"bias": Factors(PHI, PHI, table=torch.zeros(2, 4))}, ValueError, ["table", "odd", "[2, 4]"]),
        ({"bias": Factors(PHI, PHI, table=torch.zeros(2, 5).half())}, TypeError, ["table", "float32", "float16"]),
        ({"bias": Factors(PHI, PHI, dense=torch.zeros(2, 2, 7, 7))}, ValueError, ["dense", "dense_tiles = None"]),
        ({"bias": Factors(PHI, PHI, dense_tiles=FLAGS)}, ValueError, ["dense_tiles", "dense = None"]),
        (
            {"bias": Factors(PHI, PHI, dense=torch.zeros(2, 2, 7, 7), dense_tiles=FLAGS[:, :1])},
            ValueError,
            ["dense_tiles", "[2, 2, 1, 1]", "[2, 1, 1, 1]"],
        ),
        (
            {"bias": Factors(PHI, PHI, dense=torch.zeros(2, 2, 6, 7), dense_tiles=FLAGS)},
            ValueError,
            ["dense ", "[2, 2, 7, 7]", "[2, 2, 6, 7]"],
        ),
        ({"mask": torch.ones(2, 3, 7)}, TypeError, ["mask", "bool", "float32"]),
        ({"mask": torch.ones(2, 7, dtype=torch.bool)}, ValueError, ["mask", "[2, 3, 7]", "[2, 7]"]),
        ({"pair_mask": torch.ones(2, 7, 7)}, TypeError, ["pair_mask", "bool", "float32"]),
        ({"pair_mask": torch.ones(2, 3, 7, dtype=torch.bool)}, ValueError, ["pair_mask", "[2, 7, 7]", "[2, 3, 7]"]),
        ({"gate": torch.ones(2, 3, 7, 2, 1)}, ValueError, ["gate", "[2, 3, 7, 2, 8]", "[2, 3, 7, 2, 1]"]),
        ({"gate": torch.ones(2, 3, 7, 2, 8).half()}, TypeError, ["gate", "float32", "float16"]),
    ],
)
def test_errors_name_argument_and_values(changes, error, words):
    with pytest.raises(error) as caught:
        flash_bias_attention(**arguments(**changes))
    for word in words:
        assert word in str(caught.value)
