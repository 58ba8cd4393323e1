import gzip
import json

import biotite.structure as struc
import biotite.structure.io as strucio
import numpy as np
import pytest
import tmtools
import torch
from biotite.structure.io import pdb
from scipy.spatial.transform import Rotation

from pairformer_fast.features import TokenFeatures
from pairformer_fast.inference.compare import compare_structures
from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.writer import to_atoms, write_mmcif

from .fakes import helix, make_job

SEQUENCES = ("MKTAYIAKQRQISFVKSHFSRQDEERLGLIEVQ", "GSDEYFWPLACNTVHHRKMQ")


@pytest.fixture
def atoms():
    return to_atoms(make_job(*SEQUENCES), helix(TokenFeatures.from_chains(list(SEQUENCES))))


@pytest.fixture
def save(tmp_path):
    def _save(name: str, atoms: struc.AtomArray):
        file = pdb.PDBFile()
        file.set_structure(atoms)
        file.write(tmp_path / name)
        return tmp_path / name

    return _save


def perturbed(atoms: struc.AtomArray, scale: float, seed: int = 0) -> struc.AtomArray:
    other = atoms.copy()
    rng = np.random.default_rng(seed)
    noise = rng.normal(scale=scale, size=other.coord.shape)
    other.coord = (Rotation.random(rng=rng).apply(other.coord + noise) + 5).astype(np.float32)
    return other


def test_a_rigid_motion_is_no_difference(atoms, save):
    c = compare_structures(save("a.pdb", perturbed(atoms, 0)), save("b.pdb", atoms))
    assert (c.residues, c.atoms) == (sum(map(len, SEQUENCES)), len(atoms))
    assert c.all_atom_rmsd < 2e-3
    assert c.ca_rmsd < 2e-3
    assert [c.lddt_ca, c.lddt, c.tm_score, c.gdt_ts, c.gdt_ha] == pytest.approx([1] * 5, abs=1e-4)
    assert (c.mean_plddt_a, c.plddt_difference) == (None, None)


def test_metrics_agree_with_biotite_and_tmtools_on_a_perturbed_structure(atoms, save):
    check_against_libraries(save("a.pdb", perturbed(atoms, 0.8)), save("b.pdb", atoms))


@pytest.mark.parametrize("pdb_id", ["1VFB", "1DQJ", "3EO1"])
def test_metrics_agree_with_biotite_and_tmtools_on_crystals(shared_data, save, pdb_id):
    crystal = shared_data / "fv_crystal" / f"{pdb_id}.pdb"
    check_against_libraries(save("a.pdb", perturbed(strucio.load_structure(crystal), 0.7)), crystal)


def check_against_libraries(path_a, path_b):
    a, b = (strucio.load_structure(path) for path in (path_a, path_b))
    order = [np.concatenate([np.flatnonzero(x.chain_id == c) for c in dict.fromkeys(b.chain_id)]) for x in (a, b)]
    a, b = a[order[0]], b[order[1]]
    ca = b.atom_name == "CA"
    c = compare_structures(path_a, path_b)
    moved, fit = struc.superimpose(b[ca], a[ca])
    assert c.ca_rmsd == pytest.approx(struc.rmsd(b[ca], moved), abs=1e-3)
    deviations = [residue.ca_deviation for residue in c.per_residue]
    np.testing.assert_allclose(deviations, np.linalg.norm(moved.coord - b[ca].coord, axis=-1), atol=1e-3)
    assert c.all_atom_rmsd <= struc.rmsd(b, fit.apply(a)) + 1e-3  # symmetric atoms may come closer
    rigid = ~np.isin(b.res_name, ["ASP", "GLU", "PHE", "TYR"])
    assert rigid.sum() > 100
    assert c.lddt_ca == pytest.approx(struc.lddt(b[ca], a[ca]), abs=1e-3)
    assert c.lddt == pytest.approx(struc.lddt(b, a), abs=0.01)
    dashes = "".join("A" for _ in range(ca.sum()))
    tm = tmtools.tm_align(a[ca].coord.astype(float), b[ca].coord.astype(float), dashes, dashes, [dashes, dashes])
    assert c.tm_score == pytest.approx(tm.tm_norm_chain2, abs=1e-3)
    index = np.arange(ca.sum())
    in_place = struc.tm_score(b[ca], moved, index, index, reference_length="reference")
    assert in_place - 1e-3 <= c.tm_score <= 1


def test_all_atom_rmsd_equals_biotites_without_symmetric_side_chains(atoms, save):
    atoms = atoms[~np.isin(atoms.res_name, ["ASP", "GLU", "PHE", "TYR"])]
    a, b = save("a.pdb", perturbed(atoms, 0.8)), save("b.pdb", atoms)
    read_a, read_b = strucio.load_structure(a), strucio.load_structure(b)
    ca = read_b.atom_name == "CA"
    _, fit = struc.superimpose(read_b[ca], read_a[ca])
    c = compare_structures(a, b)
    assert c.all_atom_rmsd == pytest.approx(struc.rmsd(read_b, fit.apply(read_a)), abs=1e-3)
    assert c.lddt == pytest.approx(struc.lddt(read_b, read_a), abs=1e-3)


def test_swapped_names_of_symmetric_atoms_do_not_count(atoms, save):
    renamed = atoms.copy()
    swap = {
        "OD1": "OD2",
        "OD2": "OD1",
        "OE1": "OE2",
        "OE2": "OE1",
        "CD1": "CD2",
        "CD2": "CD1",
        "CE1": "CE2",
        "CE2": "CE1",
    }
    symmetric = np.isin(renamed.res_name, ["ASP", "GLU", "PHE", "TYR"])
    renamed.atom_name = np.array(
        [swap.get(n, n) if s else n for n, s in zip(renamed.atom_name, symmetric, strict=True)]
    )
    c = compare_structures(save("a.pdb", renamed), save("b.pdb", atoms))
    assert c.all_atom_rmsd < 2e-3
    leucine = atoms.copy()
    leucine.atom_name = np.array(
        [swap.get(n, n) if r == "LEU" else n for n, r in zip(leucine.atom_name, leucine.res_name, strict=True)]
    )
    assert compare_structures(save("c.pdb", leucine), save("b.pdb", atoms)).all_atom_rmsd > 0.1


def test_chains_are_matched_by_sequence_whatever_their_ids_and_order(atoms, save):
    other = atoms.copy()
    other.chain_id = np.where(atoms.chain_id == "A", "B", "A")
    other = other[np.argsort(other.chain_id, kind="stable")]
    c = compare_structures(save("a.pdb", other), save("b.pdb", atoms))
    assert [(m.a, m.b) for m in c.chains] == [("B", "A"), ("A", "B")]
    assert c.ca_rmsd < 2e-3


def test_equal_ids_win_between_identical_chains(tmp_path, save):
    job = make_job("GSDEYFWPLAC", "GSDEYFWPLAC", names="XY")
    atoms = to_atoms(job, helix(TokenFeatures.from_chains(["GSDEYFWPLAC"] * 2)))
    c = compare_structures(save("a.pdb", atoms[np.argsort(atoms.chain_id != "Y", kind="stable")]), save("b.pdb", atoms))
    assert {(m.a, m.b) for m in c.chains} == {("X", "X"), ("Y", "Y")}


@pytest.mark.parametrize("renumber", [False, True], ids=["numbered", "renumbered"])
def test_missing_residues_atoms_and_chains_are_left_out_and_counted(atoms, save, renumber):
    missing = (atoms.chain_id == "A") & np.isin(atoms.res_id, [1, 2, 15, 16, 17])
    part = atoms[~missing & ~((atoms.res_id == 5) & (atoms.atom_name == "CB")) & (atoms.chain_id == "A")]
    if renumber:
        part = part.copy()
        part.res_id = struc.spread_residue_wise(part, np.arange(100, 100 + struc.get_residue_count(part)))
    c = compare_structures(save("a.pdb", part), save("b.pdb", atoms))
    assert (c.residues_a, c.residues_b, c.residues) == (28, 53, 28)
    assert (c.atoms, c.unmatched_a, c.unmatched_b) == (len(part), [], ["B"])
    assert c.ca_rmsd < 2e-3
    assert c.lddt == pytest.approx(1)
    assert [c.tm_score, c.gdt_ts] == pytest.approx([28 / 53] * 2, abs=1e-3)
    assert [r.residue_b for r in c.per_residue][:3] == ["3", "4", "5"]


def test_mutated_residues_are_compared_by_their_backbone(atoms, save):
    mutated = atoms[~((atoms.res_id == 3) & (atoms.chain_id == "A") & (atoms.atom_name == "OG1"))].copy()
    mutated.res_name[(mutated.res_id == 3) & (mutated.chain_id == "A")] = "VAL"
    c = compare_structures(save("a.pdb", mutated), save("b.pdb", atoms))
    assert c.residues == 53
    assert c.atoms == len(atoms) - 3  # CB, OG1 and CG2 of the threonine
    assert c.chains[0].identity == pytest.approx(32 / 33)


def test_plddt_is_read_only_where_the_file_declares_it(tmp_path, atoms, save):
    job = make_job(*SEQUENCES)
    high, low = helix(TokenFeatures.from_chains(list(SEQUENCES))), helix(TokenFeatures.from_chains(list(SEQUENCES)))
    low.plddt.sub_(10)
    write_mmcif(tmp_path / "a.cif", job, high, "")
    write_mmcif(tmp_path / "b.cif", job, low, "")
    c = compare_structures(tmp_path / "a.cif", tmp_path / "b.cif")
    assert c.plddt_difference == pytest.approx(10, abs=0.01)
    assert c.mean_plddt_b == pytest.approx(low.plddt.mean().item(), abs=0.01)
    assert c.per_residue[7].plddt_a == pytest.approx(high.plddt[0, 7].item(), abs=0.01)
    against_pdb = compare_structures(tmp_path / "a.cif", save("b.pdb", atoms))
    assert (against_pdb.mean_plddt_b, against_pdb.plddt_difference) == (None, None)
    assert against_pdb.mean_plddt_a is not None
    json.loads(c.model_dump_json())


def test_compressed_files_and_a_single_residue(tmp_path, atoms, save):
    plain = save("b.pdb", atoms)
    (tmp_path / "a.PDB.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert compare_structures(tmp_path / "a.PDB.gz", plain).ca_rmsd < 1e-6
    one = save("one.pdb", atoms[(atoms.res_id == 1) & (atoms.chain_id == "A")])
    c = compare_structures(one, one)
    assert (c.residues, c.ca_rmsd, c.lddt_ca, c.gdt_ts) == (1, 0, None, 1)


def test_unreadable_files_are_explained(tmp_path, atoms, save):
    good = save("good.pdb", atoms)
    (tmp_path / "garbage.cif").write_text("this is\nno mmCIF")
    (tmp_path / "binary.pdb").write_bytes(bytes(range(256)))
    (tmp_path / "water.pdb").write_text(
        "HETATM    1  O   HOH A   1      53.966  -8.327 -19.925  1.00  0.00           O\n"
    )
    (tmp_path / "x.txt").write_text("")
    other = save("other.pdb", to_atoms(make_job("WWWWWWWWWW"), helix(TokenFeatures.from_chains(["WWWWWWWWWW"]))))
    for bad, message in [
        ("nope.pdb", "no such file"),
        ("x.txt", "unknown kind of structure file"),
        ("garbage.cif", "cannot be read as mmCIF"),
        ("binary.pdb", "cannot be read as PDB"),
        ("water.pdb", "no amino acid"),
        (other.name, "no chain in common"),
    ]:
        with pytest.raises(InputError, match=message) as info:
            compare_structures(tmp_path / bad, good)
        assert "\n" not in str(info.value)


def test_comparison_does_not_touch_torch_state(atoms, save):
    state = torch.get_rng_state()
    compare_structures(save("a.pdb", perturbed(atoms, 1)), save("b.pdb", atoms))
    assert torch.equal(state, torch.get_rng_state())
