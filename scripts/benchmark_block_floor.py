"""The time no Pairformer block can beat on a device whose ceilings were measured."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmark_block_problem import Case
from benchmark_gpu import Ceilings


class Work(NamedTuple):
    """What an operation must do: bytes to move, multiplications and additions, exponentials of attention."""

    bytes: float
    flops: float
    exponentials: float = 0.0


def works(case: Case) -> dict[str, Work]:
    """Work of every operation of a block (or of one alone), none of which shares a pass over z with another.

    With N tokens, C channels of z, H heads of width D and L channels in triangle multiplication:

    * bytes: every operation on pairs reads z and writes z once, attention with pair bias reads it. The backward reads z
      and its incoming gradient and writes the outgoing one.
    * triangle multiplication: four projections and the last one between C and L channels, a gate of C by C, and the
      product of N^3 L multiplications and additions.
    * triangle attention: q, k, v, gate and output between C and HD channels, the bias, two products of N^3 HD, N^3 H
      exponentials. Attention with pair bias: the same in the single representation.
    * transition: three products between C and n C channels.
    * The backward takes twice the products of the forward, and attention's computes its scores again: one product and
      the exponentials.

    What lies in caches, layer norms, gates and masks cost nothing.
    """
    config, n = case.config, case.n
    c, single, hidden = config.c_z, config.c_s, config.c_hidden_mul
    wide = config.no_heads_pair * config.c_hidden_pair_att
    wide_single = config.no_heads_pair_bias * config.c_hidden_pair_bias
    passes = 5 if case.backward else 2
    z, s = n**2 * c * case.dtype.itemsize, n * single * case.dtype.itemsize
    again = 1 if case.backward else 0
    products = 3 if case.backward else 1

    def attention(rows: int, heads: int, width: int) -> tuple[float, float]:
        scores = float(rows * n**2)
        return 2 * scores * width * (2 * products + again), scores * heads * (1 + again)

    triangle, exponentials = attention(n, config.no_heads_pair, wide)
    one, few = attention(1, config.no_heads_pair_bias, wide_single)
    multiplication = 2 * (n**2 * (5 * c * hidden + c**2) + n**3 * hidden) * products
    projections = 2 * n**2 * c * (5 * wide + config.no_heads_pair) * products
    of_single = 2 * (n * single * 5 * wide_single + n**2 * c * config.no_heads_pair_bias) * products
    transition = 2 * 3 * config.transition_n * products
    found = {
        "triangle multiplication, outgoing": Work(passes * z, multiplication),
        "triangle multiplication, incoming": Work(passes * z, multiplication),
        "triangle attention, starting": Work(passes * z, projections + triangle, exponentials),
        "triangle attention, ending": Work(passes * z, projections + triangle, exponentials),
        "pair transition": Work(passes * z, transition * n**2 * c**2),
        "attention with pair bias": Work((passes - 1) * z + passes * s, of_single + one, few),
        "single transition": Work(passes * s, transition * n * single**2),
    }
    alone = {
        "triangle_multiplication": found["triangle multiplication, outgoing"],
        "triangle_attention": found["triangle attention, starting"],
        "transition": found["pair transition"],
        "attention_pair_bias": found["attention with pair bias"],
        "layer_norm_linear": Work(
            z * (1 + (3 * wide + config.no_heads_pair) / c), 2 * n**2 * c * (3 * wide + config.no_heads_pair)
        ),
        "gated_output": Work(z * (2 + wide / c), 4 * n**2 * c * wide),
    }
    return {case.op: alone[case.op]} if case.op in alone else found


def floor(case: Case, ceilings: Ceilings) -> dict[str, Any]:
    """Milliseconds: by operation the largest of its three times, as if the others were free, and their sum."""
    by_operation = {
        name: 1e3 * max(work.bytes / ceilings.copy, work.flops / ceilings.matmul, work.exponentials / ceilings.exp2)
        for name, work in works(case).items()
    }
    total = [sum(column) for column in zip(*works(case).values(), strict=True)]
    return {
        "bytes_ms": 1e3 * total[0] / ceilings.copy,
        "tensor_ms": 1e3 * total[1] / ceilings.matmul,
        "exp2_ms": 1e3 * total[2] / ceilings.exp2,
        "operations_ms": by_operation,
        "ms_median": sum(by_operation.values()),
    }
