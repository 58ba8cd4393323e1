"""Kernels to tune: their shape classes, candidate tiles, and what a candidate computes and takes on one GPU.

Run as a program this tries the candidates of one target (family and number) once and prints a line for each that ran:
``tune.py`` does so for all targets at a time, since compilation takes longer than the measurements, and measures only
candidates that neither crashed nor hung there.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple

import torch
from benchmark_problem import Case, Kind, Problem
from torch import Tensor

from pairformer_fast.kernels.flash_bias.hopper_tiles import HopperTiles, Widths, fit
from pairformer_fast.kernels.flash_bias.terms import BiasTerms
from pairformer_fast.kernels.flash_bias.triton_tiles import Tiles

HOPPER_TOKENS = 768
PLAIN_TOKENS = {torch.bfloat16: 512, torch.float32: 384}
WARMUP_MS, MEASURED_MS = 10, 40
MAX_MESSAGE = 200

LIMITS = {torch.bfloat16: (0.03, 0.1), torch.float32: (1e-4, 1e-3)}
"""Largest relative error (Frobenius norm) against fp64 of output, dq, dk and dv, and of the bias's gradients."""

NEEDS = {
    "backward_dq": frozenset({"q", "phi_q"}),
    "backward_dkv": frozenset({"k", "v", "phi_k"}),
    "backward_pairs": frozenset({"dense"}),
}

# Consumers, rows of a group, streamed tokens, stages; as many of the stages as fit.
HOPPER_CANDIDATES = {
    "forward": [(3, 2, 64, 4), (4, 2, 32, 5), (2, 2, 64, 4), (3, 1, 64, 4), (3, 2, 32, 4), (2, 1, 64, 4)],
    "backward_dq": [(3, 1, 64, 4), (2, 2, 64, 3), (2, 1, 64, 4), (3, 1, 32, 5), (2, 2, 32, 4)],
    "backward_dkv": [(3, 1, 32, 5), (2, 1, 64, 4), (2, 1, 32, 5), (2, 2, 32, 4)],
    "backward_pairs": [(3, 1, 64, 2), (3, 1, 64, 3), (3, 1, 64, 4), (3, 1, 64, 5)],
}

# Queries, keys, rows of a group, warps, stages.
HALF_CANDIDATES = {
    "forward": [(128, 64, 2, 8, 3), (128, 64, 1, 8, 3), (128, 64, 1, 8, 2), (64, 64, 2, 4, 3), (128, 32, 2, 8, 3)],
    "backward_dq": [(64, 64, 1, 4, 2), (64, 64, 1, 8, 2), (128, 64, 1, 8, 2), (64, 32, 1, 4, 2), (64, 32, 1, 8, 2)],
    "backward_dkv": [(64, 64, 1, 4, 2), (64, 64, 1, 8, 2), (32, 64, 1, 8, 2), (32, 64, 1, 4, 2), (64, 32, 1, 8, 2)],
    "backward_pairs": [(64, 64, 1, 4, 3), (64, 64, 1, 4, 2), (64, 64, 1, 8, 2), (64, 32, 1, 4, 2)],
}
FLOAT_CANDIDATES = [(32, 32, 1, 8, 1), (32, 16, 1, 8, 1), (16, 16, 1, 8, 1), (32, 32, 1, 4, 1)]


class Family(StrEnum):
    """Kernels in Gluon for Hopper GPUs, and the general ones."""

    HOPPER = "hopper"
    PLAIN = "plain"


class Target(NamedTuple):
    """One kernel and shape class; ``rank`` is measured, ``limits`` are the table's keys for the class."""

    family: Family
    kind: str
    dim: int
    rank: int
    dtype: torch.dtype
    tokens: int
    limits: dict[str, int]
    candidates: tuple[HopperTiles | Tiles, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """Keys that say what was measured."""
        dense = self.kind == "backward_pairs"
        return {
            "family": str(self.family),
            "kind": self.kind,
            "dtype": str(self.dtype).removeprefix("torch."),
            "n": self.tokens,
            "dim": self.dim,
            "bias": str(Kind.DENSE if dense else Kind.FACTORS),
            "rank": None if dense else self.rank,
        }


def targets(family: Family) -> list[Target]:
    """All kernels and shape classes of a family, in the order of the table: narrow classes first."""
    if family is Family.HOPPER:
        return [
            _hopper_target(kind, dim, rank)
            for kind in HOPPER_CANDIDATES
            for dim in (32, 64)
            for rank in ((128,) if kind == "backward_pairs" else (32, 64, 128))
        ]
    half = [{"bytes": 2, "dim": 32, "rank": 64}, {"bytes": 2, "dim": 64, "rank": 64}, {"bytes": 2}]
    single = [{"dim": 32, "rank": 32}, {"dim": 64, "rank": 64}, {}]
    return [
        _plain_target(kind, torch.bfloat16 if "bytes" in limits else torch.float32, limits)
        for kind in HALF_CANDIDATES
        for limits in (*half, *single)
    ]


def _hopper_target(kind: str, dim: int, rank: int) -> Target:
    dense = kind == "backward_pairs"
    widths = Widths(dim, 0 if dense else rank, dense)
    fitting = (fit(kind, HopperTiles(*tiles), widths) for tiles in HOPPER_CANDIDATES[kind])
    candidates = tuple(dict.fromkeys(tiles for tiles in fitting if tiles))
    limits = {"dim": dim, "rank": rank}
    return Target(Family.HOPPER, kind, dim, rank, torch.bfloat16, HOPPER_TOKENS, limits, candidates)


def _plain_target(kind: str, dtype: torch.dtype, limits: dict[str, int]) -> Target:
    """The widest shape of the class: what fits it fits the rest."""
    candidates = HALF_CANDIDATES[kind] if dtype == torch.bfloat16 else FLOAT_CANDIDATES
    tiles = tuple(Tiles(*one) for one in candidates)
    dim, rank = limits.get("dim", 128), limits.get("rank", 128)
    if kind == "backward_pairs" and dim == 128:
        # Beside a table these tiles also hold factors, which the measurement does not.
        tiles = tuple(one for one in tiles if one.stages <= 2)
    return Target(Family.PLAIN, kind, dim, rank, dtype, PLAIN_TOKENS[dtype], limits, tiles)


class DeviceLost(RuntimeError):
    """The CUDA context is gone: no further kernel can run in this process."""


@dataclass
class Runner:
    """Launches the kernel of one target on one problem."""

    target: Target
    problem: Problem

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the forward pass."""
        from pairformer_fast.kernels.flash_bias import triton_forward

        return triton_forward.forward(*self._operands, None, None, None)

    @cached_property
    def overhead(self) -> float:
        """Milliseconds of a backward pass without the target's kernel."""
        if self.target.kind == "forward":
            return 0.0
        return _milliseconds(lambda: self._backward(frozenset(), {}))

    def run(self, tiles: HopperTiles | Tiles) -> dict[str, Tensor]:
        """Results by the names of :class:`benchmark_problem.Expected`."""
        kind = self.target.kind
        if kind == "forward":
            return {"out": self._forward(tiles)}
        gradients = self._backward(NEEDS[kind], {kind: tiles})
        names = {"q": "dq", "k": "dk", "v": "dv", "dense": "bias"}
        return {names.get(name, name): getattr(gradients, name) for name in NEEDS[kind]}

    def fault(self, results: dict[str, Tensor]) -> str:
        """What is wrong with results, if anything."""
        expected = self.problem.expected(self._kind)
        of_tokens, of_bias = LIMITS[self.target.dtype]
        beyond = []
        for name, result in results.items():
            sampled = name not in expected.bias
            got, want = (result[0, self.problem.rows], getattr(expected, name)) if sampled else (result[0], None)
            want = expected.bias[name] if want is None else want
            error = float((got.double() - want).norm() / want.norm())
            if not error <= (of_tokens if sampled else of_bias):
                beyond.append(f"{name} is off by {error:.2g}")
        return ", ".join(beyond)

    def measure(self, tiles: HopperTiles | Tiles) -> dict[str, Any]:
        """Time, registers and spilled registers of a thread, or the error that took their place.

        Raises
        ------
        DeviceLost
            If the candidate destroyed the CUDA context.
        """
        kernel = _kernel(self.target)
        kernel.device_caches.clear()  # so that what is there afterwards is the candidate
        try:
            results = self.run(tiles)
            torch.cuda.synchronize()
            if found := self.fault(results):
                return {"error": f"wrong result: {found}"}
            [compiled] = kernel.device_caches[torch.cuda.current_device()][0].values()
            ms = _milliseconds(lambda: self.run(tiles)) - self.overhead
        except Exception as error:
            try:
                torch.cuda.synchronize()
            except RuntimeError as lost:
                raise DeviceLost(f"{self.target.identity} {tuple(tiles)}: {describe(lost)}") from error
            return {"error": describe(error)}
        return {"ms": round(ms, 4), "registers": compiled.n_regs, "spills": compiled.n_spills}

    @property
    def _kind(self) -> Kind:
        return Kind.DENSE if self.target.kind == "backward_pairs" else Kind.FACTORS

    @cached_property
    def _operands(self) -> tuple[Tensor, Tensor, Tensor, BiasTerms]:
        problem = self.problem
        if self._kind is Kind.DENSE:
            terms = BiasTerms(dense=problem.dense[None])
        else:
            terms = BiasTerms(phi_q=problem.phi_q[None], phi_k=problem.phi_k[None])
        return problem.q[None], problem.k[None], problem.v[None], terms

    def _forward(self, tiles: HopperTiles | Tiles) -> Tensor:
        if isinstance(tiles, HopperTiles):
            from pairformer_fast.kernels.flash_bias import hopper_forward

            return hopper_forward.forward(*self._operands, None, None, tiles=tiles)[0]
        from pairformer_fast.kernels.flash_bias import triton_forward

        return triton_forward.forward(*self._operands, None, None, None, tiles=tiles)[0]

    def _backward(self, needs: frozenset[str], tiles: dict[str, Any]) -> Any:
        assert self.problem.dout is not None
        q, k, v, terms = self._operands
        arrived = self.problem.dout[None], None, q, k, v, *self.statistics, terms
        if self.target.family is Family.HOPPER:
            from pairformer_fast.kernels.flash_bias import hopper_backward

            return hopper_backward.backward(*arrived, None, None, needs, tiles=tiles)
        from pairformer_fast.kernels.flash_bias import triton_backward

        return triton_backward.backward(*arrived, None, None, None, needs, tiles=tiles)


def make_runner(target: Target, device: torch.device) -> Runner:
    """Triangle attention with as many rows as tokens and four heads."""
    case = Case("tune", "fwdbwd", target.tokens, target.tokens, 4, target.dim, target.rank, target.dtype)
    return Runner(target, Problem(case, device))


def describe(error: BaseException) -> str:
    """Class and end of the message of an error, on one line: compilers print the program before the reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[-MAX_MESSAGE:]}"


def _kernel(target: Target) -> Any:
    from pairformer_fast.kernels.flash_bias import triton_backward, triton_forward

    if target.family is Family.HOPPER:
        from pairformer_fast.kernels.flash_bias import hopper_backward, hopper_forward

        both = hopper_backward.backward_kernel
        kernels = hopper_forward.forward_kernel, both, both, hopper_backward.pairs_kernel
    else:
        kernels = (
            triton_forward.forward_kernel,
            triton_backward.dq_kernel,
            triton_backward.dkv_kernel,
            triton_backward.pairs_kernel,
        )
    return dict(zip(("forward", *NEEDS), kernels, strict=True))[target.kind]


def _milliseconds(call: Any) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=WARMUP_MS, rep=MEASURED_MS, return_mode="median")


def main(family: str, number: str) -> None:
    """Run every candidate of a target once; print its position and the error, if any, as JSON."""
    target = targets(Family(family))[int(number)]
    runner = make_runner(target, torch.device("cuda"))
    for position, tiles in enumerate(target.candidates):
        error = None
        try:
            runner.run(tiles)
        except Exception as caught:
            error = describe(caught)
        torch.cuda.synchronize()
        print(json.dumps([position, error]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
