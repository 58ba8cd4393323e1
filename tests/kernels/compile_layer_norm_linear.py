"""Compile layer_norm_linear for sm_90 on any machine: prints one JSON line for each of a few shapes."""

import json
from typing import Any

import triton
from machine_code import disassemble, overwritten_operands
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pairformer_fast.kernels.layer_norm_linear.triton_forward import (
    Tiles,
    resident_kernel,
    streamed_kernel,
    tile_sizes,
)

SHAPES = [
    (128, 384, 4, "fp32"),
    (128, 384, 16, "bf16"),
    (128, 0, 16, "bf16"),
    (64, 192, 4, "bf16"),
    (256, 768, 8, "fp32"),
]
"""Channels, columns of ``tokens``, planes, and dtype of z."""

STRIDES = ("i32", "i32", "i32")


def compiled(channels: int, outputs: int, planes: int, dtype: str, tiles: Tiles) -> dict[str, Any]:
    """What the compiler makes of one kernel, for tokens in one line whose strides are multiples of 16."""
    kernel = resident_kernel if tiles.resident else streamed_kernel
    sizes = {"C": channels, "OUT": outputs, "P": planes, "BLOCK_C": channels, "BLOCK_P": 16, "BLOCK_O": tiles.outputs}
    constants = {"rows": 1, "EPS": 1e-5, "BLOCK_I": 1, "BLOCK_J": tiles.tokens, "STAGES": tiles.stages} | sizes
    types: dict[str, Any] = dict.fromkeys(("norm_weight", "norm_bias"), "*fp32")
    types |= dict.fromkeys(("weight", "planar_weight"), "*bf16") | dict.fromkeys(("plane", "columns", "tiles"), "i32")
    types |= {name: (f"*{of}", *STRIDES) for name, of in (("z", dtype), ("tokens", "bf16"), ("planar", "bf16"))}
    if not outputs:
        constants["weight"] = None
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types[name]
        if name in constants:
            values[(i,)] = constants[name]
        elif name != "tiles":
            paths = [(i, k) for k in range(4)] if isinstance(types[name], tuple) else [(i,)]
            attributes |= {path: [["tt.divisibility", 16]] for path in paths}
    planar = kernel.arg_names.index("planar")
    signature["planar"] = (*types["planar"][:3], "constexpr")
    values[(planar, 3)] = 1
    del attributes[(planar, 3)]
    source = ASTSource(kernel, signature, values, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tiles.warps})
    code = disassemble(result.asm["cubin"])
    return {
        "shape": [channels, outputs, planes, dtype],
        "shared": result.metadata.shared,
        "wgmma": result.asm["ptx"].count("wgmma.mma_async"),
        "spills": code.count("STL") + code.count("LDL"),
        "overwritten": overwritten_operands(code),
    }


if __name__ == "__main__":
    for shape in SHAPES:
        print(json.dumps(compiled(*shape, tile_sizes(*shape[:2]))), flush=True)
