"""Atoms from frames and torsions: chirality, bond lengths and the way back."""

import biotite.structure as struc
import pytest
import torch
from biotite.structure.io.pdb import PDBFile

from pairformer_fast.model.all_atom import NUM_TORSIONS, AllAtom, rigid_group
from pairformer_fast.model.residue import ATOM14, RESTYPES, THREE_LETTER
from pairformer_fast.model.rigid import Rigid, normalize

EVERY_TYPE = torch.arange(len(RESTYPES))[None]


@pytest.fixture(scope="module")
def placed():
    torch.manual_seed(0)
    all_atom = AllAtom()
    torsions = normalize(torch.randn(1, len(RESTYPES), NUM_TORSIONS, 2))
    axes = torch.randn(2, 1, len(RESTYPES), 3)
    frames = Rigid.from_axes(10 * torch.randn(1, len(RESTYPES), 3), *axes)
    return all_atom, frames, torsions, all_atom(frames, torsions, EVERY_TYPE)


def test_torsions_of_placed_atoms_are_those_asked_for(placed):
    all_atom, _, torsions, atom14 = placed
    found, mask = all_atom.torsions(atom14, all_atom.atom14_mask[EVERY_TYPE], EVERY_TYPE)
    assert mask.sum() == 20 + sum(all_atom.torsion_mask[i, 1:].sum() for i in range(20))
    assert torch.allclose(found[mask], torsions[mask], atol=1e-4)


def test_frames_of_placed_atoms_are_those_asked_for(placed):
    _, frames, _, atom14 = placed
    found = Rigid.from_backbone(*(atom14[:, :, i] for i in range(3)))
    assert torch.allclose(found.rot, frames.rot, atol=1e-3)
    assert torch.allclose(found.trans, frames.trans, atol=1e-5)


def test_bond_lengths_are_those_of_proteins(placed):
    *_, atom14 = placed
    position = {(aa, a): atom14[0, i, j] for i, aa in enumerate(RESTYPES) for j, a in enumerate(ATOM14[aa])}
    expected = {("A", "N", "CA"): 1.458, ("A", "CA", "C"): 1.525, ("A", "C", "O"): 1.231, ("A", "CA", "CB"): 1.53,
                ("K", "CE", "NZ"): 1.489, ("C", "CB", "SG"): 1.808, ("Y", "CZ", "OH"): 1.376,
                ("R", "NE", "CZ"): 1.329, ("M", "SD", "CE"): 1.79, ("W", "CE2", "CZ2"): 1.394,
                ("H", "CD2", "NE2"): 1.374, ("I", "CG1", "CD1"): 1.513, ("F", "CE2", "CZ"): 1.382}  # fmt: skip
    for (aa, a, b), length in expected.items():
        assert float((position[aa, a] - position[aa, b]).norm()) == pytest.approx(length, abs=0.03), (aa, a, b)


def test_residues_are_left_handed_amino_acids(placed):
    *_, atom14 = placed
    n, ca, c, _, cb = (atom14[0, :, j] for j in range(5))
    volume = (torch.linalg.cross(n - ca, c - ca) * (cb - ca)).sum(-1)
    chiral = EVERY_TYPE[0] != RESTYPES.index("G")
    assert (volume[chiral] > 2).all()


def test_threonine_and_isoleucine_have_their_second_stereocentre(placed):
    *_, atom14 = placed
    for aa, names in {"T": ("CA", "OG1", "CG2"), "I": ("CA", "CG1", "CG2")}.items():
        atoms = atom14[0, RESTYPES.index(aa)]
        cb = atoms[ATOM14[aa].index("CB")]
        a, b, c = (atoms[ATOM14[aa].index(name)] - cb for name in names)
        # OG1 (T) and CG1 (I) take the same place around CB when seen from CA.
        assert float((torch.linalg.cross(a, b) * c).sum()) > 2, aa


@pytest.mark.parametrize(
    ("aa", "atom", "group"), [("I", "CG2", 2), ("I", "CD1", 3), ("R", "NH2", 5), ("P", "CD", 3), ("V", "CB", 0)]
)
def test_atoms_move_with_the_right_torsion(aa, atom, group):
    assert rigid_group(aa, atom) == group


def test_crystal_structures_are_rebuilt_from_their_torsions(shared_data):
    one_letter = {three: one for one, three in THREE_LETTER.items()}
    all_atom = AllAtom()
    crystal = PDBFile.read(shared_data / "fv_crystal" / "1VFB.pdb").get_structure(model=1)
    residues = list(struc.residue_iter(crystal[(crystal.element != "H") & (crystal.atom_name != "OXT")]))
    aatype = torch.tensor([[RESTYPES.index(one_letter[r.res_name[0]]) for r in residues]])
    atom14, mask = torch.zeros(1, len(residues), 14, 3), torch.zeros(1, len(residues), 14, dtype=torch.bool)
    for i, residue in enumerate(residues):
        for name, xyz in zip(residue.atom_name, residue.coord, strict=True):
            j = ATOM14[RESTYPES[aatype[0, i]]].index(name)
            atom14[0, i, j], mask[0, i, j] = torch.from_numpy(xyz), True
    torsions, _ = all_atom.torsions(atom14, mask, aatype)
    frames = Rigid.from_backbone(*(atom14[:, :, i] for i in range(3)))
    error = (all_atom(frames, torsions, aatype) - atom14).norm(dim=-1)[mask]
    assert float(error.square().mean().sqrt()) < 0.25
