"""Blocks and models of OpenFold for AlphaFold 2 with random weights, inputs, and what is compared."""

import inspect

import torch
from openfold.config import model_config
from openfold.data.data_transforms import make_atom14_masks
from openfold.model.evoformer import EvoformerBlock
from openfold.model.model import AlphaFold
from torch import nn

from pairformer_fast import AttentionConfig
from tests.integrations.comparison import distance

C_M, C_Z, SEQUENCES = 24, 16, 5
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
UPDATES = ("msa_transition", "tri_mul_out", "tri_mul_in", "pair_transition")
# A constant added to all logits of a query: softmax ignores it, so these gradients are zero but for rounding.
NO_GRADIENT = ("msa_att_row.layer_norm_z.bias", "ipa.linear_b.bias")


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


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if name.endswith(NO_GRADIENT):
            weight = expected[name.removesuffix("bias") + "weight"]
            assert found[name].norm() < 1e-3 * weight.norm(), name
        else:
            assert gradient.norm() > 0, f"{name}: the comparison would be empty"
            assert distance(found[name], gradient) < 1e-4, name


def small_model(train: bool = True, **settings) -> nn.Module:
    """All of AlphaFold 2, with templates and extra MSA, of usual widths but with few blocks."""
    config = model_config("model_1", train=train)
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
