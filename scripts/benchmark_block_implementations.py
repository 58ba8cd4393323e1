"""Our Pairformer block and OpenFold3's with the same weights, behind one interface.

Dropout is off in all of them, with gradients too. Ours is given bool masks, OpenFold3's masks in the dtype of z.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

import torch
from benchmark_block_problem import Problem, Result
from torch import Tensor, nn

from pairformer_fast.bias import collect_reports, set_attention
from pairformer_fast.config import AttentionConfig, Backend, BiasMethod
from pairformer_fast.model.pairformer import PairformerBlock

BACKEND = Backend.TRITON
TRITON, CUEQUIVARIANCE = "use_triton_triangle_kernels", "use_cueq_triangle_kernels"


@dataclass
class Prepared:
    """A module with the weights of a problem, and its forward on s and z."""

    problem: Problem
    module: nn.Module
    forward: Callable[[Tensor, Tensor], Result]

    def run(self) -> Result:
        """Forward, or forward and backward under autocast with the gradients of inputs and parameters."""
        case, s, z = self.problem.case, self.problem.s, self.problem.z
        if not case.backward:
            with torch.no_grad():
                return self.forward(s, z)
        with torch.autocast(z.device.type, case.compute, enabled=case.compute is not case.dtype):
            out = self.forward(s, z)
        given = {"s": s, "z": z, **dict(self.module.named_parameters())}
        gradients = torch.autograd.grad((out["s"], out["z"]), list(given.values()), self.problem.upstream)
        return out | {f"d{name}": gradient for name, gradient in zip(given, gradients, strict=True)}

    def biases(self) -> dict[str, Any] | None:
        """What our block did with each pair bias in the last run: ``dense``, or the rank of every head's factors."""
        if not isinstance(self.module, PairformerBlock):
            return None
        reports = collect_reports(self.module)
        found = {report["name"].split(".")[-3]: report for report in reports}
        return {
            name: list(report["rank"]) if report["choice"] == "factors" else "dense" for name, report in found.items()
        }


@dataclass(frozen=True)
class Implementation:
    """Name in the rows, and where it is measured: operation, directions and largest N."""

    name: str
    prepare: Callable[[Problem], Prepared]
    op: str = "pairformer_block"
    directions: tuple[str, ...] = ("fwd", "fwdbwd")
    largest_n: int = 4096
    distributions: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return self.name.startswith("pairformer_fast")

    def version(self) -> str | None:
        """Versions of the peer's packages, None for our own and if they are not installed."""
        try:
            return ", ".join(f"{name} {metadata.version(name)}" for name in self.distributions) or None
        except metadata.PackageNotFoundError:
            return None


def our_block(problem: Problem, config: AttentionConfig) -> PairformerBlock:
    block = PairformerBlock(problem.case.config)
    _load(block, problem)
    set_attention(block, config)
    return block


def our_dense() -> AttentionConfig:
    return AttentionConfig(backend=BACKEND, bias=BiasMethod.DENSE)


def _ours(config: Callable[[], AttentionConfig], *, in_place: bool = False) -> Callable[[Problem], Prepared]:
    def prepare(problem: Problem) -> Prepared:
        block = our_block(problem, config())
        masks = problem.mask, problem.pair_mask
        return Prepared(problem, block, lambda s, z: _named(block(s, z, *masks, out=z if in_place else None)))

    return prepare


def _openfold3(**options: bool) -> Callable[[Problem], Prepared]:
    def prepare(problem: Problem) -> Prepared:
        if options.get(CUEQUIVARIANCE):
            import_module("cuequivariance_torch")
        block = their_block(problem)
        mask, pair_mask = (mask.to(problem.case.dtype) for mask in (problem.mask, problem.pair_mask))
        return Prepared(problem, block, lambda s, z: _named(block(s, z, mask, pair_mask, **options)))

    return prepare


def their_block(problem: Problem) -> nn.Module:
    """OpenFold3's block with its own defaults for what a Pairformer config does not say."""
    config = problem.case.config
    block = import_module("openfold3.core.model.latent.pairformer").PairFormerBlock(
        **config.model_dump(exclude={"no_blocks"}), transition_type="swiglu", fuse_projection_weights=False, inf=1e9
    )
    _load(block, problem)
    return block


def _load(block: nn.Module, problem: Problem) -> None:
    block.load_state_dict(problem.weights)
    block.eval().to(problem.device, problem.case.dtype)


def _named(updated: tuple[Tensor, Tensor]) -> Result:
    return dict(zip("sz", updated, strict=True))


OPENFOLD3 = ("openfold3",)
WITH_CUEQUIVARIANCE = ("openfold3", "cuequivariance-torch")
FORWARD = ("fwd",)
BLOCKS = (
    Implementation("pairformer_fast dense", _ours(our_dense)),
    Implementation("pairformer_fast dense, in place", _ours(our_dense, in_place=True), directions=FORWARD),
    Implementation("pairformer_fast auto", _ours(AttentionConfig)),
    Implementation("OpenFold3 cuEquivariance", _openfold3(**{CUEQUIVARIANCE: True}), distributions=WITH_CUEQUIVARIANCE),
    Implementation(
        "OpenFold3 cuEquivariance, in place",
        _openfold3(inplace_safe=True, **{CUEQUIVARIANCE: True}),
        directions=FORWARD,
        distributions=WITH_CUEQUIVARIANCE,
    ),
    Implementation("OpenFold3 Triton", _openfold3(**{TRITON: True}), distributions=OPENFOLD3),
    Implementation(
        "OpenFold3 Triton, in place",
        _openfold3(inplace_safe=True, **{TRITON: True}),
        directions=FORWARD,
        distributions=OPENFOLD3,
    ),
    Implementation("OpenFold3 eager", _openfold3(), distributions=OPENFOLD3),
    Implementation(
        "OpenFold3 eager, in place", _openfold3(inplace_safe=True), directions=FORWARD, distributions=OPENFOLD3
    ),
    Implementation("pairformer_fast reference", _ours(AttentionConfig.reference), largest_n=768),
)
"""Ours and its fastest peer first: what a run that ends early must have."""
