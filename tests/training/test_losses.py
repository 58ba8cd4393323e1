"""Loss terms against closed forms, other libraries and the symmetries that they promise."""

import math
from dataclasses import replace

import biotite.structure as struc
import numpy as np
import pytest
import torch
from torch import Tensor

from pairformer_fast.features import TokenFeatures
from pairformer_fast.model.all_atom import NUM_TORSIONS, AllAtom
from pairformer_fast.model.folding import ModelOutput
from pairformer_fast.model.residue import ATOM14, RESTYPES
from pairformer_fast.model.rigid import Rigid
from pairformer_fast.model.structure_module import Structure
from pairformer_fast.training.dataset import Batch
from pairformer_fast.training.losses import (
    FAPE_CLAMP,
    FAPE_SCALE,
    WEIGHTS,
    Weight,
    clash_loss,
    compute_losses,
    fape,
    lddt_ca,
    masked_mean,
    peptide_loss,
    rmsd_ca,
    term_weights,
    torsion_loss,
    virtual_cb,
)

from .structures import helix

ALL_ATOM = AllAtom()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def backbone(sequence: str, copies: int = 1) -> tuple[Tensor, Tensor]:
    """All atoms ``[1, N, 14, 3]`` of helices 60 Å apart with random side chains, and the mask of atoms that exist."""
    features = TokenFeatures.from_chains([sequence] * copies)
    chains = [torch.from_numpy(helix(len(sequence))) + torch.tensor([60.0 * i, 0, 0]) for i in range(copies)]
    n, ca, c, _ = torch.cat(chains)[None].unbind(2)
    atom14 = ALL_ATOM(Rigid.from_backbone(n, ca, c), random_torsions(features), features.aatype)
    atom14[:, :, :4] = torch.cat(chains)[None]
    return atom14, ALL_ATOM.atom14_mask[features.aatype]


def random_torsions(features: TokenFeatures) -> Tensor:
    angle = torch.rand(*features.aatype.shape, NUM_TORSIONS) * 2 * math.pi
    return torch.stack([angle.sin(), angle.cos()], dim=-1)


def frames_of(atom14: Tensor) -> Rigid:
    return Rigid.from_backbone(*(atom14[:, :, i] for i in range(3)))


def motion() -> Rigid:
    """A rotation and translation for ``[1, 1]`` leading axes."""
    rot, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    rot[:, 0] *= torch.linalg.det(rot)
    return Rigid(rot.float()[None, None], torch.tensor([[[5.0, -7.0, 11.0]]]))


def moved(atom14: Tensor, by: Rigid) -> Tensor:
    return by.apply(atom14.flatten(1, 2)).view_as(atom14)


def batch_of(sequence: str, atom14: Tensor, mask: Tensor) -> Batch:
    features = TokenFeatures.from_chains([sequence])
    return Batch(features, atom14, mask, torch.zeros_like(features.aatype), torch.ones(1))


def output_of(atom14: Tensor, aatype: Tensor, logits: Tensor | None = None) -> ModelOutput:
    """What a model that predicts exactly these atoms returns; ``logits`` decide its heads."""
    tokens = atom14.shape[1]
    torsions, _ = ALL_ATOM.torsions(atom14, ALL_ATOM.atom14_mask[aatype], aatype)
    logits = torch.randn(1, tokens, tokens, 64) if logits is None else logits
    structure = Structure([frames_of(atom14)], [torsions], atom14, torch.zeros(1, tokens, 1))
    return ModelOutput(structure, logits, logits[:, 0, :, :50], logits)


def test_see_is_invert_apply_of_every_point_in_every_frame() -> None:
    frames = frames_of(torch.randn(2, 5, 14, 3) * 20)
    points = torch.randn(2, 9, 3) * 20
    want = torch.stack(
        [Rigid(frames.rot[:, i, None], frames.trans[:, i, None]).invert_apply(points) for i in range(5)], dim=1
    )
    torch.testing.assert_close(frames.see(points), want, atol=1e-4, rtol=0)


def test_fape_ignores_rigid_motion() -> None:
    target, _ = backbone("ACDEFGHIKL")
    prediction = target + 0.5 * torch.randn_like(target)
    mask = torch.ones(1, 10, dtype=torch.bool)

    def error(x: Tensor) -> float:
        return fape(frames_of(x), frames_of(target), mask, x[:, :, 1], target[:, :, 1], mask).item()

    assert error(moved(target, motion())) < 2e-5
    assert error(prediction) > 0.02
    assert error(moved(prediction, motion())) == pytest.approx(error(prediction), rel=1e-4)


@pytest.mark.parametrize("shift", [3.0, 100.0])
def test_fape_of_one_displaced_point(shift: float) -> None:
    target, _ = backbone("ACDEFGHIKL")
    ca, mask = target[:, :, 1], torch.ones(1, 10, dtype=torch.bool)
    x = ca.clone()
    x[0, 4] += torch.tensor([0.0, shift, 0.0])
    frames = frames_of(target)
    # one of ten points is off by the shift in every frame
    want = min(shift, FAPE_CLAMP) / FAPE_SCALE / 10
    assert fape(frames, frames, mask, x, ca, mask).item() == pytest.approx(want, abs=2e-5)
    without = mask.clone()
    without[0, 4] = False
    assert fape(frames, frames, mask, x, ca, without).item() < 2e-5


def test_fape_tells_a_mirror_image() -> None:
    target, _ = backbone("ACDEFGHIKL")
    mirror = target * torch.tensor([1.0, 1.0, -1.0])
    mask = torch.ones(1, 10, dtype=torch.bool)
    assert fape(frames_of(mirror), frames_of(target), mask, mirror[:, :, 1], target[:, :, 1], mask) > 0.2


def test_rmsd_is_that_of_biotite_after_superposition() -> None:
    """With points that are masked, and where superposition is a half turn, which needs more than small rotations."""
    target = torch.randn(3, 40, 3) * torch.tensor([12.0, 8.0, 5.0])
    x = target + torch.tensor([0.01, 1.0, 5.0])[:, None, None] * torch.randn_like(target)
    x = x * torch.tensor([-1.0, -1.0, 1.0]) + torch.tensor([30.0, -40.0, 50.0])
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[1, 5:20] = False
    x[1, 5:20] += 1000
    found = rmsd_ca(x, target, mask)
    for row, fixed, mobile, known in zip(found, target.numpy(), x.numpy(), mask.numpy(), strict=True):
        fitted, _ = struc.superimpose(fixed[known], mobile[known])
        assert float(row) == pytest.approx(float(struc.rmsd(fixed[known], fitted)), rel=1e-3, abs=1e-4)


def test_gradient_of_rmsd_is_that_of_the_least_rmsd() -> None:
    """The rotation has no gradient: it is the best one, where its own does nothing."""
    target = torch.randn(1, 12, 3, dtype=torch.float64) * torch.tensor([9.0, 6.0, 4.0])
    x = (target + torch.randn_like(target)).requires_grad_()
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[0, 3] = False
    assert torch.autograd.gradcheck(lambda points: rmsd_ca(points, target, mask), [x])


def test_rmsd_tells_a_mirror_image() -> None:
    target = torch.randn(1, 30, 3) * 10
    mirror = target * torch.tensor([1.0, 1.0, -1.0])
    assert rmsd_ca(mirror, target, torch.ones(1, 30, dtype=torch.bool)) > 5


def test_losses_are_computed_in_full_precision_under_autocast() -> None:
    """Coordinates in bf16 are off by up to an eighth of an Å at 16 Å and more: as much as good predictions are."""
    sequence = "ACDEFGHIKLMNPQRSTVWY"
    atom14, mask = backbone(sequence)
    prediction = atom14 + 0.1 * torch.randn_like(atom14)
    batch = batch_of(sequence, atom14, mask)
    output = output_of(prediction, batch.features.aatype)
    want = compute_losses(output, batch, ALL_ATOM, term_weights(1.0))
    with torch.autocast("cpu", torch.bfloat16):
        found = compute_losses(output, batch, ALL_ATOM, term_weights(1.0))
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def test_lddt_is_that_of_biotite() -> None:
    target, _ = backbone("ACDEFGHIKLMNPQRSTVWY" * 2)
    ca = target[:, :, 1]
    x = ca + torch.randn_like(ca) * (torch.arange(40) >= 20)[:, None]
    reference, subject = struc.AtomArray(40), struc.AtomArray(40)
    for atoms, coord in ((reference, ca), (subject, x)):
        atoms.coord = coord[0].numpy()
        atoms.res_id = np.arange(40)
        atoms.chain_id[:] = "A"
    want = struc.lddt(reference, subject, aggregation="residue")
    got = lddt_ca(x, ca, torch.ones(1, 40, dtype=torch.bool))[0].numpy()
    assert got.min() < 0.6 < 0.9 < got.max()
    np.testing.assert_allclose(got, want, atol=1e-3)

    known = torch.arange(40)[None] % 3 > 0
    want = struc.lddt(reference[known[0].numpy()], subject[known[0].numpy()], aggregation="residue")
    np.testing.assert_allclose(lddt_ca(x, ca, known)[known].numpy(), want, atol=1e-3)


@pytest.mark.parametrize("aa", "DEFY")
def test_a_flip_of_symmetric_atoms_costs_nothing(aa: str) -> None:
    sequence = f"AK{aa}LS"
    atom14, mask = backbone(sequence)
    batch = batch_of(sequence, atom14, mask)
    swap = ALL_ATOM.symmetric_swap[batch.features.aatype]
    flipped = atom14.gather(2, swap[..., None].expand_as(atom14))
    assert (flipped - atom14).abs().max() > 1
    logits = torch.randn(1, 5, 5, 64)
    as_named, renamed = (
        compute_losses(output_of(x, batch.features.aatype, logits), batch, ALL_ATOM, term_weights(1.0))
        for x in (atom14, flipped)
    )
    assert renamed["fape_atoms"] < 2e-5
    assert renamed["torsion"] < 1e-3
    for name, value in as_named.items():
        torch.testing.assert_close(renamed[name], value, atol=1e-3, rtol=0, msg=name)


def test_atoms_that_are_not_symmetric_are_not_renamed() -> None:
    sequence = "AKNLS"
    atom14, mask = backbone(sequence)
    flipped = atom14.clone()
    od1, nd2 = ATOM14["N"].index("OD1"), ATOM14["N"].index("ND2")
    flipped[:, 2, [od1, nd2]] = atom14[:, 2, [nd2, od1]]
    batch = batch_of(sequence, atom14, mask)
    losses = compute_losses(output_of(flipped, batch.features.aatype), batch, ALL_ATOM, term_weights(1.0))
    assert losses["fape_atoms"] > 0.005
    assert losses["torsion"] > 0.1


@pytest.mark.parametrize(("aa", "chi", "free"), [("F", 1, True), ("E", 2, True), ("F", 0, False), ("N", 1, False)])
def test_a_half_turn_is_free_where_it_only_renames_atoms(aa: str, chi: int, free: bool) -> None:
    sequence = f"A{aa}A"
    target, mask = backbone(sequence)
    aatype = TokenFeatures.from_chains([sequence]).aatype
    wanted, known = ALL_ATOM.torsions(target, mask, aatype)
    turned = wanted.clone()
    turned[0, 1, chi + 1] *= -1
    loss = torsion_loss([3 * turned], target, mask, aatype, ALL_ATOM).item()
    # 0.02 x deviation of the length 3 from 1; a half turn is a chord of 2, squared 4, on one of all known torsions
    assert loss == pytest.approx(0.04 + (0 if free else 4 / known.sum().item()), abs=1e-4)


def test_virtual_cb_is_where_the_ideal_residue_has_it() -> None:
    sequence = RESTYPES.replace("G", "")
    features = TokenFeatures.from_chains([sequence])
    place = Rigid(motion().rot.expand(1, len(sequence), 3, 3), torch.randn(1, len(sequence), 3) * 10)
    atom14 = ALL_ATOM(place, random_torsions(features), features.aatype)
    away = (virtual_cb(atom14) - atom14[:, :, 4])[0].norm(dim=-1)
    proline = torch.tensor([aa == "P" for aa in sequence])
    assert away[~proline].max() < 0.1
    assert away[proline] < 0.2  # the ring pulls its CB aside


def test_peptide_loss_of_an_ideal_chain_is_nearly_zero() -> None:
    atom14, _ = backbone("ACDEFGHI", copies=2)
    features = TokenFeatures.from_chains(["ACDEFGHI"] * 2)
    # the angles of the helix and those of the loss differ by 0.3 degrees at most
    assert peptide_loss(atom14, features) < 0.01
    stretched = atom14.clone()
    c, n = atom14[0, 2, 2], atom14[0, 3, 0]
    stretched[0, 3:8] += (n - c) / (n - c).norm()
    # one bond of 14 is 1 Å too long; the residues move along the bond, so CA-C-N and C-N-CA keep their angles
    added = peptide_loss(stretched, features) - peptide_loss(atom14, features)
    assert added.item() == pytest.approx(1 / 14, abs=1e-3)


def test_peptide_loss_sees_no_bond_between_chains_across_gaps_or_in_padding() -> None:
    atom14, _ = backbone("ACDEFGHI")
    features = TokenFeatures.from_chains(["ACDEFGHI"])
    broken = atom14.clone()
    broken[0, 4:] += 20
    assert peptide_loss(broken, features) > 1
    later = torch.arange(8)[None] >= 4
    for apart in (
        replace(features, chain_index=later.long()),
        replace(features, residue_index=features.residue_index + 3 * later),
        replace(features, mask=~later),
    ):
        assert peptide_loss(broken, apart) < 0.01


def spread(sequence: str) -> tuple[torch.Tensor, TokenFeatures]:
    """Residues with ideal geometry 30 Å from one another."""
    features = TokenFeatures.from_chains([sequence])
    trans = 30 * torch.arange(len(sequence))[None, :, None] * torch.tensor([1.0, 0, 0])
    place = Rigid(torch.eye(3).expand(1, len(sequence), 3, 3), trans)
    return ALL_ATOM(place, random_torsions(features), features.aatype), features


def test_clash_loss_is_the_overlap_of_spheres_of_residues_that_are_not_bonded() -> None:
    atom14, features = spread("GAAAG")
    assert clash_loss(atom14, features) == 0
    near = atom14.clone()
    near[0, 4] += near[0, 0, 3] - near[0, 4, 3] + torch.tensor([0, 0, 2.0])  # O of the last 2 Å from O of the first
    near[0, 4, :3] += 100
    near[0, 0, :3] -= 100
    near.requires_grad_()
    loss = clash_loss(near, features)
    # seen from both sides, over five residues
    assert loss.item() == pytest.approx(2 * (2 * 1.52 - 0.4 - 2.0) / 5, abs=1e-4)
    (gradient,) = torch.autograd.grad(loss, near)
    assert gradient[0, 4, 3, 2] < 0 < gradient[0, 0, 3, 2]
    assert gradient[0, 1:4].abs().max() == 0
    bonded = replace(features, residue_index=torch.tensor([[0, 5, 9, 13, 1]]))
    assert clash_loss(near, bonded) == 0
    assert clash_loss(near, replace(bonded, chain_index=torch.tensor([[0, 0, 0, 0, 1]]))) > 0
    assert clash_loss(near, replace(features, mask=torch.tensor([[True] * 4 + [False]]))) == 0


def test_clash_loss_lets_two_sulphur_atoms_bond() -> None:
    atom14, features = spread("CAAAC")
    near = atom14.clone()
    near[0, 4] += near[0, 0, 5] - near[0, 4, 5] + torch.tensor([0, 0, 2.05])
    near[0, 4, :5] += 100
    near[0, 0, :5] -= 100
    assert clash_loss(near, features) == 0


def test_what_is_masked_does_not_matter() -> None:
    sequence = "ACDEFGHIKLMNPQRSTVWY"
    target, mask = backbone(sequence)
    mask = mask.clone()
    mask[0, 3] = False
    mask[0, 7, 5:] = False
    target = target * mask[..., None]
    prediction = target + 0.3 * torch.randn_like(target)
    batch = batch_of(sequence, target, mask)
    output = output_of(prediction, batch.features.aatype)
    want = compute_losses(output, batch, ALL_ATOM, term_weights(1.0))
    assert all(value.isfinite() for value in want.values())

    garbage = torch.where(mask[..., None], target, 50 * torch.randn_like(target))
    got = compute_losses(output, replace(batch, atom14=garbage), ALL_ATOM, term_weights(1.0))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name)


def test_padding_does_not_matter() -> None:
    sequence = "ACDEFGHIKL"
    target, mask = backbone(sequence)
    whole = batch_of(sequence, target, mask)
    logits = torch.randn(1, 10, 10, 64)
    prediction = target + 0.3 * torch.randn_like(target)
    cut = TokenFeatures(**{name: value[:, :7] for name, value in vars(whole.features).items()})
    short = Batch(cut, target[:, :7], mask[:, :7], whole.cdr[:, :7], whole.weight)
    real = torch.arange(10)[None] < 7
    padded = Batch(
        features=replace(whole.features, aatype=whole.features.aatype.where(real, 20), mask=real),
        atom14=target * real[..., None, None],
        atom14_mask=mask & real[..., None],
        cdr=whole.cdr,
        weight=whole.weight,
    )
    want = compute_losses(
        output_of(prediction[:, :7], cut.aatype, logits[:, :7, :7]), short, ALL_ATOM, term_weights(1.0)
    )
    output = output_of(prediction, whole.features.aatype, logits)
    got = compute_losses(output, padded, ALL_ATOM, term_weights(1.0))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_structures_count_by_their_weight() -> None:
    one, two = (batch_of("ACDEF", *backbone("ACDEF")) for _ in range(2))
    logits = torch.randn(1, 5, 5, 64)
    predictions = [item.atom14 + sigma * torch.randn_like(item.atom14) for item, sigma in ((one, 0.1), (two, 2.0))]
    parts = [output_of(x, one.features.aatype, logits) for x in predictions]
    separate = [compute_losses(p, b, ALL_ATOM, term_weights(0.0)) for p, b in zip(parts, (one, two), strict=True)]
    features = TokenFeatures(**{name: torch.cat([value] * 2) for name, value in vars(one.features).items()})
    both = Batch(
        features, torch.cat([one.atom14, two.atom14]), torch.cat([one.atom14_mask] * 2), torch.cat([one.cdr] * 2),
        torch.tensor([0.9, 0.3]),
    )  # fmt: skip
    losses = compute_losses(
        output_of(torch.cat(predictions), features.aatype, torch.cat([logits] * 2)), both, ALL_ATOM, term_weights(0.0)
    )
    for name, value in losses.items():
        torch.testing.assert_close(value, 0.75 * separate[0][name] + 0.25 * separate[1][name], msg=name)


def test_total_is_the_weighted_sum_and_differentiable() -> None:
    atom14, mask = backbone("ACDEFGHIKL")
    batch = batch_of("ACDEFGHIKL", atom14, mask)
    prediction = (atom14 + 0.3 * torch.randn_like(atom14)).requires_grad_()
    losses = compute_losses(output_of(prediction, batch.features.aatype), batch, ALL_ATOM, term_weights(0.7))
    want = sum(weight.at(0.7) * losses[name] for name, weight in WEIGHTS.items())
    torch.testing.assert_close(losses["total"], want)
    losses["total"].backward()
    assert prediction.grad.isfinite().all()
    assert prediction.grad.any()


def test_a_perfect_prediction_has_finite_gradients() -> None:
    atom14, mask = backbone("ACDEFGHIKL")
    batch = batch_of("ACDEFGHIKL", atom14, mask)
    prediction = atom14.clone().requires_grad_()
    losses = compute_losses(output_of(prediction, batch.features.aatype), batch, ALL_ATOM, term_weights(1.0))
    assert losses["fape_backbone"] < 2e-5
    assert losses["lddt_ca"] == 1
    losses["total"].backward()
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize(
    ("progress", "value"), [(0.0, 2.0), (0.2, 2.0), (0.3, 1.5), (0.4, 1.0), (0.599, 0.005), (0.6, 0.0), (1.0, 0.0)]
)
def test_weight_moves_linearly_between_its_two_times(progress: float, value: float) -> None:
    assert Weight(2.0, 0.0, 0.2, 0.6).at(progress) == pytest.approx(value)


def test_constant_weight() -> None:
    assert {Weight(0.5, 0.5).at(progress) for progress in (0.0, 0.5, 1.0)} == {0.5}


def test_masked_mean_of_nothing_is_zero() -> None:
    x, mask = torch.tensor([[1.0, 3.0, 8.0], [1.0, 1.0, 1.0]]), torch.tensor([[True, True, False], [False] * 3])
    assert masked_mean(x, mask).tolist() == [2.0, 0.0]
