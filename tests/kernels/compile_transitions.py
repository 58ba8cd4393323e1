"""Compile both transitions for sm_90: ``python compile_transitions.py`` prints one JSON line a kernel."""

import json
from collections.abc import Iterator
from typing import Any

import torch
import triton.compiler
from machine_code import disassemble, overwritten_operands
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pairformer_fast.kernels.relu_transition import triton_backward as relu_backward
from pairformer_fast.kernels.relu_transition import triton_forward as relu_forward
from pairformer_fast.kernels.transition import triton_backward, triton_forward
from pairformer_fast.kernels.transition.triton_common import Tiles

CHANNELS, BF16 = 128, torch.bfloat16

CONSTANTS = {
    "C": CHANNELS,
    "BLOCK_C": CHANNELS,
    "PRECISION": "ieee",
    "APPROXIMATE": True,
    "PREFETCH": True,
    "RESIDUAL": True,
    "EPS": 1e-5,
}

ALIGNED = [["tt.divisibility", 16]]


def descriptor(height: int, width: int) -> str:
    return f"tensordesc<bf16[{height},{width}]>"


def tokens(pointer: str | None) -> tuple[str | None, ...]:
    return pointer, "i64", "i64", "i64"


def compiled(kernel: Any, types: dict[str, Any], tiles: Tiles) -> dict[str, Any]:
    """What the compiler makes of a kernel; None among the types is an argument that is None."""
    constants = CONSTANTS | {"BLOCK_T": tiles.block_t, "BLOCK_H": tiles.block_h}
    constants["HAS_BIAS"] = types.get("norm_bias") is not None
    types = types | dict.fromkeys(("a_desc", "b_desc", "desc_1"), descriptor(tiles.block_h, CHANNELS))
    types |= dict.fromkeys(("out_desc", "desc_2"), descriptor(CHANNELS, tiles.block_h))
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
    result = triton.compiler.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = result.asm["ptx"]
    return {
        "kernel": f"{kernel.fn.__module__.split('.')[-2]}.{kernel.fn.__name__}",
        "shared": result.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "copies": ptx.count("cp.async.bulk.tensor"),
        "overwritten": overwritten_operands(disassemble(result.asm["cubin"])),
    }


def problems() -> Iterator[tuple[Any, dict[str, Any], Tiles]]:
    """What production runs: bf16 in inference, fp32 tokens under autocast in training."""
    tiles = triton_forward.choose_tiles(CHANNELS, BF16)
    for kernel, x, mask, bias in (
        (triton_forward.forward_kernel, "*bf16", None, None),
        (triton_forward.forward_kernel, "*bf16", "*i1", "*bf16"),
        (relu_forward.forward_kernel, "*bf16", "*i1", "*bf16"),
        (relu_forward.forward_kernel, "*fp32", "*i1", "*fp32"),
    ):
        types = {"x": tokens(x), "out": tokens(x), "mask": tokens(mask), "norm_weight": x, "norm_bias": bias}
        yield kernel, types | dict.fromkeys(("offset_1", "offset_2"), x), tiles
    of_tokens = {"x": tokens("*fp32"), "dout": tokens("*fp32"), "mask": tokens("*i1")}
    of_tokens |= dict.fromkeys(("norm_weight", "norm_bias", "offset_1"), "*fp32")
    of_tokens |= dict.fromkeys(("y", "dy", "dnormalised"), "*bf16")
    of_weights = dict.fromkeys(("partial", "partial_offset", "offset_1"), "*fp32")
    for module in (triton_backward, relu_backward):
        yield module.tokens_kernel, of_tokens, triton_backward.choose_token_tiles(CHANNELS, BF16)
        tiles = triton_backward.choose_weight_tiles(CHANNELS, BF16)
        operands = dict.fromkeys(("y_desc", "dy_desc"), descriptor(tiles.block_t, CHANNELS))
        yield module.weights_kernel, of_weights | operands, tiles


if __name__ == "__main__":
    for problem in problems():
        print(json.dumps(compiled(*problem)), flush=True)
