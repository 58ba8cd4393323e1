"""A Pairformer block with OpenFold3's weights computes what OpenFold3's block computes."""

import pytest
import torch

from pairformer_fast.bias import PairBiasAttention
from pairformer_fast.config import PairformerConfig
from pairformer_fast.model.pairformer import PairformerBlock

latent = pytest.importorskip(
    "openfold3.core.model.latent.pairformer", reason="needs the extra [openfold]: pip install '.[openfold]'"
)

DIMENSIONS = {
    "narrow": PairformerConfig(c_s=64, c_z=64, c_hidden_mul=64, c_hidden_pair_att=16, no_heads_pair=4, no_blocks=1),
    "wide": PairformerConfig(c_s=64, c_z=256, c_hidden_mul=128, c_hidden_pair_att=32, no_heads_pair=8, no_blocks=1),
    "heads": PairformerConfig(c_s=64, c_z=128, c_hidden_pair_att=24, no_heads_pair=16, no_blocks=1),
    "openfold3": PairformerConfig(no_blocks=1),
    "bundled": PairformerConfig(c_s=192, no_blocks=1),
}


def openfold3_block(config: PairformerConfig) -> torch.nn.Module:
    return latent.PairFormerBlock(
        c_s=config.c_s,
        c_z=config.c_z,
        c_hidden_pair_bias=config.c_hidden_pair_bias,
        no_heads_pair_bias=config.no_heads_pair_bias,
        c_hidden_mul=config.c_hidden_mul,
        c_hidden_pair_att=config.c_hidden_pair_att,
        no_heads_pair=config.no_heads_pair,
        transition_type="swiglu",
        transition_n=config.transition_n,
        pair_dropout=config.pair_dropout,
        fuse_projection_weights=False,
        inf=1e9,
    ).eval()


def random_weights(block: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Non-zero everywhere: OpenFold3 zero-initialises output projections, which would hide half of a block."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, value in block.state_dict().items():
        scale = value.shape[-1] ** -0.5 if value.dim() > 1 else 0.2
        weights[name] = scale * torch.randn(value.shape, generator=generator)
        if "layer_norm" in name and name.endswith("weight"):
            weights[name] += 1
    return weights


@pytest.mark.parametrize("n", [1, 17, 63])
@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_block_equals_openfold3(n, dimensions):
    torch.manual_seed(n)
    config = DIMENSIONS[dimensions]
    theirs, ours = openfold3_block(config), PairformerBlock(config).eval()
    weights = random_weights(theirs)
    theirs.load_state_dict(weights)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in weights.items()}
    ours.load_state_dict(weights)

    s, z = torch.randn(2, n, config.c_s), torch.randn(2, n, n, config.c_z)
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[1, n - n // 3 :] = False
    mask[0, n // 2 + 1 : n // 2 + 3] = False
    pair_mask = mask[:, :, None] & mask[:, None, :]
    with torch.no_grad():
        expected_s, expected_z = theirs(s, z, mask.float(), pair_mask.float())
        found_s, found_z = ours(s, z, mask, pair_mask)

    # Rows of masked tokens are undefined: OpenFold3 averages over masked keys there, we return zeros.
    for found, expected, keep in [(found_s, expected_s, mask), (found_z, expected_z, pair_mask)]:
        error = (found[keep] - expected[keep]).norm() / expected[keep].norm()
        assert error < 1e-5


@pytest.mark.parametrize("dimensions", ["narrow", "bundled"])
def test_gradients_equal_openfold3s(dimensions):
    torch.manual_seed(0)
    config, n = DIMENSIONS[dimensions], 17
    theirs, ours = openfold3_block(config), PairformerBlock(config).eval()
    theirs.load_state_dict(random_weights(theirs))
    ours.load_state_dict(theirs.state_dict())
    mask = torch.ones(1, n, dtype=torch.bool)
    mask[:, 12:14] = False
    pair_mask = mask[:, :, None] & mask[:, None, :]
    gradients = []
    for block, masks in ((theirs, (mask.float(), pair_mask.float())), (ours, (mask, pair_mask))):
        generator = torch.Generator().manual_seed(3)
        s = torch.randn(1, n, config.c_s, generator=generator).requires_grad_()
        z = torch.randn(1, n, n, config.c_z, generator=generator).requires_grad_()
        out_s, out_z = block(s, z, *masks)
        loss = (out_s * mask[..., None]).sin().sum() + (out_z * pair_mask[..., None]).sin().sum()
        named = {"s": s, "z": z, **dict(block.named_parameters())}
        gradients.append(dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)))
    expected, found = gradients
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        if name == "attn_pair_bias.layer_norm_z.bias":  # adds the same to all logits of a query, which softmax ignores
            assert found[name].abs().max() < 1e-4
        else:
            assert (found[name] - want).norm() / want.norm() < 1e-4, name


def test_parity_notices_the_orientation_of_the_ending_node(monkeypatch):
    config = DIMENSIONS["bundled"]
    theirs, ours = openfold3_block(config), PairformerBlock(config).eval()
    weights = random_weights(theirs)
    theirs.load_state_dict(weights)
    ours.load_state_dict(weights)
    attention = ours.pair_stack.tri_att_end
    decide = PairBiasAttention.decide
    turn = lambda core, q, k, bias, mask: decide(core, q, k, bias.mT, mask)  # noqa: E731
    monkeypatch.setattr(PairBiasAttention, "decide", turn)
    z = torch.randn(1, 9, 9, config.c_z)
    mask = torch.ones(1, 9, 9, dtype=torch.bool)
    with torch.no_grad():
        flipped = attention(z, mask) - z
        expected = theirs.pair_stack.tri_att_end(z.transpose(1, 2), transpose_bias=True).transpose(1, 2)
    assert (flipped - expected).norm() / expected.norm() > 0.05
