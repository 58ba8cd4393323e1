"""Blocks replayed from one graph give what they give by themselves, forward and backward."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pairformer_fast.bias import collect_reports, set_attention
from pairformer_fast.config import AttentionConfig, Backend, BiasMethod, PairformerConfig
from pairformer_fast.model.pairformer import PairformerStack
from pairformer_fast.model.replay import BlockReplay, Call, CaptureError, can_replay
from tests.model.replayed import Repeated, repeats  # noqa: F401
from tests.model.test_pairformer import SMALL, randomised

BLOCKS = 3
DENSE = AttentionConfig(bias=BiasMethod.DENSE)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("repeats")
    return request.param


def stack(device: str, dropout: float = 0.0) -> PairformerStack:
    made = PairformerStack(PairformerConfig(**SMALL.model_dump() | {"no_blocks": BLOCKS, "pair_dropout": dropout}))
    made = randomised(made).to(device)
    set_attention(made, DENSE)
    return made


def problem(device: str, tokens: int = 9) -> tuple[tuple[Tensor, Tensor], Call]:
    torch.manual_seed(tokens)
    s, z = torch.randn(1, tokens, SMALL.c_s, device=device), torch.randn(1, tokens, tokens, SMALL.c_z, device=device)
    mask = torch.rand(1, tokens, device=device) > 0.2
    return (s, z), Call({"mask": mask, "pair_mask": mask[:, :, None] & mask[:, None]}, {})


def expected(blocks: nn.ModuleList, call: Call, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    for block in blocks:
        states = checkpoint(lambda s, z, block=block: block(s, z, **call.masks), *states, use_reentrant=False)
    return states


def close(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).norm() <= 1e-5 * (1 + wanted.norm())


def test_inference_is_that_of_the_blocks_and_reports_too(device: str) -> None:
    model, replay = stack(device).eval(), BlockReplay()
    for tokens in (9, 9, 12):
        states, call = problem(device, tokens)
        with torch.no_grad():
            wanted = expected(model.blocks, call, states)
        reports = collect_reports(model)
        set_attention(model, DENSE)
        found = replay.infer(model.blocks, call, states)
        assert collect_reports(model) == reports
        set_attention(model, DENSE)
        for one, other in zip(found, wanted, strict=True):
            close(one, other)


def test_one_graph_serves_all_blocks_and_later_weights(device: str) -> None:
    model, replay = stack(device).eval(), BlockReplay()
    states, call = problem(device)
    before = replay.infer(model.blocks, call, states)
    graph = next(iter(replay._held.values())).graph
    with torch.no_grad():
        model.blocks[1].pair_stack.pair_transition.linear_out.weight.mul_(2)
        wanted = expected(model.blocks, call, states)
    after = replay.infer(model.blocks, call, states)
    assert next(iter(replay._held.values())).graph is graph
    close(after[1], wanted[1])
    assert (after[1] - before[1]).abs().max() > 1e-3


def test_results_go_where_they_are_wanted_and_inputs_are_left_alone(device: str) -> None:
    model, replay = stack(device).eval(), BlockReplay()
    states, call = problem(device)
    copies = tuple(x.clone() for x in states)
    wanted = replay.infer(model.blocks, call, states)
    assert all(torch.equal(x, y) for x, y in zip(states, copies, strict=True))
    found = replay.infer(model.blocks, call, states, states)
    assert found[1] is states[1]
    close(states[1], wanted[1])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_checkpointed_blocks(device: str, dropout: float) -> None:
    model, replay = stack(device, dropout).train(), BlockReplay()
    states, call = problem(device)
    weights = [torch.randn_like(x) for x in states]

    def gradients(run) -> list[Tensor]:
        torch.manual_seed(5)
        leaves = [x.clone().requires_grad_() for x in states]
        out = run(tuple(2 * x for x in leaves))
        loss = sum((x * w).sum() for x, w in zip(out, weights, strict=True))
        parameters = list(model.parameters())
        return [*out, *torch.autograd.grad(loss, [*leaves, *parameters]), torch.rand(3, device=device)]

    wanted = gradients(lambda x: expected(model.blocks, call, x))
    for _ in range(2):
        found = gradients(lambda x: replay.train(model.blocks, call, x))
        for one, other in zip(found, wanted, strict=True):
            close(one, other)
    assert not replay._held
    assert not replay._backward


def test_a_block_that_changes_the_dtype_is_refused(device: str) -> None:
    class Widening(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x.double(),)

    with pytest.raises(CaptureError, match="a block makes"):
        BlockReplay().infer([Widening()], Call({}, {}), (torch.ones(3, device=device),))


@pytest.mark.gpu
def test_after_a_capture_that_fails_others_succeed_and_noise_goes_on() -> None:
    class Asking(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x + torch.rand_like(x) * x.sum().item(),)

    x = torch.ones(3, device="cuda")
    torch.manual_seed(3)
    wanted = torch.rand(3, device="cuda")
    torch.manual_seed(3)
    with pytest.raises(CaptureError, match="cannot be captured"):
        BlockReplay().infer([Asking()], Call({}, {}), (x,))
    assert torch.equal(torch.rand(3, device="cuda"), wanted)
    gc.collect()
    torch.cuda.empty_cache()
    linear = nn.Linear(3, 3).cuda()
    close(BlockReplay().infer([Plain(linear)], Call({}, {}), (x,))[0], linear(x))


class Plain(nn.Sequential):
    """A module that gives a tuple of states."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (super().forward(x),)


def test_large_states_are_not_held(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, replay = stack(device).eval(), BlockReplay()
    states, call = problem(device)
    replay.infer(model.blocks, call, states)
    assert len(replay._held) == 1
    replay.release()
    monkeypatch.setattr("pairformer_fast.model.replay.KEPT_BYTES", 1)
    replay.infer(model.blocks, call, states)
    assert not replay._held


def test_hooks_factors_and_observers_keep_blocks_from_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack("cpu").eval()
    (_, z), _ = problem("cpu")
    assert not can_replay(model.blocks, z), "not on a CPU"
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert can_replay(model.blocks, z)
    hook = model.blocks[1].single_transition.register_forward_hook(lambda *_: None)
    assert not can_replay(model.blocks, z)
    hook.remove()
    set_attention(model, AttentionConfig(bias=BiasMethod.SVD, rank=2, backend=Backend.REFERENCE))
    assert not can_replay(model.blocks, z)
    set_attention(model, DENSE)
    monkeypatch.setattr(model.blocks[0].single_transition, "forward", lambda *_: None)
    assert not can_replay(model.blocks, z)


def test_graphs_of_a_stream_share_memory_that_goes_with_the_last_of_them(device: str) -> None:
    replays = [BlockReplay() for _ in range(2)]
    where = torch.ones(1, device=device).device
    first, second = (replay._memory(where) for replay in replays)
    assert first is second
    kept = weakref.ref(first)
    del first, second, replays[0]
    assert kept() is not None
    replays.clear()
    assert kept() is None


def large(hidden: int) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """A block on a GPU, and states too large for its graph to be held."""
    torch.manual_seed(0)
    block = Plain(nn.Linear(256, hidden), nn.Linear(hidden, 256)).cuda()
    return block, (torch.randn(2**17, 256, device="cuda"),)


@pytest.mark.gpu
def test_captures_one_after_the_other_take_no_further_memory() -> None:
    (block, states), replays = large(512), [BlockReplay(), BlockReplay()]
    reserved = []
    for _ in range(40):  # more than PyTorch has streams
        for replay in replays:
            replay.infer([block], Call({}, {}), states)
        reserved.append(torch.cuda.memory_reserved())
    assert max(reserved[2:]) == reserved[1]


@pytest.mark.gpu
def test_a_capture_gets_memory_that_pytorch_keeps_unused() -> None:
    block, states = large(8192)
    expected = block(*states)[0].detach()
    gc.collect()
    torch.cuda.empty_cache()
    chunks = [torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(torch.cuda.mem_get_info()[0] >> 30)]
    del chunks
    assert torch.cuda.mem_get_info()[0] < 2**31, "less than the hidden layer takes"
    found = BlockReplay().infer([block], Call({}, {}), states)[0]
    close(found, expected)
    assert torch.cuda.mem_get_info()[0] > 2**31, "not computed without a graph"
