"""Operations of a block alone: what they compute exactly, ours and their peers'."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module

import torch
from benchmark_block_implementations import (
    CUEQUIVARIANCE,
    OPENFOLD3,
    TRITON,
    WITH_CUEQUIVARIANCE,
    Implementation,
    Prepared,
    our_block,
    our_dense,
    their_block,
)
from benchmark_block_problem import (
    ATTENTION_PAIR_BIAS,
    TRANSITION,
    TRIANGLE_ATTENTION,
    TRIANGLE_MULTIPLICATION,
    Problem,
)
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from pairformer_fast.kernels.gated_output import gated_output
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.layer_norm_linear import layer_norm_linear
from pairformer_fast.model.attention import projections


def implementations() -> Iterator[Implementation]:
    """Ours first, then the peers."""
    for op, name in (
        ("triangle_multiplication", TRIANGLE_MULTIPLICATION),
        ("triangle_attention", TRIANGLE_ATTENTION),
        ("transition", TRANSITION),
    ):
        yield Implementation("pairformer_fast", partial(_ours, name=name), op)
        yield Implementation("OpenFold3 eager", partial(_theirs, name=name), op, distributions=OPENFOLD3)
    cuequivariance = partial(_theirs, name=TRIANGLE_ATTENTION, **{CUEQUIVARIANCE: True})
    yield Implementation(
        "OpenFold3 cuEquivariance", cuequivariance, "triangle_attention", distributions=WITH_CUEQUIVARIANCE
    )
    triton = partial(_theirs, name=TRIANGLE_ATTENTION, **{TRITON: True})
    yield Implementation("OpenFold3 Triton", triton, "triangle_attention", distributions=OPENFOLD3)
    yield Implementation(
        "cuEquivariance", _cuequivariance, "triangle_multiplication", distributions=("cuequivariance-torch",)
    )
    for name, prepare, distributions in (
        ("pairformer_fast", _our_single_attention, ()),
        ("OpenFold3 eager", _their_single_attention, OPENFOLD3),
        ("cuEquivariance", _cuequivariance_single_attention, ("cuequivariance-torch",)),
    ):
        yield Implementation(name, prepare, "attention_pair_bias", distributions=distributions)
    for op, prepare in (("layer_norm_linear", _projections), ("gated_output", _output)):
        yield Implementation("pairformer_fast", partial(prepare, plain=False), op)
        yield Implementation("PyTorch eager", partial(prepare, plain=True), op)


def _ours(problem: Problem, name: str) -> Prepared:
    """Ours adds the residual, which the peers leave to the block."""
    module = our_block(problem, our_dense()).get_submodule(name)
    return Prepared(problem, module, lambda _, z: {"z": module(z, problem.pair_mask)})


def _theirs(problem: Problem, name: str, **options: bool) -> Prepared:
    if options.get(CUEQUIVARIANCE):
        import_module("cuequivariance_torch")
    module = their_block(problem).get_submodule(name)
    mask = problem.pair_mask.to(problem.case.dtype)
    return Prepared(problem, module, lambda _, z: {"update": module(z, mask, **options)})


def _cuequivariance(problem: Problem) -> Prepared:
    """cuEquivariance's triangle multiplication, whose concatenated weights are made before the clock starts."""
    multiply = import_module("cuequivariance_torch").triangle_multiplicative_update
    module = our_block(problem, our_dense()).get_submodule(TRIANGLE_MULTIPLICATION)
    weights = {
        "p_in_weight": torch.cat([module.linear_a_p.weight, module.linear_b_p.weight]),
        "g_in_weight": torch.cat([module.linear_a_g.weight, module.linear_b_g.weight]),
        "p_out_weight": module.linear_z.weight,
        "g_out_weight": module.linear_g.weight,
    }
    for place in ("in", "out"):
        norm = module.get_submodule(f"layer_norm_{place}")
        weights |= {f"norm_{place}_weight": norm.weight, f"norm_{place}_bias": norm.bias}
    mask = problem.pair_mask.to(problem.case.dtype)
    options = {"direction": "outgoing", "mask": mask, "eps": module.layer_norm_in.eps}
    return Prepared(problem, module, lambda _, z: {"update": multiply(z, **weights, **options)})


def _our_single_attention(problem: Problem) -> Prepared:
    module = our_block(problem, our_dense()).get_submodule(ATTENTION_PAIR_BIAS)
    return Prepared(problem, module, lambda s, z: {"s": module(s, z, problem.mask)})


def _their_single_attention(problem: Problem) -> Prepared:
    """With the options that OpenFold3's block gives it."""
    module = their_block(problem).get_submodule(ATTENTION_PAIR_BIAS)
    mask = problem.mask.to(problem.case.dtype)
    options = {"mask": mask, "use_high_precision_attention": True}
    return Prepared(problem, module, lambda s, z: {"single_update": module(a=s, z=z, **options)})


def _cuequivariance_single_attention(problem: Problem) -> Prepared:
    attend = import_module("cuequivariance_torch").attention_pair_bias
    module = our_block(problem, our_dense()).get_submodule(ATTENTION_PAIR_BIAS)
    weights = {f"w_proj_{part}": module.mha.get_submodule(f"linear_{part}").weight for part in "qkvgo"}
    weights |= {"b_proj_q": module.mha.linear_q.bias, "w_proj_z": module.linear_z.weight}
    for part in "az":
        norm = module.get_submodule(f"layer_norm_{part}")
        weights |= {f"w_ln_{part}": norm.weight, f"b_ln_{part}": norm.bias}
    options = {"mask": problem.mask.to(problem.case.dtype), "num_heads": problem.case.config.no_heads_pair_bias}

    def forward(s: Tensor, z: Tensor) -> dict[str, Tensor]:
        found = attend(s, z, **options, **weights)
        return {"single_update": found[0] if isinstance(found, tuple) else found}

    return Prepared(problem, module, forward)


def _projections(problem: Problem, plain: bool) -> Prepared:
    """q, k, v and pair bias of triangle attention; plainly, layer norm, one product and another."""
    module = our_block(problem, our_dense()).get_submodule(TRIANGLE_ATTENTION)
    norm, weight, bias_weight = module.layer_norm, projections(module.mha), module.linear_z.weight

    def eager(_: Tensor, z: Tensor) -> dict[str, Tensor]:
        x = layer_norm(z, norm.normalized_shape, norm.weight, norm.bias)
        return {"projected": linear(x, weight), "bias": linear(x, bias_weight).permute(0, 3, 1, 2).contiguous()}

    def fused(_: Tensor, z: Tensor) -> dict[str, Tensor]:
        projected, bias = layer_norm_linear(
            z, NormParameters.of(norm), weight, bias_weight, backend=module.config.backend
        )
        return {"projected": projected, "bias": bias}

    return Prepared(problem, module, eager if plain else fused)


def _output(problem: Problem, plain: bool) -> Prepared:
    """Gate, output projection and residual of triangle attention; plainly, the layer norm before the gate as well."""
    module = our_block(problem, our_dense()).get_submodule(TRIANGLE_ATTENTION)
    norm, gate, out = module.layer_norm, module.mha.linear_g.weight, module.mha.linear_o.weight

    def eager(_: Tensor, z: Tensor) -> dict[str, Tensor]:
        x = layer_norm(z, norm.normalized_shape, norm.weight, norm.bias)
        return {"z": z + linear(linear(x, gate).sigmoid() * problem.attended, out)}

    def fused(_: Tensor, z: Tensor) -> dict[str, Tensor]:
        parameters = NormParameters.of(norm), gate, out
        return {"z": gated_output(z, problem.attended, *parameters, backend=module.config.backend)}

    return Prepared(problem, module, eager if plain else fused)
