"""A Pairformer from CUDA graphs gives what it gives without."""

import pytest
import torch

from pairformer_fast.bias import set_attention
from pairformer_fast.config import AttentionConfig
from pairformer_fast.model.graphs import GraphedPairformer
from pairformer_fast.model.pairformer import PairformerBlock, PairformerStack
from tests.model.test_pairformer import SMALL, inputs, randomised, relative


def test_a_module_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="GPU"):
        GraphedPairformer(PairformerBlock(SMALL))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here: run `make gpu-test` on a machine with one")
class TestOnGPU:
    @pytest.fixture
    def stack(self) -> PairformerStack:
        stack = randomised(PairformerStack(SMALL))
        set_attention(stack, AttentionConfig())
        return stack

    def test_sizes_share_a_graph_and_padding_changes_nothing(self, stack):
        graphed = GraphedPairformer(stack)
        for tokens in (40, 64, 33, 40):
            s, z, mask, pair_mask = inputs(tokens)
            with torch.no_grad():
                expected = stack(s, z, mask, pair_mask)
            found = graphed(s, z, mask, pair_mask)
            assert relative(found[0][mask], expected[0][mask]) < 1e-4
            assert relative(found[1][pair_mask], expected[1][pair_mask]) < 1e-4
        assert len(graphed._captured) == 1

    def test_new_weights_in_place_are_seen_and_another_configuration_is_captured_anew(self, stack):
        graphed = GraphedPairformer(stack)
        s, z, mask, pair_mask = inputs(33)
        before = graphed(s, z, mask, pair_mask)
        with torch.no_grad():
            stack.blocks[0].pair_stack.pair_transition.linear_out.weight.mul_(2)
        after = graphed(s, z, mask, pair_mask)
        assert relative(after[1], before[1]) > 1e-3
        set_attention(stack, AttentionConfig.reference())
        assert relative(graphed(s, z, mask, pair_mask)[1][pair_mask], after[1][pair_mask]) < 1e-4
        assert len(graphed._captured) == 2

    def test_autocast_is_part_of_the_key(self, stack):
        graphed = GraphedPairformer(stack)
        s, z, mask, pair_mask = inputs(33)
        exact = graphed(s, z, mask, pair_mask)
        with torch.autocast("cuda", torch.bfloat16):
            rounded = graphed(s, z, mask, pair_mask)
        assert 1e-5 < relative(rounded[1][pair_mask], exact[1][pair_mask]) < 0.05

    def test_many_tokens_go_without_a_graph(self, stack):
        graphed = GraphedPairformer(stack, largest=32)
        graphed(*inputs(33))
        assert not graphed._captured

    def test_what_asks_the_host_is_refused(self, stack):
        graphed = GraphedPairformer(stack)
        set_attention(stack, AttentionConfig(bias="svd", rank=4))
        with pytest.raises(RuntimeError, match="decomposed"):
            graphed(*inputs(33))
        set_attention(stack, AttentionConfig())
        stack.train()
        with pytest.raises(RuntimeError, match="eval"):
            graphed(*inputs(33))
