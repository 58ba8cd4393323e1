"""Checks of attention that need OpenFold for AlphaFold 2; ``test_openfold.py`` runs them in an environment that has it.

Where ``import openfold`` works already, whatever the release: ``pytest tests/integrations/openfold*_checks.py``.
"""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from openfold.model.evoformer import EvoformerBlock, ExtraMSABlock
from openfold.model.msa import MSARowAttentionWithPairBias
from openfold.model.triangular_attention import TriangleAttention, TriangleAttentionEndingNode
from torch import nn

from pairformer_fast import AttentionConfig, accelerate
from pairformer_fast.bias import PairBiasAttention, collect_reports
from pairformer_fast.model import slabs
from tests.integrations.comparison import DENSE, attention_around_a_node, distance, full_rank
from tests.integrations.openfold_cases import (
    C_M,
    C_Z,
    UPDATES,
    assert_same_gradients,
    block,
    gradients,
    inputs,
    outputs,
    with_random_weights,
)

ATTENTIONS = ("msa_att_row", "tri_att_start", "tri_att_end")


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
    with accelerate(model, AttentionConfig(bias="svd")), pytest.raises(RuntimeError, match="bias='dense'"):
        gradients(model, batch)


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


def test_nothing_to_accelerate_is_an_error():
    column = block().msa_att_col
    with pytest.raises(ValueError, match=r"looked for TriangleAttention.*_msa_att.*no pair bias"):
        accelerate(column)
    assert not any(isinstance(module, PairBiasAttention) for module in column.modules())
