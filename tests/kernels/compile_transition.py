"""Compile the transition for sm_90 on any machine: ``python compile_transition.py`` prints one JSON line a kernel."""

import json
from typing import Any

import torch
import triton.compiler
from machine_code import disassemble, overwritten_operands
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pairformer_fast.kernels.transition import triton_backward, triton_forward

CHANNELS, BF16 = 128, torch.bfloat16

ALIGNED = [["tt.divisibility", 16]]


def descriptor(height: int, width: int) -> str:
    return f"tensordesc<bf16[{height},{width}]>"


def tokens(pointer: str | None) -> tuple[str | None, ...]:
    return pointer, "i64", "i64", "i64"


def compile_kernel(kernel: Any, types: dict[str, Any], constants: dict[str, Any], tiles: Any) -> dict[str, Any]:
    """Compile for sm_90; None among the types is an argument that is None."""
    constants = constants | {"BLOCK_T": tiles.block_t, "BLOCK_H": tiles.block_h}
    block = tiles.block_h, CHANNELS
    types = types | {"a_desc": descriptor(*block), "b_desc": descriptor(*block), "out_desc": descriptor(*block[::-1])}
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def signature(kind: Any, path: tuple[int, ...]) -> Any:
        if isinstance(kind, tuple):
            return tuple(signature(part, (*path, index)) for index, part in enumerate(kind))
        if kind is None:
            values[path] = None
            return "constexpr"
        if kind.startswith("*") or kind == "i64":
            attributes[path] = ALIGNED
        return kind

    signatures = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            values[(index,)] = constants[name]
        signatures[name] = "constexpr" if name in constants else signature(types.get(name, "i32"), (index,))
    source = ASTSource(kernel, signatures, values, attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    compiled = triton.compiler.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    found = {"kernel": kernel.fn.__name__, "shared": compiled.metadata.shared, "wgmma": ptx.count("wgmma.mma_async")}
    found |= {"copies": ptx.count("cp.async.bulk.tensor")}
    return found | {"overwritten": overwritten_operands(disassemble(compiled.asm["cubin"]))}


def main() -> None:
    """Compile what production runs: bf16 in inference, fp32 tokens under autocast in training."""
    constants = {"C": CHANNELS, "BLOCK_C": CHANNELS, "PRECISION": "ieee", "APPROXIMATE": True}
    for masked, bias in ((None, None), ("*i1", "*bf16")):
        types = {"x": tokens("*bf16"), "out": tokens("*bf16"), "mask": tokens(masked)}
        types |= {"norm_weight": "*bf16", "norm_bias": bias}
        more = {"EPS": 1e-5, "HAS_BIAS": bias is not None, "PREFETCH": True}
        tiles = triton_forward.choose_tiles(CHANNELS, BF16)
        print(json.dumps(compile_kernel(triton_forward.forward_kernel, types, constants | more, tiles)))
    types = {"x": tokens("*fp32"), "dout": tokens("*fp32"), "mask": tokens("*i1")}
    types |= dict.fromkeys(("norm_weight", "norm_bias"), "*fp32") | dict.fromkeys(("y", "dy", "dnormalised"), "*bf16")
    tiles = triton_backward.choose_token_tiles(CHANNELS, BF16)
    more = {"EPS": 1e-5, "HAS_BIAS": True}
    print(json.dumps(compile_kernel(triton_backward.tokens_kernel, types, constants | more, tiles)))
    tiles = triton_backward.choose_weight_tiles(CHANNELS, BF16)
    types = dict.fromkeys(("y_desc", "dy_desc"), descriptor(tiles.block_t, CHANNELS)) | {"partial": "*fp32"}
    print(json.dumps(compile_kernel(triton_backward.weights_kernel, types, constants, tiles)))


if __name__ == "__main__":
    main()
