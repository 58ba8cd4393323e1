"""Pair blocks of OpenFold3's templates, which run one template after the other."""

import pytest
import torch

from pairformer_fast import accelerate

pytest.importorskip("openfold3", reason="needs the extra [openfold]: pip install '.[openfold]'")

from openfold3.core.model.latent.base_blocks import PairBlock
from openfold3.core.model.latent.template_module import TemplatePairBlock

from tests.integrations.comparison import DENSE, distance, full_rank
from tests.integrations.test_openfold3 import PAIR, with_random_weights

C_T, N = 16, 17


def template_block(tri_mul_first: bool = True, ckpt_per_template: bool = False) -> TemplatePairBlock:
    return with_random_weights(
        TemplatePairBlock(
            c_t=C_T,
            c_hidden_tri_mul=8,
            c_hidden_tri_att=8,
            no_heads=2,
            transition_type="swiglu",
            pair_transition_n=2,
            dropout_rate=0.25,
            tri_mul_first=tri_mul_first,
            fuse_projection_weights=False,
            ckpt_per_template=ckpt_per_template,
            inf=1e9,
            use_reentrant=False,
        )
    )


def templates(batch: int = 2, number: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    t, mask = torch.randn(batch, number, N, N, C_T, generator=generator), torch.ones(batch, number, N, N)
    mask[:, 1, 12:] = mask[:, 1, :, 12:] = 0
    return t, mask


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_outputs_and_gradients(training, checkpoints):
    block, (t, mask) = template_block(ckpt_per_template=checkpoints).train(training), templates()

    def learn() -> list[torch.Tensor]:
        torch.manual_seed(5)  # of dropout
        leaves = [t.clone().requires_grad_(), *block.parameters()]
        out = block(leaves[0], mask)[mask > 0]
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]

    expected = learn()
    with accelerate(block, DENSE) as acceleration:
        found = learn()
    assert acceleration.around == ("",)
    assert acceleration.skipped == ()
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"inplace_safe": True}, {"inplace_safe": True, "chunk_size": 4}])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("config", [DENSE, full_rank(N)], ids=["dense", "factors"])
def test_inference(batch, options, config):
    block, (t, mask) = template_block(), templates(batch)
    expected = block(t.clone(), mask, **options)[mask > 0]
    with accelerate(block, config):
        given = t.clone()
        found = block(given, mask, **options)
    assert (found is given) == bool(options)
    assert distance(found[mask > 0], expected) < 1e-5


@torch.no_grad()
def test_blocks_of_another_order_and_of_unknown_classes_keep_their_code_and_are_named():
    class Variant(PairBlock):
        pass

    other, variant, (t, mask) = template_block(tri_mul_first=False), Variant(**PAIR), templates()
    expected = other(t, mask)[mask > 0]
    with accelerate(torch.nn.ModuleDict({"other": other, "variant": variant}), DENSE) as acceleration:
        assert acceleration.around == ("other.pair_transition", "variant.pair_transition")
        assert len(acceleration.swapped) == 4
        reasons = {skipped.path: skipped.reason for skipped in acceleration.skipped}
        assert reasons.keys() == {"other", "variant"}
        assert "before its triangle multiplication" in reasons["other"]
        assert "subclass" in reasons["variant"]
        assert distance(other(t, mask)[mask > 0], expected) < 1e-5
