"""Predictions to full-atom mmCIF with the quality categories of ModelCIF."""

from __future__ import annotations

import io
from importlib.metadata import version
from pathlib import Path

import biotite.structure as struc
import numpy as np
from biotite.structure.io import pdbx

from pairformer_fast.features import Prediction
from pairformer_fast.inference.fasta import Chain, Job
from pairformer_fast.inference.files import write_atomically
from pairformer_fast.model.residue import ATOM14, THREE_LETTER

GLOBAL_PLDDT, LOCAL_PLDDT = 1, 2

# biotite writes values that start like this unquoted, and readers take them for syntax.
_CIF_WORDS = ("data_", "save_", "loop_", "stop_", "global_")


def write_mmcif(path: str | Path, job: Job, prediction: Prediction, title: str) -> None:
    """Write a prediction as mmCIF, atomically.

    The file has every predicted heavy atom, equal ``label_`` and ``auth_`` ids (residues count from 1 in each
    chain), the sequence of each entity, pLDDT (0 to 100) as B-factor and, global and per residue, in ModelCIF's
    ``ma_qa_metric`` categories.

    Parameters
    ----------
    path : str or Path
        File to write; its folder must exist.
    job : Job
        The chains, in the order of the prediction's tokens.
    prediction : Prediction
        A batch of one, Å.
    title : str
        What the model is, for ``_struct.title``.

    Raises
    ------
    ValueError
        If the prediction does not belong to the job or has coordinates or confidences that are not finite.
    """
    atoms = to_atoms(job, prediction)
    entry = f"_{job.id}" if job.id.lower().startswith(_CIF_WORDS) else job.id
    file = pdbx.CIFFile()
    block = file[entry] = pdbx.CIFBlock()
    block["entry"] = pdbx.CIFCategory({"id": entry})
    block["struct"] = pdbx.CIFCategory({"entry_id": entry, "title": title})
    block["audit_conform"] = pdbx.CIFCategory({"dict_name": "mmcif_ma.dic", "dict_version": "1.4.6"})
    describe_software(block, "pairformer_fast")
    _describe_polymers(block, job)
    pdbx.set_structure(file, atoms)
    sites = block["atom_site"]
    for column, values in zip("xyz", atoms.coord.T, strict=True):
        sites[f"Cartn_{column}"] = [f"{value:.3f}" for value in values]
    sites["B_iso_or_equiv"] = [f"{value:.2f}" for value in atoms.b_factor]
    sites["occupancy"] = ["1.00"] * len(atoms)
    describe_quality(block, atoms)
    buffer = io.StringIO()
    file.write(buffer)
    write_atomically(path, buffer.getvalue())


def to_atoms(job: Job, prediction: Prediction) -> struc.AtomArray:
    """Predicted heavy atoms with chain, residue and entity ids, and pLDDT as ``b_factor``.

    Raises
    ------
    ValueError
        As :func:`write_mmcif`.
    """
    atom14, present, plddt = (
        t[0].detach().cpu().numpy() for t in (prediction.atom14, prediction.atom14_mask, prediction.plddt)
    )
    if atom14.shape != (job.length, 14, 3):
        raise ValueError(f"job {job.id} has {job.length} residues, but the prediction has shape {atom14.shape}")
    if not np.isfinite(atom14[present]).all() or not np.isfinite(plddt).all():
        raise ValueError(f"the prediction of {job.id} has coordinates or confidences that are not finite")
    residues = [(chain.name, i, aa) for chain in job.chains for i, aa in enumerate(chain.sequence, start=1)]
    names = np.array([ATOM14[aa] + ("",) * (14 - len(ATOM14[aa])) for _, _, aa in residues])
    present = present & (names != "")
    token = np.nonzero(present)[0]
    entities = _entities(job)
    atoms = struc.AtomArray(len(token))
    atoms.coord = atom14[present].astype(np.float32)
    atoms.atom_name = names[present]
    atoms.element = np.array([name[:1] for name in atoms.atom_name])
    atoms.chain_id = np.array([residues[i][0] for i in token])
    atoms.res_id = np.array([residues[i][1] for i in token])
    atoms.res_name = np.array([THREE_LETTER[residues[i][2]] for i in token])
    entity_of = {chain.name: str(entities.index(chain.sequence) + 1) for chain in job.chains}
    atoms.set_annotation("label_entity_id", np.array([entity_of[name] for name in atoms.chain_id]))
    atoms.set_annotation("b_factor", np.clip(plddt, 0, 100)[token].astype(np.float32))
    return atoms


def _entities(job: Job) -> list[str]:
    return list(dict.fromkeys(chain.sequence for chain in job.chains))


def describe_software(block: pdbx.CIFBlock, package: str) -> None:
    """Name the package that predicted a model."""
    block["software"] = pdbx.CIFCategory(
        {
            "pdbx_ordinal": 1,
            "name": package,
            "version": version(package),
            "classification": "model building",
            "description": "protein structure prediction",
        }
    )
    block["ma_software_group"] = pdbx.CIFCategory({"ordinal_id": 1, "group_id": 1, "software_id": 1})


def _describe_polymers(block: pdbx.CIFBlock, job: Job) -> None:
    sequences = _entities(job)
    ids = list(range(1, len(sequences) + 1))

    def members(sequence: str) -> list[Chain]:
        return [chain for chain in job.chains if chain.sequence == sequence]

    block["entity"] = pdbx.CIFCategory(
        {
            "id": ids,
            "type": ["polymer"] * len(ids),
            "src_method": ["man"] * len(ids),
            "pdbx_description": [f"record {members(s)[0].record}" for s in sequences],
            "pdbx_number_of_molecules": [len(members(s)) for s in sequences],
        }
    )
    block["entity_poly"] = pdbx.CIFCategory(
        {
            "entity_id": ids,
            "type": ["polypeptide(L)"] * len(ids),
            "nstd_linkage": ["no"] * len(ids),
            "nstd_monomer": ["no"] * len(ids),
            "pdbx_strand_id": [",".join(chain.name for chain in members(s)) for s in sequences],
            "pdbx_seq_one_letter_code": sequences,
            "pdbx_seq_one_letter_code_can": sequences,
        }
    )
    residues = [
        (entity, i, THREE_LETTER[aa]) for entity, s in zip(ids, sequences, strict=True) for i, aa in enumerate(s, 1)
    ]
    entity, number, name = zip(*residues, strict=True)
    block["entity_poly_seq"] = pdbx.CIFCategory(
        {"entity_id": entity, "num": number, "mon_id": name, "hetero": ["n"] * len(residues)}
    )
    block["struct_asym"] = pdbx.CIFCategory(
        {
            "id": [chain.name for chain in job.chains],
            "entity_id": [sequences.index(chain.sequence) + 1 for chain in job.chains],
        }
    )
    components = sorted(set(name))
    block["chem_comp"] = pdbx.CIFCategory(
        {
            "id": components,
            "type": ["peptide linking" if name == "GLY" else "L-peptide linking" for name in components],
        }
    )


def describe_quality(block: pdbx.CIFBlock, atoms: struc.AtomArray) -> None:
    """Declare pLDDT, the ``b_factor`` of each residue's first atom, in ModelCIF's categories."""
    residues = atoms[struc.get_residue_starts(atoms)]
    block["ma_model_list"] = pdbx.CIFCategory(
        {"ordinal_id": 1, "model_id": 1, "model_group_id": 1, "model_name": "model 1", "model_type": "Ab initio model"}
    )
    block["ma_qa_metric"] = pdbx.CIFCategory(
        {
            "id": [GLOBAL_PLDDT, LOCAL_PLDDT],
            "name": ["pLDDT", "pLDDT"],
            "description": ["mean predicted lDDT of CA, 0 to 100", "predicted lDDT of CA, 0 to 100"],
            "type": ["pLDDT", "pLDDT"],
            "mode": ["global", "local"],
            "software_group_id": [1, 1],
        }
    )
    block["ma_qa_metric_global"] = pdbx.CIFCategory(
        {
            "ordinal_id": 1,
            "model_id": 1,
            "metric_id": GLOBAL_PLDDT,
            "metric_value": f"{residues.b_factor.mean():.2f}",
        }
    )
    n = len(residues)
    block["ma_qa_metric_local"] = pdbx.CIFCategory(
        {
            "ordinal_id": list(range(1, n + 1)),
            "model_id": [1] * n,
            "label_asym_id": residues.chain_id,
            "label_seq_id": residues.res_id,
            "label_comp_id": residues.res_name,
            "metric_id": [LOCAL_PLDDT] * n,
            "metric_value": [f"{value:.2f}" for value in residues.b_factor],
        }
    )
