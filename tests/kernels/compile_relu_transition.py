"""Compile the transition with ReLU for sm_90: ``python compile_relu_transition.py`` prints one JSON line a kernel."""

import json

from compile_transition import BF16, CHANNELS, compile_kernel, descriptor, tokens

from pairformer_fast.kernels.relu_transition import triton_backward, triton_forward
from pairformer_fast.kernels.transition.triton_common import Tiles


def layers(tiles: Tiles, offset: str) -> dict[str, str]:
    block = tiles.block_h, CHANNELS
    types = {"desc_1": descriptor(*block), "desc_2": descriptor(*block[::-1])}
    return types | dict.fromkeys(("offset_1", "offset_2"), offset)


def main() -> None:
    """Compile what production runs: bf16 in inference, fp32 tokens under autocast in training."""
    constants = {"C": CHANNELS, "BLOCK_C": CHANNELS, "PRECISION": "ieee"}
    norm = {"EPS": 1e-5, "HAS_BIAS": True}
    tiles = triton_forward.choose_tiles(CHANNELS, BF16)
    for x, parameter in (("*bf16", "*bf16"), ("*fp32", "*fp32")):
        types = {"x": tokens(x), "out": tokens(x), "mask": tokens("*i1"), "norm_weight": parameter}
        types |= {"norm_bias": parameter} | layers(tiles, parameter)
        print(json.dumps(compile_kernel(triton_forward.forward_kernel, types, constants | norm, tiles)))
    types = {"x": tokens("*fp32"), "dout": tokens("*fp32"), "mask": tokens("*i1")}
    types |= dict.fromkeys(("norm_weight", "norm_bias"), "*fp32") | dict.fromkeys(("y", "dy", "dnormalised"), "*bf16")
    tiles = triton_backward.choose_token_tiles(CHANNELS, BF16)
    types |= layers(tiles, "*fp32")
    print(json.dumps(compile_kernel(triton_backward.tokens_kernel, types, constants | norm, tiles)))
    tiles = triton_backward.choose_weight_tiles(CHANNELS, BF16)
    types = dict.fromkeys(("y_desc", "dy_desc"), descriptor(tiles.block_t, CHANNELS)) | layers(tiles, "*fp32")
    types |= dict.fromkeys(("partial", "partial_offset"), "*fp32")
    print(json.dumps(compile_kernel(triton_backward.weights_kernel, types, constants, tiles)))


if __name__ == "__main__":
    main()
