"""Structure-accuracy regression of the bundled weights: golden structures, acceleration, crystals."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from biotite.structure.io.pdbx import CIFFile, get_structure

from pairformer_fast.bias import BiasFactors, attention
from pairformer_fast.bias.certificate import certify
from pairformer_fast.inference.compare import compare_structures
from pairformer_fast.inference.fasta import read_fasta
from pairformer_fast.inference.predict import Predictor
from pairformer_fast.inference.regress import GOLDEN_CA_RMSD, Regression, bundled_golden, regress
from pairformer_fast.inference.settings import FoldSettings, Precision
from pairformer_fast.inference.writer import write_mmcif

SETTINGS = FoldSettings(bias="svd", device="cpu", precision=Precision.FP32)
"""With factors: what acceleration may change is what they change."""
ACCELERATED_GATES = {"accelerated to reference, CA RMSD (Å)", "accelerated to reference, lDDT-CA"}


@pytest.fixture
def one_domain(tmp_path) -> Path:
    """A golden folder with a single short domain."""
    golden = bundled_golden()
    job = next(job for job in read_fasta(golden / "golden.fasta") if job.id == "rituximab_VL")
    (tmp_path / "golden.fasta").write_text(f">{job.id}\n{job.chains[0].sequence}\n", encoding="utf-8")
    shutil.copy(golden / f"{job.id}.cif", tmp_path)
    return tmp_path


def failed_gates(result: Regression) -> set[str]:
    return {gate.name for gate in result.gates if not gate.passed}


def test_bundled_structures_are_reproduced_and_acceleration_keeps_them():
    result = regress(bundled_golden(), SETTINGS)
    assert len({gate.subject for gate in result.gates}) >= 6
    assert failed_gates(result) == set()


@pytest.mark.parametrize("path", sorted(bundled_golden().glob("*.cif")), ids=lambda path: path.stem)
def test_predicted_chains_are_unbroken(path):
    structure = get_structure(CIFFile.read(path), model=1)
    for chain in set(structure.chain_id):
        c, n = (structure[(structure.chain_id == chain) & (structure.atom_name == name)].coord for name in ("C", "N"))
        lengths = np.linalg.norm(n[1:] - c[:-1], axis=-1)
        assert np.abs(lengths - 1.329).max() < 0.1
        ca = structure[(structure.chain_id == chain) & (structure.atom_name == "CA")].coord
        apart = np.linalg.norm(ca[:, None] - ca[None], axis=-1)[np.triu_indices(len(ca), 2)]
        assert apart.min() > 3.3


def test_accelerated_path_uses_factors_within_its_tolerance():
    job = next(job for job in read_fasta(bundled_golden() / "golden.fasta") if job.id == "rituximab_VL")
    reports = Predictor(SETTINGS).predict(job, SETTINGS.accelerated).reports
    factors = [report for report in reports if report["choice"] == "factors"]
    assert len(factors) >= len(reports) // 2
    for report in factors:
        assert max(report["probed_mean"]) <= SETTINGS.accelerated.tolerance
        assert all(probed <= bound + 1e-5 for probed, bound in zip(report["probed_max"], report["bound"], strict=True))
        for head, rank in enumerate(report["rank"]):
            assert rank == job.length if head in report["dense_heads"] else rank <= job.length // 2


def test_the_default_path_is_dense_by_measured_costs_and_folds_as_the_reference(tmp_path):
    job = next(job for job in read_fasta(bundled_golden() / "golden.fasta") if job.id == "rituximab_VL")
    settings = FoldSettings(device="cpu", precision=Precision.FP32)
    result = Predictor(settings).predict(job, settings.accelerated)
    assert {report["choice"] for report in result.reports} == {"dense"}
    assert all("with factors of rank" in report["reason"] for report in result.reports)
    write_mmcif(tmp_path / "a.cif", job, result.prediction, "")
    assert compare_structures(tmp_path / "a.cif", bundled_golden() / f"{job.id}.cif").ca_rmsd < GOLDEN_CA_RMSD


def test_weights_trained_with_factors_fold_as_their_reference_and_as_the_dense_ones(tmp_path):
    job = next(job for job in read_fasta(bundled_golden() / "golden.fasta") if job.id == "rituximab_VL")
    predictor = Predictor(FoldSettings(bias="learned", device="cpu", precision=Precision.FP32))
    for name, path in (("accelerated", predictor.accelerated), ("reference", predictor.reference)):
        result = predictor.predict(job, path)
        assert {(report["choice"], *set(report["rank"])) for report in result.reports} == {("factors", 32)}
        write_mmcif(tmp_path / f"{name}.cif", job, result.prediction, "")
    assert compare_structures(tmp_path / "accelerated.cif", tmp_path / "reference.cif").ca_rmsd < GOLDEN_CA_RMSD
    beside = compare_structures(tmp_path / "accelerated.cif", bundled_golden() / f"{job.id}.cif")
    assert beside.lddt_ca > 0.98


def rank_one(outcome, bias, mask):
    u, s, vt = torch.linalg.svd(bias.float(), full_matrices=False)
    return (u[..., :1] * s[..., None, :1]).to(bias.dtype), vt[..., :1, :].mT.to(bias.dtype)


def swapped_heads(outcome, bias, mask):
    return outcome.factors.phi_q.roll(1, dims=1), outcome.factors.phi_k.roll(1, dims=1)


@pytest.mark.parametrize("broken", [rank_one, swapped_heads])
def test_a_broken_factorisation_fails_the_gates(one_domain, monkeypatch, broken):
    intact = attention.factorize

    def factorize(bias, config, q, k, mask, *more):
        outcome = intact(bias, config, q, k, mask, *more)
        if outcome.factors is None:
            return outcome
        phi_q, phi_k = broken(outcome, bias, mask)
        rank = torch.full_like(outcome.factors.rank, phi_q.shape[-1])
        return replace(outcome, factors=BiasFactors(phi_q, phi_k, rank, certify(bias, phi_q, phi_k, mask)))

    monkeypatch.setattr(attention, "factorize", factorize)
    assert failed_gates(regress(one_domain, SETTINGS)) == ACCELERATED_GATES


@pytest.mark.slow
def test_acceleration_loses_nothing_against_crystals(one_domain, shared_data):
    result = regress(one_domain, SETTINGS, crystals=shared_data)
    assert len(result.crystals) == 15
    assert failed_gates(result) == set()
    mean = sum(crystal.accelerated_lddt_ca for crystal in result.crystals) / len(result.crystals)
    assert mean >= 0.93
