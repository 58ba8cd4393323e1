"""The loss over pairs of atoms against its definition in fp64, with its gradient. On a CPU Triton is interpreted."""

from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from pairformer_fast.config import Backend
from pairformer_fast.kernels.smooth_lddt import smooth_lddt

EPS = 1e-8
TRITON = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: pip install 'pairformer_fast[gpu]'"
)
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled beside a GPU")
RUNS = [
    pytest.param(Backend.REFERENCE, "cpu", torch.float64, id="reference-fp64"),
    pytest.param(Backend.REFERENCE, "cpu", torch.float32, id="reference-fp32"),
    pytest.param(Backend.TRITON, "cpu", torch.float32, id="interpreted", marks=[TRITON, INTERPRETED]),
    pytest.param(Backend.TRITON, "cuda", torch.float32, id="triton", marks=[TRITON, pytest.mark.gpu]),
]


@dataclass
class Problem:
    x: Tensor
    target: Tensor
    mask: Tensor
    radius: Tensor

    def run(self, backend: Backend, device: str, dtype: torch.dtype, weight: Tensor) -> tuple[Tensor, Tensor]:
        x = self.x.to(device, dtype).requires_grad_()
        arguments = (self.target.to(device, dtype), self.mask.to(device), self.radius.to(device))
        found = smooth_lddt(x, *arguments, EPS, backend=backend)
        (gradient,) = torch.autograd.grad((found * weight.to(found)).sum(), x)
        return found.detach().cpu().double(), gradient.cpu().double()

    def define(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """By Algorithm 27 of AlphaFold 3, over all pairs at once."""
        x = self.x.double().requires_grad_()
        distances, true = (
            (EPS + (p[..., :, None, :] - p[..., None, :, :]).square().sum(-1)).sqrt()
            for p in (x, self.target.double()[:, None])
        )
        near = sum(torch.sigmoid(t - (distances - true).abs()) for t in (0.5, 1, 2, 4)) / 4
        kept = self.mask[:, None, :, None] & self.mask[:, None, None, :] & ~torch.eye(x.shape[2], dtype=torch.bool)
        counts = kept & (true < self.radius[:, None, :, None])
        pairs = kept.sum((-1, -2)).double() + EPS
        found = ((near * counts).sum((-1, -2)) / pairs) / (counts.sum((-1, -2)).double() / pairs + EPS)
        (gradient,) = torch.autograd.grad((found * weight).sum(), x)
        return found.detach(), gradient


def make(atoms: int, batch: int = 2, samples: int = 3, scale: float = 8.0) -> Problem:
    """Noisy copies of a cloud with padded atoms, some of them of nucleotides."""
    torch.manual_seed(atoms)
    target = scale * torch.randn(batch, atoms, 3)
    x = target[:, None] + torch.randn(batch, samples, atoms, 3) * torch.linspace(0.1, 6, samples)[:, None, None]
    radius = torch.where(torch.rand(batch, atoms) < 0.3, 30.0, 15.0)
    return Problem(x, target, torch.rand(batch, atoms) < 0.8, radius)


def assert_as_defined(problem: Problem, backend: Backend, device: str, dtype: torch.dtype) -> None:
    weight = torch.rand(problem.x.shape[:2], dtype=torch.float64)
    bound = 1e-11 if dtype == torch.float64 else 3e-6
    for got, want in zip(problem.run(backend, device, dtype, weight), problem.define(weight), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=bound * max(float(want.abs().max()), 1e-30))


@pytest.mark.parametrize("atoms", [2, 7, 33, 64, 70, 131])
@pytest.mark.parametrize(("backend", "device", "dtype"), RUNS)
def test_score_and_gradient_are_as_defined(atoms: int, backend: Backend, device: str, dtype: torch.dtype) -> None:
    assert_as_defined(make(atoms), backend, device, dtype)


@pytest.mark.parametrize(("backend", "device", "dtype"), RUNS)
def test_strided_positions(backend: Backend, device: str, dtype: torch.dtype) -> None:
    problem = make(40)
    x = problem.x.transpose(1, 2).contiguous().transpose(1, 2)
    assert_as_defined(replace(problem, x=x, mask=problem.mask.T.contiguous().T), backend, device, dtype)


@pytest.mark.parametrize(("backend", "device", "dtype"), RUNS)
def test_one_sample_far_away_and_one_that_is_exact(backend: Backend, device: str, dtype: torch.dtype) -> None:
    problem = make(50, batch=1, samples=2)
    problem.x[:, 0] *= 1e4
    problem.x[:, 1] = problem.target
    weight = torch.ones(1, 2, dtype=torch.float64)
    found, gradient = problem.run(backend, device, dtype, weight)
    exact = sum(1 / (1 + torch.tensor(-t, dtype=torch.float64).exp()) for t in (0.5, 1, 2, 4)) / 4
    assert found[0].tolist() == pytest.approx([0, float(exact)], abs=1e-6)
    assert gradient.isfinite().all()
    assert not gradient[0, 1].any()


@pytest.mark.parametrize(("backend", "device", "dtype"), RUNS)
def test_without_pairs_the_score_is_zero(backend: Backend, device: str, dtype: torch.dtype) -> None:
    alone, masked = make(1), make(9)
    masked.mask[:] = False
    for problem in (alone, masked):
        found, gradient = problem.run(backend, device, dtype, torch.ones(2, 3))
        assert not found.any()
        assert not gradient.any()


@pytest.mark.parametrize(("backend", "device", "dtype"), RUNS)
def test_positions_that_are_not_numbers_show(backend: Backend, device: str, dtype: torch.dtype) -> None:
    problem = make(40)
    problem.x[0, 1, 3] = torch.nan
    found, gradient = problem.run(backend, device, dtype, torch.ones(2, 3))
    assert found.isnan().nonzero().tolist() == [[0, 1]]
    assert gradient[0, 1].isnan().any()
    assert gradient[1].isfinite().all()


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from pairformer_fast.kernels.smooth_lddt import reference

    asked, pairs = [], reference.pairs
    monkeypatch.setattr(reference, "pairs", lambda *args: asked.append(args[-1]) or pairs(*args))
    problem = make(5)
    smooth_lddt(problem.x, problem.target, problem.mask, problem.radius, EPS)
    smooth_lddt(problem.x.requires_grad_(), problem.target, problem.mask, problem.radius, EPS).sum().backward()
    assert asked == [False, True]
    assert problem.x.grad is not None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 4, 3)}, ValueError, r"x must be \[B, S, A, 3\], but is \[2, 4, 3\]"),
        ({"target": torch.zeros(2, 5, 3)}, ValueError, r"target must be \[2, 4, 3\]"),
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, ValueError, r"mask must be \[2, 4\]"),
        ({"radius": torch.zeros(2, 4, device="meta")}, ValueError, "radius must be on the device of x"),
        ({"x": torch.zeros(2, 3, 4, 3, dtype=torch.bfloat16)}, TypeError, r"call .float\(\) first"),
        ({"mask": torch.ones(2, 4)}, TypeError, "mask > 0.5"),
    ],
)
def test_misfits_are_named(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    problem = replace(make(4), **change)
    with pytest.raises(error, match=message):
        smooth_lddt(problem.x, problem.target, problem.mask, problem.radius, EPS)


@TRITON
def test_the_kernel_refuses_fp64() -> None:
    problem = make(4)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = problem.x.to(device).double()
    with pytest.raises(TypeError, match=r"float64; choose backend 'reference'"):
        smooth_lddt(
            x, *(v.to(device) for v in (problem.target, problem.mask, problem.radius)), EPS, backend=Backend.TRITON
        )
