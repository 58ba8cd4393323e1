"""Checks that need Boltz; ``test_boltz.py`` runs them in an environment that has it.

Where ``import boltz`` works already: ``pytest tests/integrations/boltz_checks.py``.
"""

import copy
import pickle
from functools import partial

import pytest
import torch
from boltz.data import const
from boltz.model.layers.attention import AttentionPairBias as AttentionPairBias1
from boltz.model.layers.attentionv2 import AttentionPairBias as AttentionPairBias2
from boltz.model.layers.pairformer import PairformerLayer, PairformerNoSeqLayer
from boltz.model.layers.triangular_attention.attention import TriangleAttention, TriangleAttentionEndingNode
from boltz.model.models.boltz1 import Boltz1
from boltz.model.models.boltz2 import Boltz2
from boltz.model.modules import trunk, trunkv2
from torch import nn

from pairformer_fast import AttentionConfig, accelerate
from pairformer_fast.bias import PairBiasAttention, collect_reports
from tests.integrations.adapters import CHANGES
from tests.integrations.comparison import DENSE, attention_around_a_node, distance, full_rank

C_S, C_Z, C_M, SEQUENCES = 32, 24, 16, 5
PAIR = {"pairwise_head_width": 8, "pairwise_num_heads": 3}
MSA = {"msa_s": C_M, "token_z": C_Z, "msa_dropout": 0.15, "z_dropout": 0.25, **PAIR}
LAYERS = {
    "Boltz 1 Pairformer": partial(trunk.PairformerLayer, C_S, C_Z, 4, **PAIR),
    "Boltz 1 MSA": partial(trunk.MSALayer, **MSA),
    "Boltz 2 Pairformer": partial(PairformerLayer, C_S, C_Z, 4, v2=True, post_layer_norm=True, **PAIR),
    "Boltz 2 MSA": partial(trunkv2.MSALayer, **MSA),
    "Boltz 2 without s": partial(PairformerNoSeqLayer, C_Z, **PAIR),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def with_random_weights(module: nn.Module) -> nn.Module:
    """Non-zero everywhere: Boltz zero-initialises output projections, which would hide every other weight."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            scale = value.shape[-1] ** -0.5 if value.dim() > 1 else 0.2
            value.copy_(scale * torch.randn(value.shape, generator=generator))
            if ("norm" in name or "proj_z.0" in name) and name.endswith("weight"):
                value += 1
    return module.eval()


def layer(kind: str) -> nn.Module:
    return with_random_weights(LAYERS[kind]())


def inputs(n: int) -> dict[str, torch.Tensor]:
    """Batch of two: tokens masked at the end of one and in the middle of the other."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, n)
    mask[1, n - n // 3 :] = 0
    mask[0, n // 2 : n // 2 + 3] = 0
    shapes = {"s": (2, n, C_S), "z": (2, n, n, C_Z), "m": (2, SEQUENCES, n, C_M)}
    batch = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    msa_mask = (torch.rand(2, SEQUENCES, n, generator=generator) > 0.2) * mask[:, None]
    return batch | {"mask": mask, "pair_mask": mask[:, :, None] * mask[:, None], "msa_mask": msa_mask}


def outputs(model: nn.Module, batch: dict[str, torch.Tensor], **options) -> list[torch.Tensor]:
    """Representations without padding, where Boltz averages over masked keys and we give zeros."""
    keep = batch["pair_mask"] > 0
    if isinstance(model, (trunk.MSALayer, trunkv2.MSALayer)):
        z, m = model(batch["z"], batch["m"], batch["pair_mask"], batch["msa_mask"], **options)
        return [z[keep], m[batch["msa_mask"] > 0]]
    if isinstance(model, PairformerNoSeqLayer):
        return [model(batch["z"], batch["pair_mask"], **options)[keep]]
    s, z = model(batch["s"], batch["z"], batch["mask"], batch["pair_mask"], **options)
    return [z[keep], s[batch["mask"] > 0]]


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


@every_layer
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("n", [17, 40])
def test_a_layer_gives_boltzs_outputs_gradients_and_random_numbers(kind, n, training):
    model, batch = layer(kind).train(training), inputs(n)
    torch.manual_seed(5)
    expected, state = outputs(model, batch), torch.get_rng_state()
    expected_gradients = gradients(model, batch)
    with accelerate(model, DENSE) as acceleration:
        torch.manual_seed(5)
        found = outputs(model, batch)
        assert torch.equal(torch.get_rng_state(), state)
        found_gradients = gradients(model, batch)
    assert acceleration.around == ("pairformer_layer" if kind == "Boltz 2 MSA" else "",)
    assert_close(found, expected, 1e-5)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        if name.endswith(("proj_z.0.bias", "norm_z.bias")):  # a constant for all keys of a query, which softmax ignores
            assert found_gradients[name].norm() < 1e-3 * expected_gradients[name.replace("bias", "weight")].norm()
        else:
            assert gradient.norm() > 0, f"{name}: the comparison would be empty"
            assert distance(found_gradients[name], gradient) < 1e-4, name


@torch.no_grad()
@every_layer
@pytest.mark.parametrize("n", [5, 33])
def test_in_fp64_a_layer_is_boltzs_to_rounding(kind, n, monkeypatch):
    """Boltz casts to fp32 in places, which would hide small differences: made a cast to fp64 for this test."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model, batch = layer(kind).double(), {name: value.double() for name, value in inputs(n).items()}
    expected = outputs(model, batch)
    with accelerate(model, DENSE) as acceleration:
        assert_close(outputs(model, batch), expected, 1e-13)
        acceleration.configure(full_rank(n))
        assert_close(outputs(model, batch), expected, 1e-10)


@torch.no_grad()
@every_layer
def test_factors_of_low_rank_report_their_error(kind):
    model, batch = layer(kind), inputs(40)
    expected = outputs(model, batch)
    with accelerate(model, AttentionConfig(bias="svd", rank=1)) as acceleration:
        found, reports = outputs(model, batch), acceleration.reports()
    assert distance(found[0], expected[0]) > 1e-3
    assert sorted(report["name"] for report in reports) == sorted(acceleration.swapped)
    for report in reports:
        assert report["choice"] == "factors"
        assert set(report["rank"]) == {1}
        assert 0 < max(report["probed_mean"]) < max(report["bound"])


@torch.no_grad()
@pytest.mark.parametrize("version", [AttentionPairBias1, AttentionPairBias2])
def test_attention_moves_no_further_than_certified(version):
    """By tanh(eps / 2) times the diameter of the values, head by head, here through the identity as last layer."""
    n, heads = 24, 4
    module = with_random_weights(version(C_S, C_Z, heads)).double()
    module.proj_o.weight.copy_(torch.eye(C_S))
    module.proj_g.weight.zero_()
    s, z = (torch.randn(shape, dtype=torch.float64) for shape in ((1, n, C_S), (1, n, n, C_Z)))
    arguments = (s, z, torch.ones(1, n), s)[: 3 if version is AttentionPairBias1 else 4]
    with accelerate(module, DENSE) as acceleration:
        exact = module(*arguments)
        acceleration.configure(AttentionConfig(bias="svd", rank=3))
        coarse, (report,) = module(*arguments), acceleration.reports()
    values = module.proj_v(module.norm_s(s) if version is AttentionPairBias1 else s).view(n, heads, -1)
    moved = 2 * (coarse - exact).view(n, heads, -1).norm(dim=-1).amax(0)  # the gate is one half
    for head, bound in enumerate(report["bound"]):
        assert 0 < moved[head] <= bound * torch.cdist(values[:, head], values[:, head]).max()


@torch.no_grad()
@pytest.mark.parametrize("config", [DENSE, full_rank(9)], ids=["dense", "factors"])
@pytest.mark.parametrize("cls", [TriangleAttention, TriangleAttentionEndingNode])
def test_orientation_of_the_bias(cls, config):
    module, ending = with_random_weights(cls(C_Z, 8, 2)).double(), cls is TriangleAttentionEndingNode
    z = torch.randn(1, 9, 9, C_Z, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with accelerate(module, config):
        found = [module(z), module(z, chunk_size=4)]
    for update in found:
        assert distance(update[0], attention_around_a_node(module, z[0], ending)) < 1e-10
        assert distance(update[0], attention_around_a_node(module, z[0], not ending)) > 1e-2


@torch.no_grad()
def test_in_a_layer_the_ending_node_has_the_orientation_of_alphafold_2():
    """A layer that computes nothing but attention around its ending node."""
    model = layer("Boltz 2 without s").double()
    for part in (model.tri_mul_out.p_out, model.tri_mul_in.p_out, model.tri_att_start.mha.linear_o):
        part.weight.zero_()
    model.transition_z.fc3.weight.zero_()
    z = torch.randn(1, 9, 9, C_Z, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with accelerate(model, DENSE):
        found = model(z, torch.ones(1, 9, 9)) - z
    assert distance(found[0], attention_around_a_node(model.tri_att_end, z[0], True)) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("option", [{"chunk_size_tri_attn": 4}, {"use_kernels": True}])
def test_flags_of_the_host_have_no_effect(option):
    """Its kernels are not installed here, so they are not called either."""
    model, batch = layer("Boltz 2 Pairformer"), inputs(17)
    expected = outputs(model, batch)
    with accelerate(model, full_rank(17)) as acceleration:
        found = outputs(model, batch, **option)
    assert len(acceleration.reports()) == 3, "one factorisation per attention, however the host would cut it up"
    assert_close(found, expected, 1e-5)


@torch.no_grad()
def test_chunks_of_boltz_in_the_msa():
    model, batch = layer("Boltz 1 MSA"), inputs(17)
    options = {"chunk_heads_pwa": True, "chunk_size_transition_msa": 8, "chunk_size_outer_product": 4}
    expected = outputs(model, batch, **options)
    with accelerate(model, DENSE):
        assert_close(outputs(model, batch, **options), expected, 1e-5)


@torch.no_grad()
def test_a_mask_for_all_samples():
    """As the confidence module of Boltz 1 gives it to its MSA layers."""
    model, batch = layer("Boltz 2 Pairformer"), inputs(17)
    mask, pair_mask = batch["mask"][:1], batch["pair_mask"][:1]
    expected = model(batch["s"], batch["z"], mask, pair_mask)
    with accelerate(model, DENSE):
        found = model(batch["s"], batch["z"], mask, pair_mask)
    keep = mask[0] > 0
    assert distance(found[0][:, keep], expected[0][:, keep]) < 1e-5
    assert distance(found[1][:, keep][:, :, keep], expected[1][:, keep][:, :, keep]) < 1e-5


@torch.no_grad()
def test_inputs_are_not_written_to():
    model, batch = layer("Boltz 2 Pairformer"), inputs(17)
    before = {name: value.clone() for name, value in batch.items()}
    with accelerate(model, DENSE):
        outputs(model, batch)
    assert all(torch.equal(value, before[name]) for name, value in batch.items())


@torch.no_grad()
def test_an_entry_of_padding_alone_is_finite_and_disturbs_nothing():
    model, batch = layer("Boltz 2 Pairformer"), inputs(17)
    batch["mask"][1] = batch["pair_mask"][1] = 0
    expected = outputs(model, batch)
    with accelerate(model, DENSE) as acceleration:
        for config in (DENSE, full_rank(17)):
            acceleration.configure(config)
            s, z = model(batch["s"], batch["z"], batch["mask"], batch["pair_mask"])
            assert s.isfinite().all()
            assert z.isfinite().all()
            assert distance(z[batch["pair_mask"] > 0], expected[0]) < 1e-5


def test_training_through_a_decomposition_is_refused():
    model, batch = layer("Boltz 2 without s").train(), inputs(17)
    with accelerate(model, AttentionConfig(bias="svd")), pytest.raises(RuntimeError, match="bias='dense'"):
        gradients(model, batch)


@torch.no_grad()
@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_a_layer_is_as_near_to_the_truth_as_boltzs(kind, dtype):
    """With representations in fp32, as within a stack, and in bf16, as the first layer of a stack gets them."""
    model, batch = layer(kind), inputs(40)
    exact = outputs(model, batch)
    batch = batch | {name: batch[name].to(dtype) for name in "szm"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = outputs(model, batch)
        with accelerate(model, DENSE):
            ours = outputs(model, batch)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert distance(a.float(), c) < 1.2 * distance(b.float(), c)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("path", ["tri_mul_in.g_in", "tri_att_end.linear", "transition_z.fc2", "attention.proj_z.1"])
def test_a_layer_that_was_replaced_keeps_its_effect(path, change):
    model, batch = layer("Boltz 2 Pairformer"), inputs(17)
    before = outputs(model, batch)
    change(model, path)
    expected = outputs(model, batch)
    assert max(map(distance, expected, before)) > 1e-3
    with accelerate(model, DENSE) as acceleration:
        assert_close(outputs(model, batch), expected, 1e-5)
    assert [skipped.path for skipped in acceleration.skipped] == ["attention" if "proj_z" in path else ""]


def test_weights_keep_their_names_and_objects_and_restore_undoes_everything():
    model, batch = layer("Boltz 1 Pairformer"), inputs(17)
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


def test_what_cannot_be_run_as_a_whole_keeps_boltzs_code_around_its_attention():
    """Layers whose parts were replaced, patched or have offsets, such as fairscale's checkpoints of layers."""

    class Variant(TriangleAttention):
        pass

    def without(n: int, **parts: nn.Module) -> nn.Module:
        model = layer("Boltz 2 without s")
        for name, part in parts.items():
            model.set_submodule(name, with_random_weights(part))
        return model

    offset = without(17, **{"tri_mul_out.g_in": nn.Linear(C_Z, 2 * C_Z)})
    patched = without(17)
    patched.forward = partial(type(patched).forward, patched)
    variant = without(17, tri_att_start=Variant(C_Z, 8, 3))
    model, batch = nn.ModuleDict({"offset": offset, "patched": patched, "variant": variant}), inputs(17)
    with torch.no_grad():
        expected = [outputs(part, batch) for part in model.values()]
        with accelerate(model, DENSE) as acceleration:
            found = [outputs(part, batch) for part in model.values()]
    assert acceleration.around == ()
    assert len(acceleration.swapped) == 5
    reasons = {skipped.path: skipped.reason for skipped in acceleration.skipped}
    assert reasons.keys() == {"offset", "patched", "variant", "variant.tri_att_start"}
    assert "tri_mul_out.g_in" in reasons["offset"]
    assert "forward was replaced" in reasons["patched"]
    assert "tri_att_start is not TriangleAttention but" in reasons["variant"]
    assert "subclass" in reasons["variant.tri_att_start"]
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-5)


def test_nothing_to_accelerate_is_an_error():
    averaging = layer("Boltz 1 MSA").pair_weighted_averaging
    with pytest.raises(ValueError, match=r"looked for TriangleAttention.*neither queries nor keys"):
        accelerate(averaging)
    model = layer("Boltz 2 Pairformer")
    with accelerate(model, DENSE), pytest.raises(ValueError, match="accelerated already"):
        accelerate(model)
    assert not any(isinstance(module, PairBiasAttention) for module in model.modules())


TOKENS, REAL, ATOMS = 20, 17, 64


def features() -> dict[str, torch.Tensor]:
    """Two chains of three atoms a token, three tokens of padding, templates and an MSA; what both versions read."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    def classes(count: int, *shape: int) -> torch.Tensor:
        return nn.functional.one_hot(torch.randint(count, (1, *shape), generator=generator), count)

    templates, token, atom = 2, torch.arange(TOKENS), torch.arange(3 * REAL)
    keep, chain = (token < REAL)[None].float(), (token >= 10).long()[None]
    atom_to_token, representative = torch.zeros(1, ATOMS, TOKENS), torch.zeros(1, TOKENS, ATOMS)
    atom_to_token[0, atom, atom // 3] = 1
    representative[0, token[:REAL], 3 * token[:REAL] + 1] = 1
    in_templates = keep[:, None].expand(1, templates, TOKENS)
    zeros = torch.zeros(1, TOKENS)
    msa = classes(const.num_tokens, SEQUENCES, TOKENS)
    return {
        "ref_pos": normal(ATOMS, 3),
        "ref_charge": torch.zeros(1, ATOMS),
        "ref_element": classes(const.num_elements, ATOMS).float(),
        "ref_atom_name_chars": classes(64, ATOMS, 4).float(),
        "ref_space_uid": torch.arange(ATOMS)[None] // 3,
        "atom_pad_mask": (torch.arange(ATOMS) < 3 * REAL)[None].float(),
        "atom_to_token": atom_to_token,
        "token_to_rep_atom": representative,
        "token_pad_mask": keep,
        "token_index": token[None],
        "residue_index": token[None],
        "asym_id": chain,
        "entity_id": chain,
        "sym_id": torch.zeros_like(chain),
        "mol_type": zeros.long(),
        "cyclic_period": zeros,
        "res_type": classes(const.num_tokens, TOKENS).float(),
        "profile": normal(TOKENS, const.num_tokens).softmax(-1),
        "deletion_mean": zeros,
        "pocket_feature": classes(len(const.pocket_contact_info), TOKENS).float(),
        "token_bonds": torch.zeros(1, TOKENS, TOKENS, 1),
        "contact_conditioning": classes(len(const.contact_conditioning_info), TOKENS, TOKENS).float(),
        "contact_threshold": 10 * torch.rand(1, TOKENS, TOKENS, generator=generator),
        "msa": msa,
        "has_deletion": torch.zeros(1, SEQUENCES, TOKENS),
        "deletion_value": torch.zeros(1, SEQUENCES, TOKENS),
        "msa_paired": torch.ones(1, SEQUENCES, TOKENS),
        "msa_mask": keep[:, None].expand(1, SEQUENCES, TOKENS),
        "template_restype": classes(const.num_tokens, templates, TOKENS),
        "template_frame_rot": torch.eye(3).expand(1, templates, TOKENS, 3, 3),
        "template_frame_t": normal(templates, TOKENS, 3),
        "template_cb": 10 * normal(templates, TOKENS, 3),
        "template_ca": 10 * normal(templates, TOKENS, 3),
        "template_mask": in_templates,
        "template_mask_cb": in_templates,
        "template_mask_frame": in_templates,
        "visibility_ids": chain[:, None].expand(1, templates, TOKENS),
        "frames_idx": (3 * token[:, None] + torch.arange(3)).clamp(max=ATOMS - 1)[None],
    }


def small_model(version: type[nn.Module]) -> nn.Module:
    """Everything of a release but affinity, with few channels and blocks."""
    second = version is Boltz2
    pairformer = {"num_heads": 4, "dropout": 0.0, "v2": second, **PAIR}
    heads = {"atom_encoder_depth": 1, "atom_encoder_heads": 2, "atom_decoder_depth": 1, "atom_decoder_heads": 2}
    confidence = {"num_plddt_bins": 8, "num_pde_bins": 8, "num_pae_bins": 8}
    settings = {
        "atom_s": 16,
        "atom_z": 8,
        "token_s": C_S,
        "token_z": C_Z,
        "num_bins": 64,
        "atom_feature_dim": (4 if second else 5) + const.num_elements + 4 * 64,
        "embedder_args": {"atom_encoder_depth": 1, "atom_encoder_heads": 2},
        "msa_args": {name: value for name, value in MSA.items() if name != "token_z"} | {"msa_blocks": 2},
        "pairformer_args": pairformer | {"num_blocks": 2},
        "score_model_args": heads
        | {"dim_fourier": 16, "token_transformer_depth": 2, "token_transformer_heads": 4}
        | {"conditioning_transition_layers": 1, "sigma_data": 16},
        "diffusion_process_args": {},
        "confidence_prediction": True,
        "confidence_model_args": {"confidence_args": confidence},
        "steering_args": dict.fromkeys(("fk_steering", "physical_guidance_update", "contact_guidance_update"), False),
        **{name: {} for name in ("training_args", "validation_args", "diffusion_loss_args")},
    }
    if second:
        template = {"template_dim": 8, "template_blocks": 1, "pairwise_head_width": 4, "pairwise_num_heads": 2}
        settings |= {"validate_structure": False, "use_templates": True, "template_args": template}
        settings["confidence_model_args"]["pairformer_args"] = pairformer | {"num_blocks": 1}
    else:
        settings |= {"alpha_pae": 1.0, "confidence_imitate_trunk": True}
        settings["diffusion_process_args"] = {"use_inference_model_cache": True}
    return with_random_weights(version(**settings))


@torch.no_grad()
@pytest.mark.parametrize("version", [Boltz1, Boltz2])
def test_small_model(version):
    model, keep = small_model(version), features()["token_pad_mask"][0] > 0

    def predict() -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        batch = features()
        if version is Boltz2:
            batch["msa"] = batch["msa"].argmax(-1)
        out = model(batch, recycling_steps=1, num_sampling_steps=3, diffusion_samples=2, max_parallel_samples=2)
        return {
            "s": out["s"][:, keep],
            "z": out["z"][:, keep][:, :, keep],
            "distogram": out["pdistogram"][:, keep][:, :, keep],
            "positions": out["sample_atom_coords"][:, : 3 * REAL],
            "plddt": out["plddt"][:, keep],
            "pae": out["pae"][:, keep][:, :, keep],
            "iptm": out["iptm"],
        }

    expected = predict()
    with accelerate(model, DENSE) as acceleration:
        found = [predict()]
        acceleration.configure(full_rank(TOKENS))
        found.append(predict())
        assert {report["choice"] for report in acceleration.reports()} == {"factors"}
    assert len(acceleration.around) == (2 + 2 + 1 + 1 if version is Boltz2 else 2 * (2 + 2))
    reasons = {skipped.reason for skipped in acceleration.skipped}
    assert len(reasons) == 2
    assert any("diffusion transformer" in reason for reason in reasons)
    for name, value in expected.items():
        for prediction in found:
            assert distance(prediction[name], value) < 1e-4, name
