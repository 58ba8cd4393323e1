import os

import gemmi
import numpy as np
import pytest
import torch
from biotite.structure.io import pdbx

from pairformer_fast.features import TokenFeatures
from pairformer_fast.inference.writer import write_mmcif
from pairformer_fast.model.residue import ATOM14

from .fakes import helix, make_job

SEQUENCES = ("ARNDCQEGHILKMFPSTWYV", "GGSAYF", "GGSAYF")


@pytest.fixture
def written(tmp_path):
    job = make_job(*SEQUENCES, names="HLM", name="x.1-a")
    prediction = helix(TokenFeatures.from_chains(list(SEQUENCES)))
    path = tmp_path / "x.cif"
    write_mmcif(path, job, prediction, "a title with 'quotes' and spaces")
    return path, prediction


def test_biotite_reads_back_every_atom(written):
    path, prediction = written
    file = pdbx.CIFFile.read(path)
    atoms = pdbx.get_structure(file, model=1, extra_fields=["b_factor", "occupancy"])
    sequence = "".join(SEQUENCES)
    assert atoms.atom_name.tolist() == [name for aa in sequence for name in ATOM14[aa]]
    np.testing.assert_allclose(atoms.coord, prediction.atom14[prediction.atom14_mask].numpy(), atol=6e-4)
    plddt = prediction.plddt[0].numpy()
    np.testing.assert_allclose(atoms.b_factor[atoms.atom_name == "CA"], plddt, atol=6e-3)
    assert (atoms.occupancy == 1).all()
    assert {name: str(s) for name, s in pdbx.get_sequence(file).items()} == dict(zip("HLM", SEQUENCES, strict=True))
    label = pdbx.get_structure(file, model=1, use_author_fields=False)
    assert (label.chain_id == atoms.chain_id).all()
    assert (label.res_id == atoms.res_id).all()


def test_gemmi_reads_chains_sequences_and_quality(written):
    path, prediction = written
    structure = gemmi.read_structure(str(path))
    structure.setup_entities()
    assert [chain.name for chain in structure[0]] == ["H", "L", "M"]
    assert [gemmi.one_letter_code(chain.get_polymer().extract_sequence()) for chain in structure[0]] == list(SEQUENCES)
    assert [gemmi.one_letter_code(entity.full_sequence) for entity in structure.entities] == list(SEQUENCES[:2])
    assert structure[0]["M"][0]["CA"][0].element == gemmi.Element("C")
    block = gemmi.cif.read(str(path)).sole_block()
    assert block.find_value("_struct.title").strip('"') == "a title with 'quotes' and spaces"
    local = block.find("_ma_qa_metric_local.", ["label_asym_id", "label_seq_id", "metric_value"])
    assert [(row[0], int(row[1])) for row in local][19:22] == [("H", 20), ("L", 1), ("L", 2)]
    np.testing.assert_allclose([float(row[2]) for row in local], prediction.plddt[0].numpy(), atol=6e-3)
    assert float(block.find_value("_ma_qa_metric_global.metric_value")) == pytest.approx(
        prediction.plddt.mean().item(), abs=0.01
    )


@pytest.mark.parametrize("name", ["_x", "data_1", "loop_", "save_a", "global_", "stop_", "1e5", "x.-_"])
def test_ids_that_mean_something_in_cif_are_read_back(tmp_path, name):
    path = tmp_path / "x.cif"
    write_mmcif(path, make_job("GA", name=name), helix(TokenFeatures.from_chains(["GA"])), "_title")
    block = gemmi.cif.read(str(path)).sole_block()
    assert block.name.removeprefix("_") == name.removeprefix("_")
    assert gemmi.cif.as_string(block.find_value("_entry.id")) == block.name
    assert gemmi.cif.as_string(block.find_value("_entity.pdbx_description")) == f"record {name}|A"
    assert gemmi.cif.as_string(block.find_value("_struct.title")) == "_title"
    assert len(pdbx.get_structure(pdbx.CIFFile.read(path), model=1)) == 9


def test_single_residue_of_a_single_chain(tmp_path):
    write_mmcif(tmp_path / "g.cif", make_job("G"), helix(TokenFeatures.from_chains(["G"])), "glycine")
    assert len(gemmi.read_structure(str(tmp_path / "g.cif"))[0]["A"][0]) == 4


def test_broken_predictions_are_refused_and_leave_the_old_file(written):
    path, prediction = written
    before = path.read_bytes()
    job = make_job(*SEQUENCES)
    with pytest.raises(ValueError, match="prediction has shape"):
        write_mmcif(path, make_job("AAA"), prediction, "")
    prediction.atom14[0, 3, 1] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        write_mmcif(path, job, prediction, "")
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
