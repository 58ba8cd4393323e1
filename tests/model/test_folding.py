"""The folding model: invariances, padding, recycling, checkpoints."""

import pytest
import torch

from pairformer_fast.config import ModelConfig, PairformerConfig, StructureModuleConfig
from pairformer_fast.features import TokenFeatures
from pairformer_fast.model.checkpoint import CheckpointError, checkpoint_metadata, load_checkpoint, save_checkpoint
from pairformer_fast.model.folding import FoldingModel
from pairformer_fast.model.invariant_point_attention import InvariantPointAttention
from pairformer_fast.model.primitives import SharedDropout
from pairformer_fast.model.rigid import Rigid

SMALL = ModelConfig(
    pairformer=PairformerConfig(
        c_s=32, c_z=16, c_hidden_mul=16, c_hidden_pair_att=8, no_heads_pair=2, c_hidden_pair_bias=4,
        no_heads_pair_bias=4, transition_n=2, no_blocks=2,
    ),
    structure=StructureModuleConfig(c_s=32, c_hidden_ipa=8, no_heads_ipa=4, no_blocks=3, c_angle=16),
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = FoldingModel(SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pad(features: TokenFeatures, by: int) -> TokenFeatures:
    def extend(x, value):
        return torch.nn.functional.pad(x, (0, by), value=value)

    return TokenFeatures(
        extend(features.aatype, 20), extend(features.residue_index, 0), extend(features.chain_index, 0),
        extend(features.mask, False),
    )  # fmt: skip


@torch.no_grad()
def test_padding_does_not_change_a_prediction(model):
    features = TokenFeatures.from_chains(["ACDEFGHIK", "LMNPQRST"])
    alone, padded = model(features), model(pad(features, 5))
    for name in ("atom14", "plddt"):
        assert torch.allclose(getattr(alone, name), getattr(padded, name)[:, :17], atol=1e-4), name
    assert torch.allclose(alone.pae, padded.pae[:, :17, :17], atol=1e-4)
    assert not padded.atom14_mask[:, 17:].any()


@torch.no_grad()
def test_prediction_has_the_heavy_atoms_and_ranges_of_its_docstring(model):
    prediction = model(TokenFeatures.from_chains(["GAWY"]))
    assert prediction.atom14_mask.sum(-1).tolist() == [[4, 5, 14, 12]]
    assert prediction.atom14.isfinite().all()
    assert (prediction.plddt >= 0).all()
    assert (prediction.plddt <= 100).all()
    assert (prediction.pae >= 0).all()
    assert (prediction.pae <= 32).all()


@torch.no_grad()
def test_recycles_and_chain_break_matter(model):
    one, two = TokenFeatures.from_chains(["ACDEFGHI"]), TokenFeatures.from_chains(["ACDE", "FGHI"])
    assert not torch.allclose(model(one, recycles=0).atom14, model(one, recycles=2).atom14, atol=1e-3)
    assert not torch.allclose(model(one).atom14, model(two).atom14, atol=1e-3)


@torch.no_grad()
def test_point_attention_is_invariant_under_rigid_motion():
    torch.manual_seed(0)
    attention = InvariantPointAttention(SMALL.structure, 16)
    torch.nn.init.normal_(attention.linear_out.weight)
    s, z, mask = torch.randn(1, 7, 32), torch.randn(1, 7, 7, 16), torch.ones(1, 7, dtype=torch.bool)
    frames = Rigid.from_axes(*torch.randn(3, 1, 7, 3))
    motion = Rigid.from_axes(3 * torch.randn(1, 1, 3), *torch.randn(2, 1, 1, 3))
    assert torch.allclose(attention(s, z, frames, mask), attention(s, z, motion.compose(frames), mask), atol=1e-4)


def test_every_parameter_gets_a_gradient(model):
    features = TokenFeatures.from_chains(["ACDEFGHIKLMNPQRSTVWY"])
    output = model.run(features, recycles=1)
    structure = output.structure
    total = structure.atom14.square().mean() + sum(x.sin().mean() for x in (output.plddt, output.pae, output.distogram))
    (total + sum(t.sin().mean() for t in structure.torsions)).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []


@pytest.mark.parametrize("shared_dim", [-3, -2])
def test_dropout_shares_its_mask_along_one_axis_and_keeps_the_mean(shared_dim):
    torch.manual_seed(0)
    z = torch.ones(1, 40, 50, 64)
    dropped = SharedDropout(0.25, shared_dim).train()(z)
    assert dropped.shape[shared_dim] == 1
    assert (z * dropped).shape == z.shape
    assert SharedDropout(0.25, shared_dim).eval()(z) is None
    assert float(dropped.mean()) == pytest.approx(1, abs=0.05)
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]


@torch.no_grad()
def test_residue_dropout_hides_types_in_training_only(model):
    """Hidden residues enter the trunk alike whatever they are; the structure is still built of the true ones."""
    features, others = (TokenFeatures.from_chains([sequence]) for sequence in ("ACDEFGHIK", "WWWWWWWWW"))
    embedder = FoldingModel(SMALL.model_copy(update={"residue_dropout": 0.999999})).embedder
    with torch.no_grad():
        hidden, same = (embedder.train()(each) for each in (features, others))
        shown, different = (embedder.eval()(each) for each in (features, others))
    torch.testing.assert_close(hidden, same, rtol=0, atol=0)
    assert not torch.equal(shown[0], different[0])
    assert not torch.equal(shown[1], hidden[1])


def test_checkpoint_round_trip(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path, {"step": 7})
    loaded = load_checkpoint(path)
    assert loaded.config == SMALL
    assert checkpoint_metadata(path) == {"step": 7}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].bfloat16().float()), name


def test_broken_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(CheckpointError, match=r"text\.safetensors"):
        load_checkpoint(tmp_path / "text.safetensors")
