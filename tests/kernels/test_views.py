"""What Boltz and Protenix give to the operations: transposed views of the pair representation, parts of weights."""

import pytest
import torch
from torch import Tensor

from pairformer_fast.config import Backend
from pairformer_fast.integrations.triangles import attend_triangles
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.triangle_multiplication import TriangleWeights, triangle_multiplication
from pairformer_fast.model.attention import TriangleAttention
from tests.kernels.cases import DEVICE

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")

N, C = 17, 32


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(2, N, N, generator=generator) > 0.2
    return torch.randn(2, N, N, C, generator=generator).to(DEVICE), (keep | torch.eye(N, dtype=torch.bool)).to(DEVICE)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def test_the_ending_node_in_place_with_the_orientation_of_alphafold_2():
    """As AlphaFold 2's Algorithm 14 is written, with b_ki."""
    module = TriangleAttention(C, 16, 2).to(DEVICE)
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5 + (parameter.dim() == 1))
    module.mha.core.config = module.mha.core.config.model_copy(update={"backend": Backend.TRITON})
    z, keep = problem()
    x, mha = module.layer_norm(z), module.mha
    q, k, v, g = (getattr(mha, f"linear_{name}")(x).unflatten(-1, (2, -1)) for name in "qkvg")
    logits = torch.einsum("bijhc,bkjhc->bijkh", q, k) * q.shape[-1] ** -0.5
    logits = logits + module.linear_z(x).transpose(1, 2)[:, :, None]
    logits = logits.masked_fill(~keep.transpose(1, 2)[:, None, :, :, None], -torch.inf)
    attended = torch.einsum("bijkh,bkjhc->bijhc", logits.softmax(3), v)
    expected = z + mha.linear_o((attended * g.sigmoid()).flatten(-2))

    found = attend_triangles(module, z, keep, None, ending=True, out=z, backend=Backend.TRITON)
    assert distance(found, expected) < 1e-5
    assert found.data_ptr() == z.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("incoming", [False, True])
def test_triangle_multiplication_with_halves_of_fused_weights(incoming):
    z, keep = problem()
    generator = torch.Generator().manual_seed(1)
    p, g, gate, out = (
        (torch.randn(rows, C, generator=generator) * C**-0.5).to(DEVICE) for rows in (2 * C, 2 * C, C, C)
    )
    norm = NormParameters(torch.ones(C, device=DEVICE), torch.zeros(C, device=DEVICE))
    (a, b), (a_gate, b_gate) = p.chunk(2), g.chunk(2)
    views = TriangleWeights(norm, norm, a, a_gate, b, b_gate, gate, out)
    copies = TriangleWeights(norm, norm, a.clone(), a_gate.clone(), b.clone(), b_gate.clone(), gate, out)
    found = triangle_multiplication(z, keep, views, incoming=incoming, backend=Backend.TRITON)
    expected = triangle_multiplication(z, keep, copies, incoming=incoming, backend=Backend.REFERENCE)
    assert a.data_ptr() == p.data_ptr()
    assert distance(found, expected) < 1e-5
