"""Checks that need OpenFold for AlphaFold 2; ``test_openfold.py`` runs them in an environment that has it.

Where ``import openfold`` works already, whatever the release: ``pytest tests/integrations/openfold_checks.py``.
"""

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
from openfold.config import model_config
from openfold.data.data_transforms import make_atom14_masks
from openfold.model.evoformer import EvoformerBlock, ExtraMSABlock, MSATransition
from openfold.model.model import AlphaFold
from openfold.model.msa import MSARowAttentionWithPairBias
from openfold.model.pair_transition import PairTransition
from openfold.model.triangular_attention import TriangleAttention, TriangleAttentionEndingNode
from openfold.model.triangular_multiplicative_update import (
    TriangleMultiplicationIncoming,
    TriangleMultiplicationOutgoing,
)
from torch import nn

from pairformer_fast import AttentionConfig, accelerate
from pairformer_fast.bias import Configured, PairBiasAttention, collect_reports
from pairformer_fast.inference.errors import InputError
from pairformer_fast.integrations.openfold_flag import accelerate_as_configured, flashbias_flag
from pairformer_fast.integrations.openfold_updates import NEW_CLASS
from pairformer_fast.model import slabs
from tests.kernels.conftest import mended_interpreter  # noqa: F401 -- a fixture

C_M, C_Z, SEQUENCES = 24, 16, 5
DENSE = AttentionConfig(bias="dense")
ON_TRITON = AttentionConfig(bias="dense", backend="triton")
"""Kernels run in Triton's interpreter on a CPU."""
BLOCK = {
    "c_m": C_M,
    "c_z": C_Z,
    "c_hidden_msa_att": 8,
    "c_hidden_opm": 8,
    "c_hidden_mul": 16,
    "c_hidden_pair_att": 8,
    "no_heads_msa": 4,
    "no_heads_pair": 2,
    "transition_n": 2,
    "msa_dropout": 0.15,
    "pair_dropout": 0.25,
    "inf": 1e9,
    "eps": 1e-8,
    # Where the constructor has them: GitHub's 2.x and extra MSA blocks.
    "no_column_attention": False,
    "opm_first": False,
    "fuse_projection_weights": False,
    "ckpt": False,
}
ATTENTIONS = ("msa_att_row", "tri_att_start", "tri_att_end")
UPDATES = ("msa_transition", "tri_mul_out", "tri_mul_in", "pair_transition")
TRANSITIONS = [PairTransition, MSATransition]
MULTIPLICATIONS = [cls for cls in NEW_CLASS if cls not in TRANSITIONS]
# A constant added to all logits of a query: softmax ignores it, so these gradients are zero but for rounding.
NO_GRADIENT = ("msa_att_row.layer_norm_z.bias", "ipa.linear_b.bias")


def full_rank(n: int) -> AttentionConfig:
    return AttentionConfig(bias="svd", rank=n)


def with_random_weights(module: nn.Module, gain: float = 1.0) -> nn.Module:
    """Non-zero everywhere: OpenFold zero-initialises output projections, which would hide every other weight."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            scale = gain * value.shape[-1] ** -0.5 if value.dim() > 1 else 0.2
            value.copy_(scale * torch.randn(value.shape, generator=generator))
            if "layer_norm" in name and name.endswith("weight"):
                value += 1
    return module.eval()


def block(cls: type[nn.Module] = EvoformerBlock) -> nn.Module:
    accepted = inspect.signature(cls.__init__).parameters
    return with_random_weights(cls(**{name: value for name, value in BLOCK.items() if name in accepted}))


def inputs(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Batch of two: residues masked at the end of one and in the middle of the other, and gaps in the MSA."""
    generator = torch.Generator().manual_seed(seed)
    residues = torch.ones(2, n)
    residues[1, n - n // 3 :] = 0
    residues[0, n // 2 : n // 2 + 3] = 0
    present = torch.rand(2, SEQUENCES, n, generator=generator) > 0.2
    present[:, 0] = True
    present[1, -1] = False
    return {
        "m": torch.randn(2, SEQUENCES, n, C_M, generator=generator),
        "z": torch.randn(2, n, n, C_Z, generator=generator),
        "msa_mask": residues[:, None] * present,
        "pair_mask": residues[:, :, None] * residues[:, None, :],
    }


def outputs(model: nn.Module, batch: dict[str, torch.Tensor], **options) -> tuple[torch.Tensor, torch.Tensor]:
    """MSA and pair representation without padding, where OpenFold averages over masked keys and we give zeros."""
    m, z = model(**(batch | {"m": batch["m"].clone(), "z": batch["z"].clone()}), **options)
    return m[batch["msa_mask"] > 0], z[batch["pair_mask"] > 0]


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a loss over kept entries, in all parameters and both inputs."""
    batch = batch | {name: batch[name].clone().requires_grad_() for name in "mz"}
    model.zero_grad()
    torch.manual_seed(5)  # of dropout
    m, z = outputs(model, batch)
    (m.sin().sum() + z.sin().sum()).backward()
    leaves = dict(model.named_parameters()) | {name: batch[name] for name in "mz"}
    return {name: leaf.grad.clone() for name, leaf in leaves.items()}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if name.endswith(NO_GRADIENT):
            weight = expected[name.removesuffix("bias") + "weight"]
            assert found[name].norm() < 1e-3 * weight.norm(), name
        else:
            assert gradient.norm() > 0, f"{name}: the comparison would be empty"
            assert distance(found[name], gradient) < 1e-4, name


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("cls", [EvoformerBlock, ExtraMSABlock])
@pytest.mark.parametrize("n", [17, 40])
def test_dense_bias_gives_openfolds_outputs_and_gradients(n, cls, training):
    model, batch = block(cls).train(training), inputs(n)
    torch.manual_seed(5)
    expected, expected_gradients = outputs(model, batch), gradients(model, batch)
    with accelerate(model, DENSE) as acceleration:
        torch.manual_seed(5)
        found, found_gradients = outputs(model, batch), gradients(model, batch)
    assert [path.rpartition(".")[2] for path in acceleration.swapped] == list(ATTENTIONS)
    assert [path.rpartition(".")[2] for path in acceleration.around] == list(UPDATES)
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5
    assert_same_gradients(found_gradients, expected_gradients)


@torch.no_grad()
@pytest.mark.parametrize("n", [17, 40])
def test_factors_of_full_rank_change_nothing_and_of_low_rank_report_their_error(n):
    model, batch = block(), inputs(n)
    expected = outputs(model, batch)
    with accelerate(model, full_rank(n)) as acceleration:
        found = outputs(model, batch)
        reports = acceleration.reports()
        acceleration.configure(AttentionConfig(bias="svd", rank=1))
        coarse, coarse_reports = outputs(model, batch), acceleration.reports()
    for a, b, c in zip(found, expected, coarse, strict=True):
        assert distance(a, b) < 1e-5
        assert distance(c, b) > 1e-3
    assert [report["name"] for report in reports] == list(acceleration.swapped)
    assert all(report["choice"] == "factors" and max(report["eps"]) < 1e-4 for report in reports)
    assert all(0 < max(report["probed_mean"]) < max(report["bound"]) for report in coarse_reports)


def test_training_through_a_decomposition_is_refused():
    model, batch = block().train(), inputs(17)
    with accelerate(model), pytest.raises(RuntimeError, match="bias='dense'"):
        gradients(model, batch)


def attention_around_a_node(module: nn.Module, z: torch.Tensor, ending: bool) -> torch.Tensor:
    """AlphaFold 2's Algorithms 13 and 14 as they are written, with b_jk and b_ki; z ``[N, N, C]``."""
    heads, mha = module.no_heads, module.mha
    z = module.layer_norm(z)
    q, k, v, g = (getattr(mha, f"linear_{x}")(z).unflatten(-1, (heads, -1)) for x in "qkvg")
    b, scale = module.linear(z), q.shape[-1] ** -0.5
    if ending:
        logits = torch.einsum("ijhc,kjhc->ijkh", q, k) * scale + b.transpose(0, 1)[:, None]
        attended = torch.einsum("ijkh,kjhc->ijhc", logits.softmax(2), v)
    else:
        logits = torch.einsum("ijhc,ikhc->ijkh", q, k) * scale + b[None]
        attended = torch.einsum("ijkh,ikhc->ijhc", logits.softmax(2), v)
    return mha.linear_o((attended * g.sigmoid()).flatten(-2))


@torch.no_grad()
@pytest.mark.parametrize("config", [DENSE, full_rank(9)], ids=["dense", "factors"])
@pytest.mark.parametrize("kind", ["starting", "ending", "ending in the Evoformer"])
def test_orientation_of_the_bias(kind, config):
    cls = TriangleAttentionEndingNode if kind == "ending" else TriangleAttention
    module = with_random_weights(cls(C_Z, 8, 2)).double()
    z = torch.randn(1, 9, 9, C_Z, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with accelerate(module, config):
        found = module(z.transpose(1, 2)).transpose(1, 2) if "Evoformer" in kind else module(z)
    assert distance(found[0], attention_around_a_node(module, z[0], ending=kind != "starting")) < 1e-10
    assert distance(found[0], attention_around_a_node(module, z[0], ending=kind == "starting")) > 1e-2


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("cls", MULTIPLICATIONS, ids=lambda cls: cls.__name__)
def test_triangle_multiplication(cls, backend):
    """Of all that the release has, fused ones included."""
    n = 9
    module = with_random_weights(cls(C_Z, 24))
    z = torch.randn(2, n, n, C_Z, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask = (torch.rand(2, n, n, generator=torch.Generator().manual_seed(2)) > 0.3).float()

    def results() -> dict[str, torch.Tensor]:
        leaves = {"z": z} | dict(module.named_parameters())
        update = module(z, mask)
        gradients = torch.autograd.grad(update.sin().sum(), list(leaves.values()))
        return {"update": update.detach()} | dict(zip(leaves, gradients, strict=True))

    expected = results()
    with torch.no_grad():
        expected["without a mask"] = module(z)
    # Attention beside it, without which there is nothing to accelerate.
    with accelerate(nn.ModuleList([module, TriangleAttention(C_Z, 8, 2)]), AttentionConfig(backend=backend)):
        assert type(module) is NEW_CLASS[cls]
        found = results()
        with torch.no_grad():
            found["without a mask"] = module(z)
            added, overwritten = z.clone(), z.clone()
            assert module(added, mask, inplace_safe=True, _add_with_inplace=True) is added
            assert module(overwritten, mask, inplace_safe=True) is overwritten
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert distance(found[name], value) < 1e-5, name
    assert distance(added - z, expected["update"]) < 1e-5
    assert distance(overwritten, expected["update"]) < 1e-5


@pytest.mark.parametrize("cls", TRANSITIONS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_transition_by_triton(leading, cls):
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")
    module = with_random_weights(cls(C_Z, 4))
    x = torch.randn(*leading, 3, 5, C_Z).transpose(-2, -3).requires_grad_()
    mask = (torch.rand(x.shape[:-1]) > 0.3).float()

    def results() -> list[torch.Tensor]:
        update = module(x, mask, chunk_size=4)
        return [
            update.detach(),
            module(x).detach(),
            *torch.autograd.grad(update.sin().sum(), [x, *module.parameters()]),
        ]

    expected = results()
    # Attention beside it, without which there is nothing to accelerate.
    with accelerate(nn.ModuleList([module, TriangleAttention(C_Z, 8, 2)]), DENSE) as acceleration:
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True)), "OpenFold's own code on a CPU"
        acceleration.configure(ON_TRITON)
        found = results()
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5


def test_block_by_triton():
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")
    model, batch = block(), inputs(6)
    expected, expected_gradients = outputs(model, batch), gradients(model, batch)
    with accelerate(model, DENSE) as acceleration:
        for path in acceleration.around:  # in the interpreter attention would take 20 s
            model.get_submodule(path).config = ON_TRITON
        found, found_gradients = outputs(model, batch), gradients(model, batch)
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5
    assert_same_gradients(found_gradients, expected_gradients)


@torch.no_grad()
@pytest.mark.parametrize("cls", MULTIPLICATIONS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("inplace", [False, True])
def test_leading_dimensions_of_triangle_multiplication(inplace, leading, cls):
    """In place, whether or not they can be seen as one, and longer than a slab."""
    n = 37
    module = with_random_weights(cls(C_Z, 8))
    z = torch.randn(*reversed(leading), n, n, C_Z)
    z = z.transpose(0, 1) if len(leading) == 2 else z
    mask = (torch.rand(n, n) > 0.3).float().expand(*leading, n, n)
    expected = module(z.clone(), mask) + z * inplace
    with accelerate(nn.ModuleList([module, TriangleAttention(C_Z, 8, 2)]), DENSE):
        found = module(z, mask, inplace_safe=inplace, _add_with_inplace=True)
    assert (found is z) is inplace
    assert distance(found, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("cls", [TriangleAttention, TriangleAttentionEndingNode])
@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3)])
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
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_row_attention_of_an_msa(leading):
    """With one bias for all sequences, with and without a mask, and longer than what OpenFold projects at once."""
    n = 263
    module = with_random_weights(MSARowAttentionWithPairBias(C_M, C_Z, 4, 2))
    m, z = torch.randn(*leading, 2, n, C_M), torch.randn(*leading, n, n, C_Z)
    mask = (torch.rand(*leading, 2, n) > 0.2).float()
    expected = [module(m, z), module(m, z, mask), module(m, mask=mask)]
    with accelerate(module, DENSE) as acceleration:
        found = [module(m, z), module(m, z, mask), module(m, mask=mask)]
    assert len(acceleration.reports()) == 2, "without a pair representation there is no bias to take over"
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("config", [DENSE, full_rank(70)], ids=["dense", "factors"])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_slabs_of_attention(leading, config, monkeypatch):
    """Some rows at a time, as for large inputs; decisions about the bias are made once, on a sample of rows."""
    n = 70
    model = with_random_weights(
        nn.ModuleList([TriangleAttentionEndingNode(C_Z, 8, 2), MSARowAttentionWithPairBias(C_M, C_Z, 4, 2)])
    )
    ending, row = model
    z, m = torch.randn(*leading, n, n, C_Z), torch.randn(*leading, n + 3, n, C_M)
    z_mask, m_mask = (torch.rand(x.shape[:-1]) > 0.2 for x in (z, m))
    expected = ending(z, z_mask.float()), row(m, z, m_mask.float())
    monkeypatch.setattr(slabs, "SMALLEST_BYTES", 0)
    attended = []
    monkeypatch.setattr(PairBiasAttention, "attend", count_rows(attended, PairBiasAttention.attend))
    with accelerate(model, config) as acceleration:
        found = ending(z, z_mask.float()), row(m, z, m_mask.float())
    assert attended == [64, 6, 64, 9]
    assert len(acceleration.reports()) == 2
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5


def count_rows(counts: list[int], attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def attend_and_count(self, q, *others):
        counts.append(q.shape[1])
        return attend(self, q, *others)

    return attend_and_count


@torch.no_grad()
@pytest.mark.parametrize("option", [{"chunk_size": 4}, {"inplace_safe": True}, {"use_lma": True}])
def test_flags_of_the_host(option):
    model, batch = block(), inputs(17)
    expected = outputs(model, batch, **option)
    with accelerate(model, full_rank(17)) as acceleration:
        found = outputs(model, batch, **option)
    assert len(acceleration.reports()) == 3, "one factorisation per attention, however the host would cut it up"
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5


@torch.no_grad()
def test_kernels_and_chunks_of_the_host_are_not_needed():
    model, batch = block(), inputs(17)
    row = model.msa_att_row
    start = next(module for module in model.modules() if type(module) is TriangleAttention)
    expected = start(batch["z"]), row(batch["m"], batch["z"])
    with accelerate(model, DENSE):
        for flag in ("use_memory_efficient_kernel", "use_lma"):
            assert distance(start(batch["z"], chunk_size=4, **{flag: True}), expected[0]) < 1e-5
        rows = {"use_flash": True}, {"_chunk_logits": 4, "_checkpoint_chunks": False}, {"chunk_size": 4}
        for flags in rows:
            assert distance(row(batch["m"], batch["z"], **flags), expected[1]) < 1e-5


def test_an_entry_of_padding_alone_is_finite_and_disturbs_nothing():
    model, batch = block(), inputs(17)
    batch["msa_mask"][1] = batch["pair_mask"][1] = 0
    expected, expected_gradients = outputs(model, batch), gradients(model, batch)
    with accelerate(model, DENSE) as acceleration:
        assert_same_gradients(gradients(model, batch), expected_gradients)
        for config in (DENSE, full_rank(17)):
            acceleration.configure(config)
            with torch.no_grad():
                m, z = model(**batch)
            assert m.isfinite().all()
            assert z.isfinite().all()
            assert distance(z[batch["pair_mask"] > 0], expected[1]) < 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16_is_as_near_to_the_truth_as_openfold(device):
    model, batch = block().to(device), {name: x.to(device) for name, x in inputs(40).items()}
    with torch.no_grad():
        exact = outputs(model, batch)
        with torch.autocast(device, dtype=torch.bfloat16):
            theirs = outputs(model, batch)
            with accelerate(model, DENSE):
                ours = outputs(model, batch)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert distance(a.float(), c) < 1.2 * distance(b.float(), c)


def test_weights_keep_their_names_and_objects_and_restore_undoes_everything():
    model, batch = block(), inputs(17)
    weights, keys = list(model.parameters()), list(model.state_dict())
    modules = {path: (type(module), set(vars(module))) for path, module in model.named_modules()}
    before = model(**batch)
    acceleration = accelerate(model, DENSE)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    duplicates = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    acceleration.restore()
    assert {path: (type(module), set(vars(module))) for path, module in model.named_modules()} == modules
    assert all(torch.equal(a, b) for a, b in zip(model(**batch), before, strict=True))
    for duplicate in duplicates:
        assert len(collect_reports(duplicate)) == 0
        a, b = outputs(duplicate, batch)[1], before[1][batch["pair_mask"] > 0]
        assert distance(a, b) < 1e-5
        assert len(collect_reports(duplicate)) == 3


def test_other_attention_is_reported_and_left_alone():
    class Variant(TriangleAttention):
        def forward(self, *arguments, **options):
            return 2 * super().forward(*arguments, **options)

    model = nn.ModuleDict({"block": block(), "extra": block(ExtraMSABlock), "variant": Variant(C_Z, 8, 2)})
    for name in ("patched", "older"):
        model[name] = TriangleAttention(C_Z, 8, 2)
    model["patched"].forward = lambda *arguments, **options: None
    del model["older"].linear
    classes = {path: type(module) for path, module in model.named_modules()}
    acceleration = accelerate(model, DENSE)
    assert len(acceleration.swapped) == 6
    reasons = {skipped.path: skipped.reason for skipped in acceleration.skipped}
    assert list(reasons) == [
        "block.msa_att_col._msa_att",
        "extra.msa_att_col.global_attention",
        "variant",
        "patched",
        "older",
    ]
    expected = ("no pair bias", "no pair bias", "subclass", "instance", "no linear")
    for reason, words in zip(reasons.values(), expected, strict=True):
        assert words in reason
    changed = {path for path, module in model.named_modules() if classes.get(path) is not type(module)}
    attention = {f"{path}{end}" for path in acceleration.swapped for end in ("", ".mha", ".mha.core")}
    assert changed == attention | set(acceleration.around)

    again = [s.path for s in accelerate(nn.ModuleList([model, block()]), DENSE).skipped if "already" in s.reason]
    assert again == [f"0.{path}" for path in (*acceleration.swapped, *acceleration.around)]


def test_other_updates_are_reported_and_left_alone():
    class Variant(TriangleMultiplicationIncoming):
        pass

    model = nn.ModuleDict({"block": block(), "variant": Variant(C_Z, 8)})
    path, patched = next((path, m) for path, m in model.named_modules() if type(m) is TriangleMultiplicationOutgoing)
    patched.forward = lambda *arguments, **options: None
    acceleration = accelerate(model, DENSE)
    assert [path.rpartition(".")[2] for path in acceleration.around] == [x for x in UPDATES if x != "tri_mul_out"]
    reasons = {skipped.path: skipped.reason for skipped in acceleration.skipped}
    assert "instance" in reasons[path]
    assert "subclass" in reasons["variant"]
    assert type(patched) is TriangleMultiplicationOutgoing


def test_nothing_to_accelerate_is_an_error():
    column = block().msa_att_col
    with pytest.raises(ValueError, match=r"looked for TriangleAttention.*_msa_att.*no pair bias"):
        accelerate(column)
    assert not any(isinstance(module, PairBiasAttention) for module in column.modules())


def small_model(**settings) -> nn.Module:
    """All of AlphaFold 2, with templates and extra MSA, of usual widths but with few blocks."""
    config = model_config("model_1", train=True)
    config.globals.update(settings)
    config.model.evoformer_stack.no_blocks = 2
    config.model.evoformer_stack.blocks_per_ckpt = None
    config.model.extra_msa.extra_msa_stack.no_blocks = 1
    config.model.template.template_pair_stack.no_blocks = 1
    config.model.template.template_pair_stack.blocks_per_ckpt = None
    # With larger weights the structure module amplifies rounding, OpenFold's own included, beyond the tolerances.
    return with_random_weights(AlphaFold(config), gain=0.5)


def features(n: int) -> dict[str, torch.Tensor]:
    """Random features of two recycling iterations, with a hole in the sequence."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    aatype, templates, extra = integers(20, n), 3, 4
    seq_mask = torch.ones(n)
    seq_mask[5:8] = 0
    batch = {
        "aatype": aatype,
        "target_feat": nn.functional.one_hot(aatype, 22).float(),
        "residue_index": torch.arange(n),
        "seq_mask": seq_mask,
        "msa_feat": uniform(SEQUENCES, n, 49),
        "msa_mask": (uniform(SEQUENCES, n) > 0.2) * seq_mask,
        "extra_msa": integers(22, extra, n),
        "extra_has_deletion": integers(2, extra, n).float(),
        "extra_deletion_value": uniform(extra, n),
        "extra_msa_mask": (uniform(extra, n) > 0.2) * seq_mask,
        "template_mask": torch.tensor([1.0, 0.0, 1.0]),
        "template_aatype": integers(22, templates, n),
        "template_pseudo_beta": 10 * uniform(templates, n, 3),
        "template_pseudo_beta_mask": integers(2, templates, n).float(),
        "template_all_atom_mask": integers(2, templates, n, 37).float(),
        "template_all_atom_positions": 10 * uniform(templates, n, 37, 3),
        "template_torsion_angles_sin_cos": uniform(templates, n, 7, 2),
        "template_alt_torsion_angles_sin_cos": uniform(templates, n, 7, 2),
        "template_torsion_angles_mask": integers(2, templates, n, 7) * seq_mask[:, None],
    }
    batch["msa_mask"][0] = seq_mask
    batch |= make_atom14_masks(batch)
    return {name: value[..., None].expand(*value.shape, 2) for name, value in batch.items()}


def predictions(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of everything that a loss would see, without padding; positions in nm, whose sine is not all rounding."""
    torch.manual_seed(5)  # of dropout
    out = model(dict(batch))
    keep = batch["seq_mask"][..., 0] > 0
    return {
        "msa": out["msa"][batch["msa_mask"][..., 0] > 0],
        "pair": out["pair"][keep][:, keep],
        "single": out["single"][keep],
        "positions": out["final_atom_positions"][keep] / 10,
        "lddt": out["lddt_logits"][keep],
        "distogram": out["distogram_logits"][keep][:, keep],
    }


def model_gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of all parameters but those of heads that :func:`predictions` does not hold, in training mode."""
    model.train().zero_grad()
    sum(value.sin().mean() for value in predictions(model, batch).values()).backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_small_model():
    n = 24
    model, batch = small_model(), features(n)
    expected_gradients = model_gradients(model, batch)
    assert len(expected_gradients) > 400
    with torch.no_grad():
        expected = predictions(model, batch)
        with accelerate(model, DENSE) as acceleration:
            found = {"dense": predictions(model, batch)}
            acceleration.configure(full_rank(n))
            found["factors"] = predictions(model, batch)
            choices = {report["choice"] for report in acceleration.reports()}
            acceleration.configure(DENSE)
            with torch.enable_grad():
                found_gradients = model_gradients(model, batch)
    assert len(acceleration.swapped) == 2 + 3 + 2 * 3, "templates, extra MSA, Evoformer"
    assert len(acceleration.around) == 3 + 4 + 2 * 4
    assert choices == {"factors"}
    for name, value in expected.items():
        assert all(distance(of_kind[name], value) < 1e-5 for of_kind in found.values()), name
    assert_same_gradients(found_gradients, expected_gradients)


def test_flag_of_the_configuration():
    """The same state_dict, numbers and gradients with the flag off and on; factors in evaluation only."""
    n = 16
    plain, batch = small_model(), features(n)
    assert accelerate_as_configured(plain) is None
    with flashbias_flag():
        off = small_model()
        on = small_model(use_flashbias=True, flashbias={"bias": "svd", "rank": n})
    assert not any(isinstance(module, Configured) for module in [*off.modules(), *plain.modules()])
    on.load_state_dict(plain.state_dict())
    plain.load_state_dict(on.state_dict())

    expected_gradients = model_gradients(plain, batch)
    assert_same_gradients(model_gradients(on, batch), expected_gradients)
    with torch.no_grad():
        expected = predictions(plain, batch)
        found = predictions(on, batch)
        reports = collect_reports(on)
        predictions(on, batch)
    assert {report["choice"] for report in reports} == {"factors"}
    assert len(collect_reports(on)) == len(reports), "of the last pass alone"
    for name, value in expected.items():
        assert distance(found[name], value) < 1e-5, name

    duplicate = copy.deepcopy(on)
    with torch.no_grad():
        assert distance(predictions(duplicate, batch)["pair"], expected["pair"]) < 1e-5
    assert_same_gradients(model_gradients(duplicate, batch), expected_gradients)


def test_flag_is_undone():
    model = small_model()
    before = {path: (type(module), set(vars(module))) for path, module in model.named_modules()}
    model.globals.use_flashbias = True
    acceleration = accelerate_as_configured(model)
    assert len(acceleration.swapped) == 11
    acceleration.restore()
    assert {path: (type(module), set(vars(module))) for path, module in model.named_modules()} == before
    assert not model._forward_pre_hooks


def test_flag_by_dotted_keys_as_in_openfolds_scripts():
    with flashbias_flag():
        config = model_config("model_1")
        config.update_from_flattened_dict({"globals.use_flashbias": True, "globals.flashbias.rank": 8})
        assert config.globals.flashbias.to_dict() == AttentionConfig(rank=8).model_dump(mode="json")
    assert "use_flashbias" not in model_config("model_1").globals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_flashbias": "yes"}, "globals.use_flashbias must be true or false, but is 'yes'"),
        ({"use_flashbias": True, "flashbias": {"method": "svd"}}, "globals.flashbias.*: method: Extra inputs"),
        ({"use_flashbias": True, "flashbias": {"bias": "flat"}}, "globals.flashbias.*: bias: Input should be 'auto'"),
        ({"use_flashbias": True, "flashbias": {"bias": "learned"}}, "globals.flashbias: .*'learned'"),
        ({"use_flashbias": True, "flashbias": {"rank": 0}}, "rank: Input should be greater than or equal to 1"),
        ({"use_flashbias": False, "flashbias": "svd"}, "globals.flashbias must hold fields such as bias"),
    ],
)
def test_wrong_values_of_the_flag_are_refused_before_a_model_is_built(settings, message, monkeypatch):
    config = model_config("model_1")
    config.globals.update(settings)
    monkeypatch.setattr(AlphaFold, "__init__", lambda self, config: pytest.fail("was built"))
    with flashbias_flag(), pytest.raises(InputError, match=message):
        AlphaFold(config)
