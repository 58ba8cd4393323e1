"""Predictions are written without clashes, with bonds, angles and places of residues nearly as they were."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pairformer_fast.inference.structures import read_structure
from pairformer_fast.model.all_atom import AllAtom
from pairformer_fast.model.clashes import CHIS, _SideChains, relieve_clashes
from pairformer_fast.model.residue import ATOM14, RESTYPES
from pairformer_fast.training.geometry import measure_geometry
from pairformer_fast.training.idealize import as_written
from pairformer_fast.training.shards import Structure

from .structures import structure

GOLDEN = "data/golden/caplacizumab.cif"


@pytest.fixture(scope="module")
def crowded(repository: Path) -> Structure:
    """A folded domain whose side chains were turned by half a radian or so."""
    torch.manual_seed(2)
    residues = [residue for chain in read_structure(repository / GOLDEN).values() for residue in chain]
    aatype = np.array([RESTYPES.index(residue.letter) for residue in residues])
    made = structure("golden", ["".join(residue.letter for residue in residues)], all_atoms=True)
    atom14 = np.zeros_like(made.atom14)
    for i, residue in enumerate(residues):
        for j, name in enumerate(ATOM14[residue.letter]):
            atom14[i, j] = residue.atoms[name]
    types = torch.from_numpy(aatype).long()[None]
    mask = torch.from_numpy(made.atom14_mask)[None]
    turned = _SideChains(types, mask).turned(torch.from_numpy(atom14)[None], 0.5 * torch.randn(*types.shape, CHIS))
    return replace(made, atom14=turned[0].numpy() * made.atom14_mask[..., None])


def lengths(made: Structure) -> np.ndarray:
    """Distances of all pairs of atoms of a residue up to CB, but for O."""
    kept = made.atom14[:, [0, 1, 2, 4]] * made.atom14_mask[:, [4], None]
    return np.linalg.norm(kept[:, :, None] - kept[:, None], axis=-1)


def test_clashes_go_and_geometry_stays(crowded) -> None:
    before = measure_geometry(crowded)
    (written,) = as_written([crowded])
    after = measure_geometry(written)
    assert before.clashes > 30
    assert after.clashes < 0.1 * before.clashes
    assert after.inverted == before.inverted
    assert after.bond_rms == pytest.approx(before.bond_rms, abs=0.01)
    np.testing.assert_allclose(lengths(written), lengths(crowded), atol=1e-3)
    assert np.linalg.norm(written.atom14[:, 1] - crowded.atom14[:, 1], axis=-1).mean() < 0.3


def test_prolines_ring_moves_with_its_residue(crowded) -> None:
    (written,) = as_written([crowded])
    prolines = crowded.aatype == RESTYPES.index("P")
    rings = [one.atom14[prolines][:, [0, 1, 4, 5, 6]] for one in (crowded, written)]
    before, after = (np.linalg.norm(ring[:, :, None] - ring[:, None], axis=-1) for ring in rings)
    np.testing.assert_allclose(after, before, atol=1e-3)


def test_turns_are_those_of_the_torsions() -> None:
    aatype = torch.arange(len(RESTYPES))[None]
    made = structure("helix", [RESTYPES], all_atoms=True)
    atom14, mask = torch.from_numpy(made.atom14)[None], torch.from_numpy(made.atom14_mask)[None]
    turns = torch.linspace(-1, 1, aatype.numel() * CHIS).view(1, -1, CHIS)
    turned = _SideChains(aatype, mask).turned(atom14, turns)
    (before, known), (after, _) = (AllAtom().torsions(x, mask, aatype) for x in (atom14, turned))
    known[:, RESTYPES.index("P")] = False
    angle = [torch.atan2(*x[:, :, 1:].unbind(-1)) for x in (before, after)]
    change = torch.remainder(angle[1] - angle[0] - turns + torch.pi, 2 * torch.pi) - torch.pi
    assert known[:, :, 1:].sum() > 30
    assert change[known[:, :, 1:]].abs().max() < 1e-3
    backbone = turned[:, :, :4] - atom14[:, :, :4]
    assert backbone.abs().max() == 0


def test_side_chains_of_neighbours_are_kept_apart_but_not_their_bonds() -> None:
    """A tryptophan that is turned into the residue after it."""
    made = structure("helix", ["GGWGG"], all_atoms=True)
    atom14, aatype = torch.from_numpy(made.atom14)[None], torch.from_numpy(made.aatype).long()[None]
    chain, mask = torch.from_numpy(made.chain_index).long()[None], torch.from_numpy(made.atom14_mask)[None]

    def nearest(atoms: torch.Tensor) -> float:
        return float(torch.cdist(atoms[0, 2, 5 : len(ATOM14["W"])], atoms[0, 3, :4]).min())

    turns = torch.zeros(1, 5, CHIS)
    tried = []
    for turn in torch.linspace(-3, 3, 25):
        turns[0, 2, 0] = turn
        tried.append(_SideChains(aatype, mask).turned(atom14, turns))
    worst = min(tried, key=nearest)
    assert nearest(worst) < 2.6
    assert nearest(relieve_clashes(worst, mask, chain, aatype)) > 2.7


def test_padding_changes_nothing_and_inference_mode_is_no_obstacle(crowded) -> None:
    atom14, aatype = torch.from_numpy(crowded.atom14)[None], torch.from_numpy(crowded.aatype).long()[None]
    chain, mask = torch.from_numpy(crowded.chain_index).long()[None], torch.from_numpy(crowded.atom14_mask)[None]
    with torch.inference_mode():
        alone = relieve_clashes(atom14, mask, chain, aatype)
        pad = torch.nn.functional.pad
        tokens = pad(chain, (0, 3), value=-1), pad(aatype, (0, 3))
        padded = relieve_clashes(pad(atom14, (0, 0, 0, 0, 0, 3)), pad(mask, (0, 0, 0, 3), value=True), *tokens)
    torch.testing.assert_close(padded[:, :-3], alone, rtol=0, atol=0.05)


def test_a_disulfide_bond_is_closed_and_no_clash(crowded) -> None:
    """SG of a cysteine lies nearer to the partner's SG and CB than their spheres would let it."""
    aatype, mask = torch.from_numpy(crowded.aatype).long()[None], torch.from_numpy(crowded.atom14_mask)[None]
    atom14, chain = torch.from_numpy(crowded.atom14)[None], torch.from_numpy(crowded.chain_index).long()[None]
    first, second = np.flatnonzero(crowded.aatype == RESTYPES.index("C"))[:2]
    cb, sg = ATOM14["C"].index("CB"), ATOM14["C"].index("SG")
    turns = torch.zeros(*aatype.shape, CHIS)
    side_chains, angles = _SideChains(aatype, mask), torch.linspace(-3.1, 3.1, 32)
    tried = []
    for a, b in torch.cartesian_prod(angles, angles):
        turns[0, first, 0], turns[0, second, 0] = a, b
        tried.append(side_chains.turned(atom14, turns))
    near = min(tried, key=lambda x: abs(float((x[0, first, sg] - x[0, second, sg]).norm()) - 1.7))
    after = relieve_clashes(near, mask, chain, aatype)[0]
    assert float((near[0, first, sg] - near[0, second, sg]).norm()) < 1.9
    assert float((after[first, sg] - after[second, sg]).norm()) == pytest.approx(2.03, abs=0.03)
    for one, other in ((first, second), (second, first)):
        assert float((after[one, cb] - after[other, sg]).norm()) == pytest.approx(3.03, abs=0.06)


def test_atoms_that_are_missing_neither_turn_others_nor_are_avoided(crowded) -> None:
    """Without its CG a lysine has no bond to turn about but CA-CB, wherever that CG is said to be."""
    lysine = int(np.flatnonzero(crowded.aatype == RESTYPES.index("K"))[0])
    mask = crowded.atom14_mask.copy()
    mask[lysine, 5] = False
    places = []
    for place in (crowded.atom14[lysine, 5], crowded.atom14[:, 1].mean(axis=0)):
        atom14 = crowded.atom14.copy()
        atom14[lysine, 5] = place
        (written,) = as_written([replace(crowded, atom14=atom14, atom14_mask=mask)])
        places.append(written.atom14)
    np.testing.assert_allclose(places[0], places[1], atol=0.05)


@pytest.mark.parametrize("chains", [["K"], ["X"], ["GXKXW"], ["K", "W"]], ids="+".join)
def test_single_and_unknown_residues_stay_near_their_places(chains: list[str]) -> None:
    made = structure("short", [chain.replace("X", "G") for chain in chains], all_atoms=True)
    letters = "".join(chains)
    aatype = torch.tensor([[(RESTYPES + "X").index(letter) for letter in letters]])
    atom14, mask = torch.from_numpy(made.atom14)[None], torch.from_numpy(made.atom14_mask)[None]
    after = relieve_clashes(atom14, mask, torch.from_numpy(made.chain_index).long()[None], aatype)
    assert after.isfinite().all()
    assert (after - atom14)[:, :, :3].norm(dim=-1).max() < 0.6
