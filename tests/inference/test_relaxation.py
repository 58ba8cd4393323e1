"""Relaxation with OpenMM keeps the fold and mends stereochemistry."""

import sys

import numpy as np
import pytest

from pairformer_fast import cli
from pairformer_fast.inference import relaxation
from pairformer_fast.inference.structures import read_structure

NANOBODY = (
    "QVQLVESGGGLVQAGGSLRLSCAASGRTFSSYAMGWFRQAPGKEREFVAAISWSGGSTYY"
    "ADSVKGRFTISRDNAKNTVYLQMNSLKPEDTAVYYCAADSSWYDYWGQGTQVTVSS"
)


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pairformer-fast", *arguments])
    with pytest.raises(SystemExit) as info:
        cli.main()
    return info.value.code


def test_relaxed_structures_have_all_atoms_near_their_places(tmp_path, monkeypatch) -> None:
    pytest.importorskip("openmm", reason="needs the extra [relax]: pip install '.[relax]'")
    fasta = tmp_path / "one.fasta"
    fasta.write_text(f">a\n{NANOBODY}\n")
    places = []
    for name, options in (("plain", ()), ("relaxed", ("--relax",)), ("again", ("--relax",))):
        assert run(monkeypatch, "fold", str(fasta), str(tmp_path / name), "--no-compare", *options) == 0
        [chain] = read_structure(tmp_path / name / "a" / "a_flashbias.cif").values()
        places.append({(i, atom): xyz for i, residue in enumerate(chain) for atom, xyz in residue.atoms.items()})
    before, after, again = places
    assert before.keys() == after.keys()
    assert all((again[key] == xyz).all() for key, xyz in after.items())
    moved = {key: np.linalg.norm(after[key] - xyz) for key, xyz in before.items()}
    ca = [distance for (_, atom), distance in moved.items() if atom == "CA"]
    assert 0.01 < np.mean(ca) < 0.3
    assert max(moved.values()) < 3
    bonds = [np.linalg.norm(after[i, "C"] - after[i + 1, "N"]) for i in range(len(ca) - 1)]
    np.testing.assert_allclose(bonds, 1.335, atol=0.04)


def test_without_openmm_nothing_is_begun(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(relaxation, "find_spec", lambda _: None)
    fasta = tmp_path / "one.fasta"
    fasta.write_text(f">a\n{NANOBODY}\n")
    assert run(monkeypatch, "fold", str(fasta), str(tmp_path / "out"), "--relax") == 2
    assert "pip install 'pairformer_fast[relax]'" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_openfold3_is_not_relaxed_here(tmp_path, monkeypatch, capsys) -> None:
    fasta = tmp_path / "one.fasta"
    fasta.write_text(f">a\n{NANOBODY}\n")
    assert run(monkeypatch, "fold", str(fasta), str(tmp_path / "out"), "--relax", "--model", "openfold3") == 2
    assert "--relax is for --model pairformer" in capsys.readouterr().err
