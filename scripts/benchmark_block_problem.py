"""Inputs of one case of the block benchmark, and the errors of results against the exact computation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from benchmark_block_exact import ExactBlock
from torch import Tensor

from pairformer_fast.config import PairformerConfig
from pairformer_fast.model.pairformer import PairformerBlock

PRODUCTION = PairformerConfig(no_blocks=1)
TRIANGLE_MULTIPLICATION, TRANSITION = "pair_stack.tri_mul_out", "pair_stack.pair_transition"
TRIANGLE_ATTENTION, ATTENTION_PAIR_BIAS = "pair_stack.tri_att_start", "attn_pair_bias"
"""Modules of a block that are also measured alone."""
BIAS_STD = 2.0
PAIR_RANK = 4
PAIR_NOISE = 0.05
DOUBLE_BELOW = 768
"""Results are held against fp64 below this N and against fp32 from it on."""
COMPARED_ELEMENTS = 2**27
"""Elements that are compared at once."""
LEAST_NORM = 0.01
"""Least norm, as a part of the median over the parameters, that errors of a parameter's gradient are divided by."""

Result = dict[str, Tensor]
"""Updated ``s`` and ``z`` (of a peer's operation alone: ``single_update`` or ``update``), and gradients: ``d`` and the
name of what of."""
UPDATES = ("s", "z", "single_update", "update", "projected", "bias")


@dataclass(frozen=True)
class Case:
    """One size and direction; weights and inputs have ``dtype``, autocast computes in ``compute``."""

    section: str
    direction: str
    n: int
    dtype: torch.dtype = torch.bfloat16
    compute: torch.dtype = torch.bfloat16
    op: str = "pairformer_block"
    config: PairformerConfig = PRODUCTION
    peers: bool = True

    @property
    def backward(self) -> bool:
        return self.direction == "fwdbwd"

    @property
    def pair_bytes(self) -> int:
        """Bytes of z in bf16, the unit of memory."""
        return 2 * self.n**2 * self.config.c_z


ALONE: dict[str, Callable[[ExactBlock, Tensor, Problem], Tensor]] = {
    "triangle_multiplication": lambda block, z, _: block.triangle_multiplication(
        z, TRIANGLE_MULTIPLICATION, incoming=False
    ),
    "triangle_attention": lambda block, z, _: block.triangle_attention(z, TRIANGLE_ATTENTION, ending=False),
    "gated_output": lambda block, z, problem: block.gated_output(z, problem.attended.to(z.dtype), TRIANGLE_ATTENTION),
    "transition": lambda block, z, _: block.transition(z, TRANSITION),
}
"""Operations of a block alone: ``z`` and its exact update."""


def random_weights(config: PairformerConfig, seed: int = 1) -> dict[str, Tensor]:
    """fp32 weights of a block by name: no projection is zero, as some are at initialisation, and no offset.

    The projections to pair biases are scaled so that a bias has a standard deviation of about 2.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in PairformerBlock(config).state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            to_bias = name.endswith("linear_z.weight") and "tri_mul" not in name
            weights[name] = drawn * shape[-1] ** -0.5 * (BIAS_STD if to_bias else 1.0)
        else:
            weights[name] = 0.2 * drawn + (1.0 if "layer_norm" in name and name.endswith("weight") else 0.0)
    return weights


class Problem:
    """Inputs of a case: s ``[1, N, C_s]``, z ``[1, N, N, C_z]``, and gradients of what comes out if they are wanted.

    ``upstream`` are the gradients of the updated s and z, empty for a forward.
    z is of low rank in its two tokens but for some noise. How long our block takes in its default mode depends on that:
    the ranks it finds here are about those in the bundled model (``data/benchmarks/fold.json``). All tokens are kept.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self._generator = torch.Generator(device).manual_seed(2)
        n, config = case.n, case.config
        self._pristine = self._normal(1, n, config.c_s).to(case.dtype), self._pairs()
        self.s, self.z = (x.clone().requires_grad_(case.backward) for x in self._pristine)
        given = self._pristine if case.backward else ()
        self.upstream = tuple(self._normal(*x.shape).to(case.dtype) for x in given)
        self.weights = {name: value.to(device, case.dtype) for name, value in random_weights(config).items()}
        self.mask = torch.ones(1, n, dtype=torch.bool, device=device)
        self.pair_mask = torch.ones(1, n, n, dtype=torch.bool, device=device)

    @property
    def input_bytes(self) -> int:
        """Bytes of s and z as an implementation is given them."""
        return self.s.nbytes + self.z.nbytes

    @cached_property
    def attended(self) -> Tensor:
        """What attention would hand to its gate, ``[1, N, N, H D]``."""
        n, config = self.case.n, self.case.config
        width = config.no_heads_pair * config.c_hidden_pair_att
        return self._normal(1, n, n, width).to(self.case.dtype)

    @property
    def exact(self) -> torch.dtype:
        """What results are held against is computed in this dtype."""
        return torch.float64 if self.case.n < DOUBLE_BELOW else torch.float32

    @torch.no_grad()
    def restore(self) -> None:
        """Put the inputs back, which an implementation that works in place has written to."""
        for given, pristine in zip((self.s, self.z), self._pristine, strict=True):
            given.copy_(pristine)

    def errors(self, result: Result) -> dict[str, float]:
        """Relative errors (Frobenius norm) of the updates and the gradients; infinite where anything is not finite.

        ``parameters`` is that of all parameters' gradients in one vector, ``worst parameter`` the largest of any.
        """
        bases = dict(zip("sz", self._pristine, strict=True))
        compared = [name for name in (*UPDATES, "ds", "dz") if name in self.expected.keys() & result]
        found = {name: error(result[name], self.expected[name], bases.get(name)) for name in compared}
        parameters = {
            name: value for name, value in self.expected.items() if name.startswith("d") and name not in compared
        }
        if parameters:
            norms = torch.stack([want.norm() for want in parameters.values()])
            differences = torch.stack(
                [(result[name].to(want.dtype) - want).norm() for name, want in parameters.items()]
            )
            found["parameters"] = float(differences.norm() / norms.norm())
            found["worst parameter"] = float((differences / norms.clamp_min(LEAST_NORM * norms.median())).max())
        return {name: value if value < torch.inf else float("inf") for name, value in found.items()}

    @cached_property
    def expected(self) -> Result:
        """Exact results; what their computation held is given back, for implementations that ask for free memory."""
        found = self._compute()
        torch.cuda.empty_cache()
        return found

    def _compute(self) -> Result:
        case, exact = self.case, self.exact
        s, z = (x.to(exact, copy=True).requires_grad_(case.backward) for x in self._pristine)
        weights = {name: value.to(exact).requires_grad_(case.backward) for name, value in self.weights.items()}
        block = ExactBlock(case.config, weights)
        with torch.set_grad_enabled(case.backward):
            if case.op == "layer_norm_linear":
                return block.attention_inputs(z, TRIANGLE_ATTENTION)
            if case.op == "attention_pair_bias":
                update = block.single_attention(s, z)
                return {"s": s + update, "single_update": update}
            if case.op in ALONE:
                out = ALONE[case.op](block, z, self)
                return {"z": out, "update": out - self._pristine[1]}
            out_s, out_z = block.block(s, z)
        found = {"s": out_s.detach(), "z": out_z.detach()}
        if case.backward:
            given = {"s": s, "z": z, **weights}
            upstream = tuple(x.to(exact) for x in self.upstream)
            gradients = torch.autograd.grad((out_s, out_z), list(given.values()), upstream)
            found |= {f"d{name}": gradient for name, gradient in zip(given, gradients, strict=True)}
        return found

    def _normal(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device).normal_(generator=self._generator)

    def _pairs(self) -> Tensor:
        n, channels = self.case.n, self.case.config.c_z
        left, right = self._normal(n, PAIR_RANK), self._normal(n, PAIR_RANK)
        mixed = self._normal(PAIR_RANK, channels) * PAIR_RANK**-0.5
        z = torch.empty(1, n, n, channels, dtype=self.case.dtype, device=self.device)
        for rows, one in zip(z[0].split(64), left.split(64), strict=True):
            rows.copy_((one[:, None] * right) @ mixed + PAIR_NOISE * self._normal(*rows.shape))
        return z


def error(got: Tensor, want: Tensor, base: Tensor | None = None) -> float:
    """Norm of ``got - want`` over that of ``want - base``, summed by slabs of the second axis."""
    step = max(1, COMPARED_ELEMENTS * want.shape[1] // want.numel())
    squares = torch.zeros(2, dtype=torch.float64, device=want.device)
    for start in range(0, want.shape[1], step):
        slab = slice(start, start + step)
        expected = want[:, slab]
        squares[0] += (got[:, slab].detach().to(want.dtype) - expected).square().sum()
        squares[1] += (expected if base is None else expected - base[:, slab].to(want.dtype)).square().sum()
    found = float((squares[0] / squares[1]).sqrt())
    return found if found < torch.inf else float("inf")
