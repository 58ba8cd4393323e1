"""Compile the Hopper kernels for sm_90 on any machine: ``python compile_hopper.py`` prints one JSON line a kernel."""

import json
from collections.abc import Iterator
from typing import Any

import triton.compiler
from machine_code import arrivals, disassemble, overwritten_operands, products_from_registers, unfinished_loads
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from pairformer_fast.kernels.flash_bias import hopper_backward_kernels, hopper_forward, hopper_pairs
from pairformer_fast.kernels.flash_bias.hopper_common import (
    DENSE,
    FACTORS,
    MIXED,
    OWN,
    REGISTERS,
    padded,
    shared_layout,
    vector_layout,
)
from pairformer_fast.kernels.flash_bias.hopper_tiles import Widths, choose

RANK, TOKENS = 32, {"forward": 1024, "backward_dq": 768, "backward_dkv": 1024, "backward_pairs": 768}
"""Lengths at which the table chooses different numbers of consumers."""
SHORT = 128
"""Few blocks, so that the producer is far ahead and waits for tiles to be given back."""

MASK, STATES = ("*u8", "i64", "i64"), ("*u8", "i32")


def descriptor(*block: int) -> str:
    """Type of a descriptor of bf16 tiles."""
    return f"tensordesc<bf16[{','.join(map(str, block))}],{shared_layout(block)!r}>"


def vector(length: int) -> str:
    """Type of a descriptor of fp32 vectors."""
    return f"tensordesc<fp32[1,1,1,{length}],{vector_layout()!r}>"


def problems() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    """Name, kernel, argument types and constants of what production runs."""
    rank = padded(RANK)
    for kind, dim, bias, masked, tokens in (
        ("forward", 32, FACTORS, False, None),
        ("forward", 32, MIXED, True, None),
        ("forward", 64, FACTORS, True, None),
        ("forward", 32, DENSE, True, SHORT),
        ("backward_dq", 32, FACTORS, False, None),
        ("backward_dq", 32, DENSE, True, SHORT),
        ("backward_dkv", 32, FACTORS, True, None),
        ("backward_dkv", 64, DENSE, False, None),
        ("backward_dkv", 32, DENSE, True, SHORT),
        ("backward_dkv", 32, FACTORS, True, SHORT),
        ("backward_pairs", 32, MIXED, True, None),
    ):
        width, tokens = padded(dim), tokens or TOKENS[kind]
        tiles = choose(kind, tokens, tokens, Widths(width, 0 if bias is DENSE else rank, bias is not FACTORS))
        own, streamed = descriptor(1, 1, OWN.value, 1, width), descriptor(1, 1, tiles.block, 1, width)
        factors = descriptor(1, 1, OWN.value, rank), descriptor(1, 1, tiles.block, rank)
        dense = descriptor(1, 1, OWN.value, tiles.block)
        constants = {"CONSUMERS": tiles.consumers, "STAGES": tiles.stages, "BLOCK_D": width, "BIAS": bias.value}
        constants |= {"MASKED": masked, "REGISTERS_EACH": REGISTERS[tiles.consumers]}
        types: dict[str, Any] = {"flags": "*u8", "mask": MASK, "states": STATES, "scale": "fp32"}
        if kind == "backward_pairs":
            types |= dict.fromkeys(("q_desc", "do_desc", "k_desc", "v_desc"), own)
            types |= dict.fromkeys(("lse_desc", "delta_desc"), vector(OWN.value))
            types |= {"dense": ("*bf16", *["i64"] * 4), "out": "*fp32", "sizes": ("i32",) * 9, "lengths": ("i32",) * 2}
            yield kind, hopper_pairs.pairs_kernel, types, constants
            continue
        constants |= {"GROUP": tiles.group, "BLOCK": tiles.block, "D": dim, "BLOCK_R": rank}
        types |= {"dense_desc": dense, "lengths": ("i32",) * 3}
        if kind == "forward":
            types |= {"q_desc": own, "k_desc": streamed, "v_desc": streamed, "sizes": ("i32",) * 7}
            types |= {"phi_q_desc": factors[0], "phi_k_desc": factors[1], "out": "*bf16", "lse": "*fp32"}
            types |= {"gate": ("*bf16", *["i64"] * 5)}
            yield kind, hopper_forward.forward_kernel, types, constants | {"TAIL": masked, "GATED": masked}
        else:
            types |= {"own0_desc": own, "own1_desc": own, "other0_desc": streamed, "other1_desc": streamed}
            types |= {"phi_own_desc": factors[0], "phi_other_desc": factors[1], "sizes": ("i32",) * 9}
            types |= dict.fromkeys(("lse_desc", "delta_desc"), vector(tiles.block))
            types |= {"statistics": ("*fp32", "*fp32", "i32"), "outputs": ("*bf16", "*bf16", "*fp32", "i32")}
            constants |= {"R": RANK, "KEYS": kind == "backward_dkv"}
            yield kind, hopper_backward_kernels.backward_kernel, types, constants


def main() -> None:
    """Compile and report."""
    for name, kernel, types, constants in problems():
        signature = {arg: "constexpr" if arg in constants else types[arg] for arg in kernel.arg_names}
        values = {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
        source = GluonASTSource(kernel, signature, values, {})
        compiled = triton.compiler.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        ptx = compiled.asm["ptx"]
        found = {"kernel": name, "bias": constants["BIAS"], "shared": compiled.metadata.shared}
        found |= {"wgmma": ptx.count("wgmma.mma_async"), "copies": ptx.count("cp.async.bulk.tensor")}
        code = disassemble(compiled.asm["cubin"])
        found |= {"from_registers": products_from_registers(code), "overwritten": overwritten_operands(code)}
        found |= {"unfinished": unfinished_loads(code), "arrivals": arrivals(code)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
