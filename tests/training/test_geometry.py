"""A flaw that is put into a sound structure shows in the measure that is meant for it, and in no other."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pairformer_fast.model.all_atom import NUM_TORSIONS, AllAtom
from pairformer_fast.model.residue import ATOM14, RESTYPES
from pairformer_fast.model.rigid import Rigid
from pairformer_fast.training.geometry import count_clashes, ideal_residue, measure_geometry
from pairformer_fast.training.shards import Structure

from .structures import helix

SEQUENCE = "ACDEFGHIKLMNQRSTVWY"
"""Without proline, whose ring closes only at some torsions."""


def atom(name: str, aa: str) -> int:
    return ATOM14[aa].index(name)


@pytest.fixture
def sound() -> Structure:
    """A helix of residue types with the package's own ideal side chains, all of them turned outwards."""
    backbone = torch.from_numpy(helix(len(SEQUENCE)))
    aatype = np.array([RESTYPES.index(aa) for aa in SEQUENCE])
    all_atom = AllAtom()
    frames = Rigid.from_backbone(backbone[None, :, 0], backbone[None, :, 1], backbone[None, :, 2])
    torsions = torch.tensor([0.0, -1.0]).expand(1, len(SEQUENCE), NUM_TORSIONS, 2)
    atom14 = all_atom(frames, torsions, torch.from_numpy(aatype)[None])[0].numpy().copy()
    atom14[:, :4] = backbone.numpy()
    return made(atom14, aatype)


def made(atom14: np.ndarray, aatype: np.ndarray) -> Structure:
    count = len(aatype)
    mask = np.array([[slot < len(ATOM14[RESTYPES[aa]]) for slot in range(14)] for aa in aatype])
    chain, zeros = np.zeros(count, dtype=np.int8), np.zeros(count, dtype=np.int8)
    return Structure("made", "made", aatype, chain, np.arange(count), zeros, atom14 * mask[..., None], mask)


def moved(structure: Structure, rows: slice | int, slots: slice | int, shift: list[float]) -> Structure:
    atom14 = structure.atom14.copy()
    atom14[rows, slots] += np.array(shift, dtype=np.float32)
    return replace(structure, atom14=atom14)


def test_every_bond_and_angle_of_a_residue_has_an_ideal_value() -> None:
    expected = {"N-CA": 1.459, "CA-C": 1.525, "C-O": 1.230, "CG-CD1": 1.388, "CE2-CZ": 1.382}  # Engh and Huber
    ideal = ideal_residue("F")
    lengths = {
        "-".join(ATOM14["F"][i] for i in bond): length for bond, length in zip(ideal.bonds, ideal.lengths, strict=True)
    }
    assert {name: lengths[name] for name in expected} == pytest.approx(expected, abs=0.01)
    for aa, names in ATOM14.items():
        rings = {"F": 1, "Y": 1, "H": 1, "P": 1, "W": 2}.get(aa, 0)
        assert len(ideal_residue(aa).bonds) == len(names) - 1 + rings
        assert set(ideal_residue(aa).angles.ravel()) == set(range(len(names)))
        assert (np.abs(ideal_residue(aa).values - 115) < 22).all()


def test_ideal_side_chains_on_an_ideal_backbone_are_near_ideal(sound: Structure) -> None:
    geometry = measure_geometry(sound)
    assert geometry.bond_rms < 0.02
    assert geometry.peptide_rms < 0.01
    assert geometry.angle_rms < 3
    assert geometry.inverted == 0


def test_a_broken_peptide_bond_is_seen(sound: Structure) -> None:
    before, after = measure_geometry(sound), measure_geometry(moved(sound, slice(10, None), slice(None), [0, 0, 1.0]))
    assert after.peptide_rms > before.peptide_rms + 0.1
    assert after.bond_rms > before.bond_rms
    assert after.inverted == before.inverted
    two_chains = replace(sound, chain_index=(np.arange(len(sound)) >= 10).astype(np.int8))
    torn = moved(two_chains, slice(10, None), slice(None), [0, 0, 1.0])
    assert measure_geometry(torn).peptide_rms == pytest.approx(measure_geometry(two_chains).peptide_rms, abs=1e-4)


def test_the_rms_of_one_stretched_bond_is_that_of_its_stretch(sound: Structure) -> None:
    row = SEQUENCE.index("K")
    nz, ce = atom("NZ", "K"), atom("CE", "K")
    along = sound.atom14[row, nz] - sound.atom14[row, ce]
    stretched = moved(sound, row, nz, list(0.8 * along / np.linalg.norm(along)))
    before, after = measure_geometry(sound), measure_geometry(stretched)
    bonds = sum(len(ideal_residue(aa).bonds) for aa in SEQUENCE) + len(SEQUENCE) - 1
    assert bonds * (after.bond_rms**2 - before.bond_rms**2) == pytest.approx(0.8**2, rel=0.1)
    assert after.angle_rms == pytest.approx(before.angle_rms, abs=1e-3)
    assert after.peptide_rms == before.peptide_rms


def test_a_bent_side_chain_changes_angles_but_no_bond(sound: Structure) -> None:
    row = SEQUENCE.index("S")
    ca, cb, og = sound.atom14[row, 1], sound.atom14[row, atom("CB", "S")], sound.atom14[row, atom("OG", "S")]
    back = (ca - cb) / np.linalg.norm(ca - cb) + (og - cb) / np.linalg.norm(og - cb)
    bent = sound.atom14.copy()
    bent[row, atom("OG", "S")] = cb + np.linalg.norm(og - cb) * back / np.linalg.norm(back)
    before, after = measure_geometry(sound), measure_geometry(replace(sound, atom14=bent))
    assert after.bond_rms == pytest.approx(before.bond_rms, abs=1e-4)
    assert after.angle_rms > before.angle_rms + 1


def test_a_mirrored_ca_is_seen(sound: Structure) -> None:
    row = SEQUENCE.index("A")
    n, ca, c, _, cb = sound.atom14[row, :5]
    normal = np.cross(n - ca, c - ca)
    normal /= np.linalg.norm(normal)
    mirrored = moved(sound, row, atom("CB", "A"), list(-2 * normal @ (cb - ca) * normal))
    assert measure_geometry(mirrored).inverted == 1
    assert measure_geometry(mirrored).bond_rms == pytest.approx(measure_geometry(sound).bond_rms, abs=1e-4)
    whole = replace(sound, atom14=sound.atom14 * np.array([1, 1, -1], dtype=np.float32))
    assert measure_geometry(whole).inverted == len(SEQUENCE) - SEQUENCE.count("G")


def alanines(distance: float, chain: tuple[int, int] = (0, 1)) -> Structure:
    """Two residues of which only CB is known, that far apart in Å."""
    atom14 = np.zeros((2, 14, 3), dtype=np.float32)
    atom14[1, 4, 0] = distance
    found = made(atom14, np.array([RESTYPES.index("A")] * 2))
    mask = np.zeros((2, 14), dtype=bool)
    mask[:, 4] = True
    return replace(found, atom14_mask=mask, chain_index=np.array(chain))


def test_atoms_clash_below_their_radii_less_the_overlap() -> None:
    assert count_clashes(alanines(2.95)) == 1
    assert count_clashes(alanines(3.05)) == 0
    assert measure_geometry(alanines(2.95)).clashes == 50
    assert count_clashes(alanines(2.95, chain=(0, 0))) == 0, "residues that follow one another are bonded"


def test_a_disulfide_bond_is_no_clash() -> None:
    cysteines = made(np.zeros((2, 14, 3), dtype=np.float32), np.array([RESTYPES.index("C")] * 2))
    cysteines = replace(cysteines, chain_index=np.array([0, 1]))
    only_sulphur = np.arange(14) == atom("SG", "C")
    for distance, clashes in ((2.05, 0), (2.8, 1)):
        apart = moved(cysteines, 1, slice(None), [distance, 0, 0])
        assert count_clashes(replace(apart, atom14_mask=np.tile(only_sulphur, (2, 1)))) == clashes


def test_unknown_atoms_do_not_count(sound: Structure) -> None:
    backbone = replace(sound, atom14_mask=sound.atom14_mask & (np.arange(14) < 4))
    torn = moved(backbone, SEQUENCE.index("W"), slice(4, None), [9.0, 9, 9])
    assert measure_geometry(torn) == measure_geometry(backbone)
    nothing = replace(sound, atom14_mask=np.zeros_like(sound.atom14_mask))
    assert np.isnan(measure_geometry(nothing).bond_rms)
    assert measure_geometry(nothing).clashes == 0


def test_crystals_are_near_ideal(shared_data) -> None:
    from pairformer_fast.training.prepare import crystal_structure
    from pairformer_fast.training.sources import read_crystals

    found = [measure_geometry(crystal_structure(crystal)) for crystal in read_crystals(shared_data)]
    assert max(geometry.bond_rms for geometry in found) < 0.025
    assert max(geometry.angle_rms for geometry in found) < 4
    assert max(geometry.clashes for geometry in found) < 25
    assert not any(geometry.inverted for geometry in found)
