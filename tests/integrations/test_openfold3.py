"""An OpenFold3 whose attention runs through this package computes, and learns, what OpenFold3 does."""

import copy
import pickle

import pytest
import torch
from torch import nn

from pairformer_fast import AttentionConfig, accelerate
from pairformer_fast.bias import PairBiasAttention, collect_reports
from tests.integrations.comparison import DENSE, distance

pytest.importorskip("openfold3", reason="needs the extra [openfold]: pip install '.[openfold]'")

from openfold3.core.model.latent.base_blocks import PairBlock
from openfold3.core.model.latent.pairformer import PairFormerBlock, PairFormerStack
from openfold3.core.model.layers.attention_pair_bias import AttentionPairBias, CrossAttentionPairBias
from openfold3.core.model.layers.diffusion_transformer import DiffusionTransformer
from openfold3.core.model.layers.msa import MSAPairWeightedAveraging, MSARowAttentionWithPairBias
from openfold3.core.model.layers.transition import ReLUTransition
from openfold3.core.model.layers.triangular_attention import TriangleAttention, TriangleAttentionEndingNode
from openfold3.core.model.primitives import Attention

C_S, C_Z = 32, 16
PAIR = {
    "c_z": C_Z,
    "c_hidden_mul": 16,
    "c_hidden_pair_att": 8,
    "no_heads_pair": 2,
    "transition_type": "swiglu",
    "transition_n": 2,
    "pair_dropout": 0.25,
    "fuse_projection_weights": False,
    "inf": 1e9,
}
BLOCK = PAIR | {"c_s": C_S, "c_hidden_pair_bias": 8, "no_heads_pair_bias": 4}
# A constant added to all logits of a query: softmax ignores it, so this gradient is zero but for rounding.
NO_GRADIENT = "attn_pair_bias.layer_norm_z.bias"


def with_random_weights(module: nn.Module, seed: int = 0) -> nn.Module:
    """Non-zero everywhere: OpenFold3 zero-initialises output projections, which would hide every other weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            scale = value.shape[-1] ** -0.5 if value.dim() > 1 else 0.2
            value.copy_(scale * torch.randn(value.shape, generator=generator))
            if "layer_norm" in name and name.endswith("weight"):
                value += 1
    return module.eval()


def block() -> nn.Module:
    return with_random_weights(PairFormerBlock(**BLOCK))


def stack(**options) -> nn.Module:
    return with_random_weights(PairFormerStack(**BLOCK, no_blocks=2, **({"blocks_per_ckpt": None} | options)))


def inputs(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Batch of two: one padded, one with a hole."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, n)
    mask[1, n - n // 3 :] = 0
    mask[0, n // 2 : n // 2 + 3] = 0
    return {
        "s": torch.randn(2, n, C_S, generator=generator),
        "z": torch.randn(2, n, n, C_Z, generator=generator),
        "single_mask": mask,
        "pair_mask": mask[:, :, None] * mask[:, None, :],
    }


def outputs(model: nn.Module, batch: dict[str, torch.Tensor], **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Single and pair representation without padding, where OpenFold3 averages over masked keys and we give zeros."""
    s, z = model(**(batch | {"s": batch["s"].clone(), "z": batch["z"].clone()}), **options)
    return s[batch["single_mask"] > 0], z[batch["pair_mask"] > 0]


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a loss over kept tokens, in all parameters and both inputs."""
    batch = batch | {name: batch[name].clone().requires_grad_() for name in "sz"}
    torch.manual_seed(5)  # of dropout
    s, z = model(**batch)
    loss = (s * batch["single_mask"][..., None]).sin().sum() + (z * batch["pair_mask"][..., None]).sin().sum()
    leaves = dict(model.named_parameters()) | {name: batch[name] for name in "sz"}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if name.endswith(NO_GRADIENT):
            weight = expected[name.removesuffix("bias") + "weight"]
            assert found[name].norm() < 1e-3 * weight.norm(), name
        else:
            assert gradient.norm() > 0, f"{name}: the comparison would be empty"
            assert distance(found[name], gradient) < 1e-4, name


def hold_core_inputs(model: nn.Module) -> list[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
    """q, k, v, dense bias and mask of every attention core, and its result, filled as the model runs."""
    calls: list = []

    def watch(core: PairBiasAttention) -> None:
        decide, attend_packed, biases = core.decide, core.attend_packed, []

        def decide_and_keep(q, k, bias, mask):
            biases.append(bias)
            return decide(q, k, bias, mask)

        def attend_and_keep(qkv, decided, mask):
            result = attend_packed(qkv, decided, mask)
            calls.append(((*qkv.unbind(-3), biases[-1], mask), result))
            return result

        core.decide, core.attend_packed = decide_and_keep, attend_and_keep
        core.register_forward_hook(lambda _, arguments, result: calls.append((arguments, result)))

    for module in model.modules():
        if isinstance(module, PairBiasAttention):
            watch(module)
    return calls


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("n", [17, 40])
def test_dense_bias_gives_openfold3s_outputs_and_gradients(n, training):
    model, batch = stack().train(training), inputs(n)
    torch.manual_seed(5)
    expected, expected_gradients = outputs(model, batch), gradients(model, batch)
    with accelerate(model, DENSE) as acceleration:
        torch.manual_seed(5)
        found, found_gradients = outputs(model, batch), gradients(model, batch)
    assert acceleration.swapped == tuple(
        f"blocks.{i}.{name}"
        for i in range(2)
        for name in ("pair_stack.tri_att_start", "pair_stack.tri_att_end", "attn_pair_bias")
    )
    assert not acceleration.skipped
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5
    assert_same_gradients(found_gradients, expected_gradients)


def test_activation_checkpoints_give_the_same_gradients():
    model, batch = stack(blocks_per_ckpt=1, use_reentrant=False).train(), inputs(17)
    expected = gradients(model, batch)
    with accelerate(model, DENSE):
        found = gradients(model, batch)
    assert_same_gradients(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("n", [17, 40])
def test_factors_of_full_rank_change_nothing(n):
    model, batch = stack(), inputs(n)
    expected = outputs(model, batch)
    with accelerate(model, AttentionConfig(bias="svd", rank=n)) as acceleration:
        found = outputs(model, batch)
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5
    reports = acceleration.reports()
    assert [report["name"] for report in reports] == list(acceleration.swapped)
    assert all(report["choice"] == "factors" and max(report["eps"]) < 1e-4 for report in reports)


@torch.no_grad()
def test_low_rank_reports_its_error_and_the_certificate_holds():
    model, batch = block(), inputs(40)
    expected = outputs(model, batch)
    with accelerate(model, AttentionConfig(bias="svd", rank=2)) as acceleration:
        calls = hold_core_inputs(model)
        found = outputs(model, batch)
    assert distance(found[1], expected[1]) > 1e-3
    reports = acceleration.reports()
    assert len(reports) == len(calls) == 3
    exact = PairBiasAttention()
    for report, (arguments, approximate) in zip(reports, calls, strict=True):
        assert set(report["rank"]) == {2}
        assert min(report["eps"]) > 0.01
        for mean, largest, bound in zip(report["probed_mean"], report["probed_max"], report["bound"], strict=True):
            assert 0 < mean <= largest <= bound < 1
        value, mask = arguments[2], arguments[4]
        diameter = (value.unsqueeze(-3) - value.unsqueeze(-4)).norm(dim=-1).flatten(0, -2).amax(0)
        moved = (approximate - exact(*arguments))[mask.expand(approximate.shape[:-2])].norm(dim=-1).amax(0)
        assert (moved <= torch.tensor(report["bound"]) * diameter).all()
        assert moved.min() > 0


@torch.no_grad()
def test_tolerance_chooses_the_rank_and_configure_changes_it():
    model, batch = block(), inputs(40)
    acceleration = accelerate(model, AttentionConfig(bias="svd", tolerance=0.2))
    outputs(model, batch)
    loose = acceleration.reports()
    acceleration.configure(AttentionConfig(bias="svd", tolerance=0.01))
    outputs(model, batch)
    tight = acceleration.reports()
    assert all(max(report["probed_mean"]) <= 0.01 for report in tight)
    assert sum(max(report["rank"]) for report in loose) < sum(max(report["rank"]) for report in tight)
    assert [report | {"name": ""} for report in collect_reports(model)] == [report | {"name": ""} for report in tight]
    acceleration.reset()
    assert acceleration.reports() == []


def test_training_through_a_decomposition_is_refused():
    model, batch = block().train(), inputs(17)
    with accelerate(model, AttentionConfig(bias="svd")), pytest.raises(RuntimeError, match="bias='dense'"):
        gradients(model, batch)


@pytest.mark.parametrize("transpose_bias", [True, False])
def test_orientation_of_the_bias(transpose_bias):
    """Attention around the ending node as AlphaFold 3 (b_ik) and AlphaFold 2 (b_ki) write it."""
    n, heads, width = 9, 2, 8
    module = with_random_weights(TriangleAttention(C_Z, width, heads)).double()
    z = torch.randn(1, n, n, C_Z, dtype=torch.float64)
    with accelerate(module, DENSE):
        found = module(z.transpose(1, 2), transpose_bias=transpose_bias).transpose(1, 2)

    normed = module.layer_norm(z)[0]
    q, k, v, g = (getattr(module.mha, f"linear_{x}")(normed).view(n, n, heads, width) for x in "qkvg")
    bias = module.linear_z(normed)
    bias = bias if transpose_bias else bias.transpose(0, 1)
    logits = torch.einsum("ijhc,kjhc->ijkh", q, k) * width**-0.5 + bias[:, None]
    attended = torch.einsum("ijkh,kjhc->ijhc", logits.softmax(2), v) * g.sigmoid()
    assert distance(found[0], module.mha.linear_o(attended.flatten(-2))) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("cls", [TriangleAttention, TriangleAttentionEndingNode])
@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 1), (2, 3)])
def test_leading_dimensions_of_a_pair_representation(leading, cls):
    """Unbatched, batched, and with a dimension of templates."""
    n = 11
    module = with_random_weights(cls(C_Z, 8, 2))
    z = torch.randn(*leading, n, n, C_Z)
    mask = torch.ones(*leading, n, n)
    mask[..., 7:, :] = mask[..., :, 7:] = 0
    expected = [module(z), module(z, mask)[mask > 0]]
    with accelerate(module, DENSE):
        found = [module(z), module(z, mask)[mask > 0]]
        assert type(module) is not cls
        assert isinstance(module, cls)
    assert type(module) is cls
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("option", [{"chunk_size": 4}, {"inplace_safe": True}, {"use_lma": True}])
def test_flags_of_the_host(option):
    model, batch = stack(), inputs(17)
    expected = outputs(model, batch, **option)
    with accelerate(model, AttentionConfig(bias="svd", rank=17)) as acceleration:
        found = outputs(model, batch, **option)
    assert len(acceleration.reports()) == 6, "one factorisation per attention, however the host would cut it up"
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "flag", ["use_deepspeed_evo_attention", "use_cueq_triangle_kernels", "use_triton_triangle_kernels"]
)
def test_kernels_of_the_host_are_not_needed(flag):
    batch = inputs(17)
    model = block()
    start, single = model.pair_stack.tri_att_start, model.attn_pair_bias
    expected = start(batch["z"]), single(batch["s"], batch["z"], batch["single_mask"])
    with accelerate(model, DENSE):
        found = start(batch["z"], **{flag: True}), single(batch["s"], batch["z"], batch["single_mask"], **{flag: True})
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5


@pytest.mark.parametrize("copies", [1, 3], ids=["shared-bias", "bias-per-sample"])
def test_diffusion_transformer_shares_the_bias_over_samples(copies):
    dims = {"c_a": 24, "c_s": C_S, "c_z": C_Z, "c_hidden": 8, "no_heads": 3, "no_blocks": 2, "n_transition": 2}
    model = with_random_weights(DiffusionTransformer(**dims, n_query=None, n_key=None, inf=1e9))
    n, samples = 13, 3
    a, s = torch.randn(2, samples, n, 24), torch.randn(2, 1, n, C_S).expand(2, samples, n, C_S)
    z = torch.randn(2, copies, n, n, C_Z)
    mask = torch.ones(2, 1, n)
    mask[1, :, 9:] = 0

    def run() -> list[torch.Tensor]:
        out = model(a=a, s=s, z=z, mask=mask, use_high_precision_attention=True)
        out = out[mask.expand(2, samples, n) > 0]
        return [out, *torch.autograd.grad(out.sin().sum(), list(model.parameters()))]

    expected = run()
    with accelerate(model, DENSE) as acceleration:
        calls = hold_core_inputs(model)
        found = run()
    assert acceleration.swapped == ("blocks.0.attention_pair_bias", "blocks.1.attention_pair_bias")
    assert {arguments[3].shape[0] for arguments, _ in calls} == {2 * copies}
    assert distance(found[0], expected[0]) < 1e-5
    for x, y in zip(found[1:], expected[1:], strict=True):
        assert distance(x, y) < 1e-4


def test_high_precision_is_kept_under_bfloat16():
    model, batch = block(), inputs(17)
    with torch.no_grad():
        exact = outputs(model, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = outputs(model, batch)
            with accelerate(model, DENSE):
                calls = hold_core_inputs(model)
                ours = outputs(model, batch)
    assert [arguments[0].dtype for arguments, _ in calls] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert distance(a.float(), c) < 1.2 * distance(b.float(), c)


def test_an_entry_of_padding_alone_is_finite_and_disturbs_nothing():
    model, batch = block(), inputs(17)
    batch["single_mask"][1] = 0
    batch["pair_mask"][1] = 0
    expected, expected_gradients = outputs(model, batch), gradients(model, batch)
    for config in (DENSE, AttentionConfig(bias="svd", rank=17)):
        with accelerate(model, config), torch.no_grad():
            s, z = model(**batch)
            assert s.isfinite().all()
            assert z.isfinite().all()
            assert distance(z[batch["pair_mask"] > 0], expected[1]) < 1e-5
    with accelerate(model, DENSE):
        assert_same_gradients(gradients(model, batch), expected_gradients)


def test_weights_keep_their_names_and_objects_and_restore_undoes_everything():
    model, batch = block(), inputs(17)
    weights, keys = list(model.parameters()), list(model.state_dict())
    modules = {path: (type(module), dict(vars(module))) for path, module in model.named_modules()}
    before = model(**batch)
    acceleration = accelerate(model, DENSE)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    assert isinstance(model.pair_stack.tri_att_end, TriangleAttention)
    assert isinstance(model.pair_stack.tri_att_end.mha, Attention)

    acceleration.restore()
    after = {path: (type(module), vars(module)) for path, module in model.named_modules()}
    assert list(after) == list(modules)
    for path, (cls, attributes) in modules.items():
        assert after[path][0] is cls
        assert list(after[path][1]) == list(attributes)
    assert all(torch.equal(a, b) for a, b in zip(model(**batch), before, strict=True))

    second = accelerate(model, DENSE)
    acceleration.restore()
    assert len(collect_reports(model)) == 0, "the first object must not undo the second swap"
    second.restore()


def test_an_error_inside_the_context_restores():
    model = block()
    with pytest.raises(KeyError), accelerate(model):
        raise KeyError("any")
    assert type(model.pair_stack.tri_att_start) is TriangleAttention


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_accelerated_and_independent(duplicate):
    model, batch = block(), inputs(17)
    expected = outputs(model, batch)
    acceleration = accelerate(model, DENSE)
    other = duplicate(model)
    acceleration.restore()
    assert len(collect_reports(other)) == 0
    for a, b in zip(outputs(other, batch), expected, strict=True):
        assert distance(a, b) < 1e-5
    assert len(collect_reports(other)) == 3


@torch.no_grad()
def test_weights_load_either_way():
    batch = inputs(17)
    plain, fast = block(), with_random_weights(PairFormerBlock(**BLOCK), seed=1)
    with accelerate(fast, DENSE):
        fast.load_state_dict(plain.state_dict())
        expected = outputs(plain, batch)
        assert distance(outputs(fast, batch)[1], expected[1]) < 1e-5
        third = PairFormerBlock(**BLOCK).eval()
        third.load_state_dict(fast.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(third, batch), expected, strict=True))


def test_other_attention_is_reported_and_left_alone():
    class Variant(TriangleAttention):
        def forward(self, *arguments, **options):
            return 2 * super().forward(*arguments, **options)

    attention = {"c_q": 8, "c_k": 8, "c_v": 8, "c_s": 8, "c_z": 8, "c_hidden": 4, "no_heads": 2}
    model = nn.ModuleDict(
        {
            "pair": PairBlock(**PAIR),
            "atoms": CrossAttentionPairBias(**attention, n_query=4, n_key=8),
            "msa": MSARowAttentionWithPairBias(8, 8, 4, 2),
            "averaging": MSAPairWeightedAveraging(8, 4, 8, 2),
            "variant": Variant(C_Z, 8, 2),
            "patched": TriangleAttention(C_Z, 8, 2),
            "other": nn.MultiheadAttention(8, 2),
        }
    )
    model["patched"].forward = lambda *arguments, **options: None
    classes = {path: type(module) for path, module in model.named_modules()}
    acceleration = accelerate(model, DENSE)
    assert acceleration.swapped == ("pair.tri_att_start", "pair.tri_att_end")
    assert [skipped.path for skipped in acceleration.skipped] == list(model)[1:]
    reasons = {skipped.path: skipped.reason for skipped in acceleration.skipped}
    assert "subclass" in reasons["variant"]
    assert "instance" in reasons["patched"]
    assert acceleration.skipped[0].cls == "openfold3.core.model.layers.attention_pair_bias.CrossAttentionPairBias"
    changed = {path for path, module in model.named_modules() if classes.get(path) is not type(module)}
    assert acceleration.around == ("pair",)
    assert changed == {"pair", *(f"{path}{end}" for path in acceleration.swapped for end in ("", ".mha", ".mha.core"))}

    again = [s.path for s in accelerate(nn.ModuleList([model, block()]), DENSE).skipped if "already" in s.reason]
    assert again == [f"0.{path}" for path in (*acceleration.swapped, *acceleration.around)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "openfold3"),
        (lambda: PairBlock(**PAIR).tri_mul_out, "AttentionPairBias"),
        (lambda: MSARowAttentionWithPairBias(8, 8, 4, 2), "MSA is not supported"),
    ],
)
def test_nothing_to_accelerate_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        accelerate(make())


def relu(model: PairBlock) -> None:
    model.pair_transition = ReLUTransition(C_Z, 2)


def patched(model: PairBlock) -> None:
    model.tri_mul_in.forward = model.tri_mul_in.forward


def with_offset(model: PairBlock) -> None:
    model.tri_mul_out.linear_g = nn.Linear(C_Z, C_Z)


@pytest.mark.parametrize("change", [relu, patched, with_offset])
def test_a_pair_block_with_unknown_parts_keeps_its_own_code_around_attention(change):
    model, batch = with_random_weights(PairBlock(**PAIR)), inputs(17)
    change(model)
    keep = batch["pair_mask"] > 0
    with torch.no_grad():
        expected = model(batch["z"].clone(), batch["pair_mask"])[keep]
        with accelerate(model, DENSE) as acceleration:
            assert acceleration.around == (() if change is relu else ("pair_transition",))
            assert acceleration.swapped == ("tri_att_start", "tri_att_end")
            assert distance(model(batch["z"].clone(), batch["pair_mask"])[keep], expected) < 1e-5


def test_a_pair_bias_from_a_layer_norm_without_scale_stays_the_hosts():
    model, batch = block(), inputs(17)
    model.attn_pair_bias.layer_norm_z.weight = None
    expected = outputs(model, batch)
    with accelerate(model, DENSE):
        assert type(model.attn_pair_bias) is AttentionPairBias
        for found, want in zip(outputs(model, batch), expected, strict=True):
            assert distance(found, want) < 1e-5


def test_in_place_work_is_done_where_the_host_allows_it():
    model, batch = with_random_weights(PairBlock(**PAIR)), inputs(17)
    with torch.no_grad(), accelerate(model, DENSE):
        z = batch["z"].clone()
        expected = model(z, batch["pair_mask"])
        assert torch.equal(z, batch["z"])
        found = model(z, batch["pair_mask"], inplace_safe=True)
    assert found.data_ptr() == z.data_ptr()
    assert torch.equal(found, expected)
