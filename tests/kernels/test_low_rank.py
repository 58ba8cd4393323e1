"""Steps of randomised factors in Triton are those in plain PyTorch. On a CPU they run in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")

from pairformer_fast.kernels.low_rank import reference, triton_steps

DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled beside a GPU")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
SHAPES = [(2, 50, 7), (1, 1500, 32), (1, 130, 64), (2, 17, 1)]


def thin(shape, device):
    torch.manual_seed(0)
    return torch.randn(shape, device=device) + 0.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_inverse_cholesky_also_of_columns_that_depend_on_each_other(shape, device):
    x = thin(shape, device).double()
    x[..., -1] = x[..., 0]
    found, wanted = (one.inverse_cholesky(x.mT @ x, 1e-10) for one in (triton_steps, reference))
    assert found.triu(1).count_nonzero() == 0
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-8 * float(wanted.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
def test_a_gram_matrix_of_zeros_has_a_finite_inverse(device):
    assert (
        triton_steps.inverse_cholesky(torch.zeros(1, 5, 5, dtype=torch.float64, device=device), 1e-10).isfinite().all()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_centred_and_balanced(shape, dtype, device):
    x, scale = thin(shape, device), torch.rand(shape[0], 1, 1, device=device) + 0.5
    basis = torch.linalg.qr(x.double()).Q if shape[1] >= shape[2] else x.double()
    torch.testing.assert_close(triton_steps.centred(x, scale, dtype), reference.centred(x, None, scale, dtype))
    x[..., 0] = 1e-9 * x[..., 0]
    found = triton_steps.balanced(basis, x, scale, dtype)
    for one, other in zip(found, reference.balanced(basis, x, None, None, scale, dtype), strict=True):
        torch.testing.assert_close(one, other)
    assert not found[2][:, 0].any()
    assert not found[0][..., 0].any()
