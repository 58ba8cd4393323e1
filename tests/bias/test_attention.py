import json

import pytest
import torch
from biases import make_bias, make_qkv
from torch import nn

from pairformer_fast.bias import (
    PairBiasAttention,
    collect_reports,
    observed_decisions,
    set_attention,
    warm_starts,
)
from pairformer_fast.config import AttentionConfig

SHAPES = [(2, 17, 17, 3, 24), (2, 17, 3, 24)]


def make_inputs(shape, kind="random"):
    q, k, v = make_qkv(*shape)
    mask = torch.ones(shape[:-2], dtype=torch.bool)
    mask[1, ..., 12:] = False
    return q, k, v, make_bias(kind, 2, 3, 17), mask


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = PairBiasAttention()
        self.block = nn.Sequential(nn.Linear(2, 2), PairBiasAttention())


@pytest.mark.parametrize("shape", SHAPES, ids=["triangle", "single"])
def test_full_rank_and_dense_give_what_the_reference_gives(shape):
    inputs = make_inputs(shape)
    module = PairBiasAttention().eval()
    want = module(*inputs)
    valid = inputs[-1].any(1) if len(shape) == 5 else inputs[-1]  # queries that are not padding
    valid = valid[:, None, :] if len(shape) == 5 else valid
    for config in (
        AttentionConfig(backend="torch", bias="dense"),
        AttentionConfig(bias="svd", rank=17),
        AttentionConfig(backend="reference", bias="svd", rank=17),
    ):
        module.config = config
        difference = (module(*inputs) - want).abs().sum((-1, -2)) * valid
        assert difference.max() < 1e-4, config


def test_low_rank_changes_the_output_and_reports_by_how_much():
    q, k, v, bias, mask = make_inputs(SHAPES[0])
    module = PairBiasAttention().eval()
    want = module(q, k, v, bias, mask)
    module.reset()
    module.config = AttentionConfig(bias="svd", rank=2)
    change = (module(q, k, v, bias, mask) - want)[0].abs().amax((0, 1, 3))  # per head, entry without padding
    (report,) = module.report
    assert report.choice == "factors"
    assert report.rank == (2, 2, 2)
    for head in range(3):
        assert 0 < report.probed_std[head] < report.probed_max[head]
        assert 0 < report.probed_mean[head] <= report.probed_max[head] <= report.bound[head] < 1
        assert 0.01 < change[head] <= report.bound[head] * 2 * v.abs().max()


def test_reports_are_collected_as_json_and_cleared():
    model = Model().eval()
    inputs = make_inputs(SHAPES[1])
    set_attention(model, AttentionConfig(bias="svd", rank=1))
    model.block[1](*inputs)
    model.first(*inputs)
    model.first(*inputs)
    reports = collect_reports(model)
    assert [report["name"] for report in reports] == ["first", "first", "block.1"]
    assert json.loads(json.dumps(reports))[2]["rank"] == [1, 1, 1]

    set_attention(model, AttentionConfig.reference())
    assert collect_reports(model) == []
    model.first(*inputs)
    (dense,) = collect_reports(model)
    assert (dense["choice"], list(dense["rank"]), list(dense["bound"])) == ("dense", [17] * 3, [0.0] * 3)
    assert (dense["dense_heads"], dense["reason"]) == ((0, 1, 2), "asked for")


def test_training_does_not_pile_up_reports():
    module = PairBiasAttention().train()
    module(*make_inputs(SHAPES[1]))
    assert module.report == []


def test_a_model_without_attention_is_an_error():
    with pytest.raises(ValueError, match="Linear has no PairBiasAttention"):
        set_attention(nn.Linear(1, 1), AttentionConfig())


@pytest.mark.parametrize("method", ["svd", "randomised"])
def test_gradient_through_a_decomposition_is_refused(method):
    q, k, v, bias, mask = make_inputs(SHAPES[0], "rank_deficient")
    bias.requires_grad_()
    module = PairBiasAttention()
    module.config = AttentionConfig(bias=method)
    with pytest.raises(RuntimeError, match=f"bias method '{method}'.*dense.*no_grad"):
        module(q, k, v, bias, mask)
    with torch.no_grad():
        module(q, k, v, bias, mask)
    q.requires_grad_()
    module(q, k, v, bias.detach(), mask).sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("method", ["dense", "auto"])
def test_dense_bias_trains(method):
    q, k, v, bias, mask = make_inputs(SHAPES[0])
    bias.requires_grad_()
    module = PairBiasAttention()
    module.config = AttentionConfig(bias=method, backend="torch")
    module(q, k, v, bias, mask).square().sum().backward()
    assert bias.grad[0].any()
    assert not bias.grad[1, :, :, 12:].any()


def test_bf16_model_under_svd():
    q, k, v, bias, mask = (x.bfloat16() if x.is_floating_point() else x for x in make_inputs(SHAPES[0]))
    module = PairBiasAttention().eval()
    want = module(q, k, v, bias, mask)
    module.config = AttentionConfig(bias="svd", rank=17)
    torch.testing.assert_close(module(q, k, v, bias, mask)[0], want[0], atol=0.1, rtol=0)


def test_report_is_the_worst_of_the_batch():
    q, k, v, bias, _ = make_inputs(SHAPES[0])
    bias[0] = bias[0].mean(-1, keepdim=True)
    module = PairBiasAttention().eval()
    module.config = AttentionConfig(bias="svd", rank=2)
    for entry in (slice(None), slice(1, 2), slice(0, 1)):
        module(*(x[entry] for x in (q, k, v, bias)), None)
    both, hard, easy = module.report
    assert both.rank == hard.rank == (2, 2, 2)
    assert easy.rank == (0, 0, 0)
    assert both.bound == pytest.approx(hard.bound)
    assert both.probed_max == pytest.approx(hard.probed_max)
    assert min(hard.bound) > 0.1 > 1e-6 > max(easy.bound)


def test_warm_starts_last_from_recycle_to_recycle_of_one_run(trained_biases):
    """A bias seen again is decomposed better; neither other tokens nor a run that follows are influenced."""
    model, seen = Model().eval(), []
    set_attention(model, AttentionConfig(bias="randomised", rank=16))
    bias = trained_biases[0]

    def run(bias):
        q, k, v = make_qkv(1, *bias.shape[-2:], bias.shape[1], 8)
        model.first(q, k, v, bias, None)

    with observed_decisions(model, lambda _, decision: seen.append(decision.outcome.factors)):
        for _ in range(2):
            with torch.no_grad(), warm_starts(model):
                run(bias)
                run(bias)
                run(bias[..., :40, :40])
        run(bias)
    cold, warm, small, *again, alone = (torch.cat([factors.phi_q, factors.phi_k], dim=-1) for factors in seen)
    for one, other in zip((cold, warm, small, cold), (*again, alone), strict=True):
        assert torch.equal(one, other)
    centred = bias - bias.mean(-1, keepdim=True)
    errors = [(centred - factors.phi_q @ factors.phi_k.mT).norm() for factors in seen[:2]]
    assert errors[1] < errors[0]
