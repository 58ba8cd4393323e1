"""Checks that need Protenix; ``test_protenix.py`` runs them in an environment that has it.

Where ``import protenix`` works already: ``LAYERNORM_TYPE=torch pytest tests/integrations/protenix_checks.py``.
"""

import copy
import importlib.util
import pickle
import random
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import protenix
import pytest
import torch
from protenix.config.config import parse_configs
from protenix.model.modules.pairformer import MSABlock, PairformerBlock, PairformerStack
from protenix.model.modules.transformer import AttentionPairBias
from protenix.model.protenix import Protenix
from protenix.model.triangular.layers import OpenFoldLayerNorm
from protenix.model.triangular.triangular import TriangleAttention, TriangleAttentionEndingNode
from torch import nn

from pairformer_fast import AttentionConfig, accelerate
from pairformer_fast.bias import PairBiasAttention, collect_reports
from tests.integrations.adapters import CHANGES
from tests.integrations.comparison import DENSE, attention_around_a_node, distance, full_rank

C_S, C_Z, C_M, SEQUENCES = 32, 24, 16, 5
PAIR = {"c_z": C_Z, "c_hidden_mul": 16, "c_hidden_pair_att": 8, "no_heads_pair": 3}
BLOCKS = {
    "Pairformer": partial(PairformerBlock, c_s=C_S, n_heads=4, **PAIR),
    "template": partial(PairformerBlock, c_s=0, num_intermediate_factor=2, **PAIR),
    "v2": partial(PairformerBlock, c_s=C_S, c_z=64, n_heads=4, hidden_scale_up=True),
    "MSA": partial(MSABlock, c_m=C_M, c_z=C_Z),
}
every_block = pytest.mark.parametrize("kind", BLOCKS)


def with_random_weights(module: nn.Module) -> nn.Module:
    """Non-zero everywhere: Protenix zero-initialises output projections, which would hide every other weight."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            scale = value.shape[-1] ** -0.5 if value.dim() > 1 else 0.2
            value.copy_(scale * torch.randn(value.shape, generator=generator))
            if "norm" in name and name.endswith("weight") and value.dim() == 1:
                value += 1
    return module.eval()


def block(kind: str) -> nn.Module:
    return with_random_weights(BLOCKS[kind]())


def inputs(n: int, kind: str = "Pairformer", leading: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """As Protenix has them, without a batch; a mask with holes everywhere, but none that covers a whole row."""
    generator = torch.Generator().manual_seed(0)
    c_z = 64 if kind == "v2" else C_Z
    shapes = {"s": (n, C_S), "z": (n, n, c_z), "m": (SEQUENCES, n, C_M)}
    batch = {name: torch.randn(*leading, *shape, generator=generator) for name, shape in shapes.items()}
    mask = (torch.rand(*leading, n, n, generator=generator) > 0.3).float()
    return batch | {"mask": mask.maximum(torch.eye(n))}


def outputs(model: nn.Module, batch: dict[str, torch.Tensor], masked: bool = True, **options) -> list[torch.Tensor]:
    first = batch["m"] if isinstance(model, MSABlock) else batch["s"]
    mask = batch["mask"] if masked else None
    # Protenix updates the MSA in place.
    return [x for x in model(first * 1, batch["z"] * 1, pair_mask=mask, **options) if x is not None]


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    batch = batch | {name: batch[name].clone().requires_grad_() for name in "szm"}
    model.zero_grad()
    torch.manual_seed(5)  # of dropout
    sum(x.sin().sum() for x in outputs(model, batch)).backward()
    leaves = dict(model.named_parameters()) | {name: batch[name] for name in "szm"}
    return {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert distance(a, b) < tolerance


@torch.no_grad()
@every_block
@pytest.mark.parametrize("inplace_safe", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("n", [17, 40])
def test_a_block_gives_protenixs_outputs(kind, n, masked, inplace_safe):
    model, batch = block(kind), inputs(n, kind)
    expected = outputs(model, batch, masked, inplace_safe=inplace_safe)
    with accelerate(model, DENSE) as acceleration:
        found = outputs(model, batch, masked, inplace_safe=inplace_safe)
        acceleration.configure(full_rank(n))
        exact = outputs(model, batch, masked, inplace_safe=inplace_safe)
        assert {report["choice"] for report in acceleration.reports()} == {"factors"}
    assert acceleration.around == ("pair_stack" if kind == "MSA" else "",)
    assert_close(found, expected, 1e-5)
    assert_close(exact, expected, 1e-5)


@pytest.mark.parametrize("kind", ["Pairformer", "template", "v2"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_block_gives_protenixs_gradients_and_random_numbers(kind, training):
    model, batch = block(kind).train(training), inputs(17, kind)
    torch.manual_seed(5)
    expected, state = outputs(model, batch), torch.get_rng_state()
    expected_gradients = gradients(model, batch)
    with accelerate(model, DENSE):
        torch.manual_seed(5)
        found = outputs(model, batch)
        assert torch.equal(torch.get_rng_state(), state)
        found_gradients = gradients(model, batch)
    assert_close(found, expected, 1e-5)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        if name.endswith("layernorm_z.bias"):  # a constant for all keys of a query, which softmax ignores
            weight = expected_gradients[name.removesuffix("bias") + "weight"]
            assert found_gradients[name].norm() < 1e-3 * weight.norm()
        else:
            assert gradient.norm() > 0, f"{name}: the comparison would be empty"
            assert distance(found_gradients[name], gradient) < 1e-4, name


@torch.no_grad()
@every_block
@pytest.mark.parametrize("n", [5, 33])
def test_in_fp64_a_block_is_protenixs_to_rounding(kind, n, monkeypatch):
    """Protenix casts queries and keys to fp32, which would hide small differences: made fp64 for this test."""
    model = block(kind).double()
    batch = {name: value.double() for name, value in inputs(n, kind).items()}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        expected = outputs(model, batch)
    with accelerate(model, DENSE) as acceleration:
        assert_close(outputs(model, batch), expected, 1e-13)
        acceleration.configure(full_rank(n))
        assert_close(outputs(model, batch), expected, 1e-10)


@torch.no_grad()
@every_block
def test_factors_of_low_rank_report_their_error(kind):
    model, batch = block(kind), inputs(40, kind)
    expected = outputs(model, batch)
    with accelerate(model, AttentionConfig(bias="svd", rank=1)) as acceleration:
        found, reports = outputs(model, batch), acceleration.reports()
    assert distance(found[-1], expected[-1]) > 1e-3
    assert sorted(report["name"] for report in reports) == sorted(acceleration.swapped)
    for report in reports:
        assert report["choice"] == "factors"
        assert set(report["rank"]) == {1}
        assert 0 < max(report["probed_mean"]) < max(report["bound"])


@torch.no_grad()
def test_attention_moves_no_further_than_certified():
    """By tanh(eps / 2) times the diameter of the values, head by head, here through the identity as last layer."""
    n, heads = 24, 4
    module = with_random_weights(AttentionPairBias(False, True, heads, C_S, c_z=C_Z)).double()
    module.attention.linear_o.weight.copy_(torch.eye(C_S))
    module.attention.linear_g.weight.zero_()
    a, z = torch.randn(n, C_S, dtype=torch.float64), torch.randn(n, n, C_Z, dtype=torch.float64)
    with accelerate(module, DENSE) as acceleration:
        exact = module(a, None, z)
        acceleration.configure(AttentionConfig(bias="svd", rank=3))
        coarse, (report,) = module(a, None, z), acceleration.reports()
    values = module.attention.linear_v(module.layernorm_a(a)).view(n, heads, -1)
    moved = 2 * (coarse - exact).view(n, heads, -1).norm(dim=-1).amax(0)  # the gate is one half
    for head, bound in enumerate(report["bound"]):
        assert 0 < moved[head] <= bound * torch.cdist(values[:, head], values[:, head]).max()


@torch.no_grad()
@pytest.mark.parametrize("config", [DENSE, full_rank(9)], ids=["dense", "factors"])
@pytest.mark.parametrize("cls", [TriangleAttention, TriangleAttentionEndingNode])
@pytest.mark.parametrize("leading", [(), (2,), (2, 1)])
def test_orientation_of_the_bias(leading, cls, config):
    module, ending = with_random_weights(cls(C_Z, 8, 2)).double(), cls is TriangleAttentionEndingNode
    z = torch.randn(*leading, 9, 9, C_Z, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with accelerate(module, config):
        found = [module(z), module(z, chunk_size=4)]
    one = (0,) * len(leading)
    for update in found:
        assert distance(update[one], attention_around_a_node(module, z[one], ending)) < 1e-10
        assert distance(update[one], attention_around_a_node(module, z[one], not ending)) > 1e-2


@torch.no_grad()
def test_in_a_block_the_ending_node_has_the_orientation_of_alphafold_2():
    """A block that computes nothing but attention around its ending node."""
    model = block("template").double()
    for layer in (model.tri_mul_out.linear_z, model.tri_mul_in.linear_z, model.tri_att_start.mha.linear_o):
        layer.weight.zero_()
    model.pair_transition.linear_no_bias.weight.zero_()
    z = torch.randn(9, 9, C_Z, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with accelerate(model, DENSE):
        found = model(None, z, None)[1] - z
    assert distance(found, attention_around_a_node(model.tri_att_end, z, True)) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("leading", [(1,), (2,), (2, 3)])
def test_leading_dimensions(leading):
    model, batch = block("Pairformer"), inputs(11, leading=leading)
    for masked in (False, True):
        expected = outputs(model, batch, masked)
        with accelerate(model, DENSE):
            assert_close(outputs(model, batch, masked), expected, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("option", [{"chunk_size": 4}, {"triangle_attention": "cuequivariance"}])
def test_flags_of_the_host_have_no_effect(option):
    """Its kernels are not installed here, so they are not called either."""
    model, batch = block("Pairformer"), inputs(17)
    expected = outputs(model, batch)
    with accelerate(model, full_rank(17)) as acceleration:
        found = outputs(model, batch, **option, triangle_multiplicative="cuequivariance")
    assert len(acceleration.reports()) == 3, "one factorisation per attention, however the host would cut it up"
    assert_close(found, expected, 1e-5)


@torch.no_grad()
def test_inputs_are_not_written_to_unless_that_is_safe():
    model, batch = block("Pairformer"), inputs(17)
    before = {name: value.clone() for name, value in batch.items()}
    with accelerate(model, DENSE):
        model(batch["s"], batch["z"], batch["mask"])
        assert all(torch.equal(value, before[name]) for name, value in batch.items())
        _, z = model(batch["s"], batch["z"], batch["mask"], inplace_safe=True)
    assert z.data_ptr() == batch["z"].data_ptr()


@torch.no_grad()
def test_padding_is_finite_and_does_not_reach_other_pairs():
    model, batch = block("template"), inputs(17)
    keep = torch.ones(17)
    keep[5:8] = keep[15:] = 0
    batch["mask"] = keep[:, None] * keep
    expected = outputs(model, batch)[-1]
    with accelerate(model, DENSE) as acceleration:
        for config in (DENSE, full_rank(17)):
            acceleration.configure(config)
            found = outputs(model, batch)[-1]
            assert found.isfinite().all()
            assert distance(found[batch["mask"] > 0], expected[batch["mask"] > 0]) < 1e-5


def test_training_through_a_decomposition_is_refused():
    model, batch = block("Pairformer").train(), inputs(17)
    with accelerate(model, AttentionConfig(bias="svd")), pytest.raises(RuntimeError, match="bias='dense'"):
        gradients(model, batch)


def test_checkpoints_of_blocks_in_training():
    model, batch = with_random_weights(PairformerStack(2, 4, C_Z, C_S, blocks_per_ckpt=1)).train(), inputs(11)
    expected = gradients(model, batch)
    with accelerate(model, DENSE):
        found = gradients(model, batch)
    for name in ("s", "z", "blocks.0.tri_att_end.linear.weight", "blocks.1.attention_pair_bias.linear_nobias_z.weight"):
        assert distance(found[name], expected[name]) < 1e-4


@torch.no_grad()
@every_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_a_block_is_as_near_to_the_truth_as_protenixs(kind, dtype):
    model, batch = block(kind), inputs(40, kind)
    exact = outputs(model, batch)
    batch = batch | {name: batch[name].to(dtype) for name in "szm"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = outputs(model, batch)
        with accelerate(model, DENSE):
            ours = outputs(model, batch)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert distance(a.float(), c) <= 1.2 * distance(b.float(), c)


@torch.no_grad()
def test_in_fp16_blocks_run_protenixs_code_around_our_attention(monkeypatch):
    model, batch = block("Pairformer"), inputs(17)
    expected = outputs(model, batch)
    with accelerate(model, DENSE) as acceleration:
        monkeypatch.setattr("pairformer_fast.integrations.protenix.is_fp16_enabled", lambda: True)
        monkeypatch.setattr(type(model), "_update_pairs", None)
        assert_close(outputs(model, batch), expected, 1e-5)
        assert len(acceleration.reports()) == 3


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("path", ["tri_mul_in.linear_a_g", "tri_att_end.linear", "attention_pair_bias.linear_nobias_z"])
def test_a_layer_that_was_replaced_keeps_its_effect(path, change):
    model, batch = block("Pairformer"), inputs(17)
    before = outputs(model, batch)
    change(model, path)
    expected = outputs(model, batch)
    assert max(map(distance, expected, before)) > 1e-3
    with accelerate(model, DENSE) as acceleration:
        assert_close(outputs(model, batch), expected, 1e-5)
    assert [skipped.path for skipped in acceleration.skipped] == ["attention_pair_bias" if "nobias_z" in path else ""]


def test_weights_keep_their_names_and_objects_and_restore_undoes_everything():
    model, batch = block("Pairformer"), inputs(17)
    weights, keys = list(model.parameters()), list(model.state_dict())
    modules = {path: (type(module), set(vars(module))) for path, module in model.named_modules()}
    before = outputs(model, batch)
    acceleration = accelerate(model, DENSE)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    duplicates = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    acceleration.restore()
    assert {path: (type(module), set(vars(module))) for path, module in model.named_modules()} == modules
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, batch), before, strict=True))
    for duplicate in duplicates:
        assert_close(outputs(duplicate, batch), before, 1e-5)
        assert len(collect_reports(duplicate)) == 3


def test_what_cannot_be_run_as_a_whole_keeps_protenixs_code_around_its_attention():
    class Variant(TriangleAttention):
        pass

    def changed(**parts: nn.Module) -> nn.Module:
        model = block("Pairformer")
        for name, part in parts.items():
            model.set_submodule(name.replace("__", "."), with_random_weights(part))
        return model

    patched = changed()
    patched.forward = partial(type(patched).forward, patched)
    no_scale = changed()
    no_scale.attention_pair_bias.layernorm_z = OpenFoldLayerNorm(C_Z, create_scale=False)
    model = nn.ModuleDict(
        {
            "offset": changed(tri_mul_out__linear_g=nn.Linear(C_Z, C_Z)),
            "patched": patched,
            "variant": changed(tri_att_start=Variant(C_Z, 8, 3)),
            "no_scale": no_scale,
        }
    )
    batch = inputs(17)
    with torch.no_grad():
        expected = [outputs(part, batch) for part in model.values()]
        with accelerate(model, DENSE) as acceleration:
            found = [outputs(part, batch) for part in model.values()]
    assert acceleration.around == ("no_scale",)
    reasons = {skipped.path: skipped.reason for skipped in acceleration.skipped}
    assert reasons.keys() == {"offset", "patched", "variant", "variant.tri_att_start", "no_scale.attention_pair_bias"}
    assert "tri_mul_out.linear_g" in reasons["offset"]
    assert "subclass" in reasons["variant.tri_att_start"]
    assert "without scale" in reasons["no_scale.attention_pair_bias"]
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-5)


def test_nothing_to_accelerate_is_an_error():
    diffusion = with_random_weights(AttentionPairBias(c_a=C_S, c_s=C_S, c_z=C_Z, n_heads=4))
    with pytest.raises(ValueError, match=r"looked for TriangleAttention.*diffusion transformer"):
        accelerate(diffusion)
    model = block("Pairformer")
    with accelerate(model, DENSE), pytest.raises(ValueError, match="accelerated already"):
        accelerate(model)
    assert not any(isinstance(module, PairBiasAttention) for module in model.modules())


def base_configs() -> ModuleType:
    """Protenix's own settings; its package ``configs`` is not asked for by name, which another one has here."""
    path = Path(protenix.__file__).parents[1] / "configs" / "configs_base.py"
    spec = importlib.util.spec_from_file_location("protenix_configs_base", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_model(**more: object) -> nn.Module:
    """Everything of Protenix, with few channels and blocks."""
    sizes = {"c_s": C_S, "c_z": 64, "c_token": 16, "c_s_inputs": 16 + 65, "c_atom": 16, "c_atompair": 8, "n_blocks": 2}
    parts = {
        "N_cycle": 2,
        "template_embedder.n_blocks": 1,
        "template_embedder.c": 32,
        "msa_module.n_blocks": 2,
        "msa_module.c_m": C_M,
        "pairformer.n_heads": 4,
        "diffusion_module.c_token": 32,
        "diffusion_module.transformer.n_blocks": 2,
        "diffusion_module.transformer.n_heads": 4,
        "diffusion_module.atom_encoder.n_blocks": 1,
        "diffusion_module.atom_decoder.n_blocks": 1,
        "confidence_head.n_blocks": 1,
    }
    settings = sizes | {f"model.{name}": value for name, value in parts.items()}
    settings |= {"sample_diffusion.N_step": 3, "sample_diffusion.N_sample": 2}
    settings |= {"triangle_multiplicative": "torch", "triangle_attention": "torch"} | more
    of_msa = {"enable": True, "sample_cutoff": {"train": 8, "test": 8}, "min_size": {"train": 1, "test": 1}}
    arguments = " ".join(f"--{name} {value}" for name, value in settings.items())
    configs = base_configs().configs | {"data": {"msa": of_msa}}
    return with_random_weights(Protenix(parse_configs(configs, arguments, fill_required_with_null=True)))


def features() -> dict[str, torch.Tensor]:
    """Two chains of three atoms a token, with templates and an MSA."""
    generator = torch.Generator().manual_seed(1)
    tokens, templates = 20, 2
    token, atom = torch.arange(tokens), torch.arange(3 * tokens)
    chain = (token >= 10).long()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    def classes(count: int, *shape: int) -> torch.Tensor:
        return nn.functional.one_hot(integers(count, *shape), count).float()

    return {
        "ref_pos": normal(len(atom), 3),
        "ref_charge": torch.zeros(len(atom)),
        "ref_mask": torch.ones(len(atom)),
        "ref_element": classes(128, len(atom)),
        "ref_atom_name_chars": classes(64, len(atom), 4),
        "ref_space_uid": atom // 3,
        "atom_to_token_idx": atom // 3,
        "atom_to_tokatom_idx": atom % 3,
        "is_ligand": torch.zeros_like(atom),
        "distogram_rep_atom_mask": (atom % 3 == 1).long(),
        "frame_atom_index": 3 * token[:, None] + torch.arange(3),
        "has_frame": torch.ones_like(token),
        "asym_id": chain,
        "entity_id": chain,
        "sym_id": torch.zeros_like(token),
        "residue_index": token,
        "token_index": token,
        "token_bonds": torch.zeros(tokens, tokens),
        "restype": classes(32, tokens),
        "profile": normal(tokens, 32).softmax(-1),
        "deletion_mean": torch.zeros(tokens),
        "msa": integers(32, SEQUENCES, tokens),
        "has_deletion": torch.zeros(SEQUENCES, tokens),
        "deletion_value": torch.zeros(SEQUENCES, tokens),
        "template_aatype": integers(32, templates, tokens),
        "template_distogram": classes(39, templates, tokens, tokens),
        "template_pseudo_beta_mask": torch.ones(templates, tokens, tokens),
        "template_unit_vector": normal(templates, tokens, tokens, 3),
        "template_backbone_frame_mask": torch.ones(templates, tokens, tokens),
    }


@torch.no_grad()
@pytest.mark.parametrize("hidden_scale_up", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared and fused diffusion"])
def test_small_model(hidden_scale_up, shared):
    options = {"enable_diffusion_shared_vars_cache": shared, "enable_efficient_fusion": shared}
    model = small_model(hidden_scale_up=hidden_scale_up, **options)

    def predict() -> dict[str, torch.Tensor]:
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(7)
        out, *_ = model(features(), {}, {}, mode="inference", mc_dropout_apply_rate=0.0)
        return {name: out[name] for name in ("coordinate", "contact_probs", "plddt", "pae", "pde")}

    expected = predict()
    with accelerate(model, DENSE) as acceleration:
        found = [predict()]
        acceleration.configure(full_rank(20))
        found.append(predict())
        assert {report["choice"] for report in acceleration.reports()} == {"factors"}
    assert len(acceleration.around) == 1 + 2 + 2 + 1, "template, MSA, trunk, confidence"
    reasons = {skipped.reason for skipped in acceleration.skipped}
    assert len(reasons) == 2
    assert any("diffusion transformer" in reason for reason in reasons)
    for name, value in expected.items():
        for prediction in found:
            assert distance(prediction[name], value) < 1e-4, name
