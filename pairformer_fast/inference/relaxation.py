"""Relax a predicted structure in a force field, with OpenMM (extra ``[relax]``).

Amber ff14SB (Maier et al. 2015) in vacuum, with hydrogens that are dropped again. Heavy atoms are held near their
places, so that stereochemistry improves and the fold stays.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from biotite.structure.io import pdb
from torch import Tensor

from pairformer_fast.features import Prediction
from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.fasta import Job
from pairformer_fast.inference.writer import to_atoms
from pairformer_fast.model.residue import ATOM14

STIFFNESS = 10 * 418.4
"""Of the restraints on heavy atoms, kJ/mol/nm² (10 kcal/mol/Å²)."""
CUTOFF = 1.0
"""Of nonbonded interactions, nm."""
TOLERANCE = 10.0
"""Root mean square force at which the minimisation ends, kJ/mol/nm."""
PH = 7.0
CHAIN_IDS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def need_openmm() -> None:
    """Raise InputError if OpenMM or PDBFixer is missing."""
    if find_spec("openmm") is None or find_spec("pdbfixer") is None:
        raise InputError("--relax needs OpenMM and PDBFixer: pip install 'pairformer_fast[relax]'")


def relax(job: Job, prediction: Prediction) -> Tensor:
    """Heavy atoms after a minimisation of the energy, on the CPU; the same on every call on one machine.

    Parameters
    ----------
    job : Job
        The chains, in the order of the prediction's tokens.
    prediction : Prediction
        A batch of one, Å, without clashes worth mention: a minimisation does not untangle chains.

    Returns
    -------
    Tensor
        ``[1, N, 14, 3]`` Å on the CPU.

    Raises
    ------
    InputError
        If there are more chains than a PDB file can name.
    """
    import openmm
    from openmm import app, unit
    from pdbfixer import PDBFixer

    cpu = openmm.Platform.getPlatformByName("CPU")
    cpu.setPropertyDefaultValue("DeterministicForces", "true")
    cpu.setPropertyDefaultValue("Threads", "1")  # threads share out the sums in another order on every run
    with_hydrogens = PDBFixer(pdbfile=io.StringIO(_as_pdb(job, prediction)), platform=cpu)
    with_hydrogens.missingResidues = {}
    with_hydrogens.findMissingAtoms()  # the last oxygen of each chain
    with_hydrogens.addMissingAtoms(seed=0)
    with _same_random_numbers():
        with_hydrogens.addMissingHydrogens(PH)
    topology, positions = with_hydrogens.topology, with_hydrogens.positions.value_in_unit(unit.nanometer)

    system = app.ForceField("amber14-all.xml").createSystem(
        topology, nonbondedMethod=app.CutoffNonPeriodic, nonbondedCutoff=CUTOFF * unit.nanometer
    )
    restraint = openmm.CustomExternalForce(f"{STIFFNESS} * ((x - x0)^2 + (y - y0)^2 + (z - z0)^2)")
    for start in ("x0", "y0", "z0"):
        restraint.addPerParticleParameter(start)
    for atom in topology.atoms():
        if atom.element is not app.element.hydrogen:
            restraint.addParticle(atom.index, positions[atom.index])
    system.addForce(restraint)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), cpu)
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, TOLERANCE)
    relaxed = context.getState(getPositions=True).getPositions(asNumpy=True).value_in_unit(unit.angstrom)
    return _as_atom14(job, prediction, topology, relaxed)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Python's generator, which places hydrogens before they are minimised, seeded and put back."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def _as_pdb(job: Job, prediction: Prediction) -> str:
    if len(job.chains) > len(CHAIN_IDS):
        raise InputError(f"job {job.id}: --relax takes up to {len(CHAIN_IDS)} chains, but it has {len(job.chains)}")
    atoms = to_atoms(job, prediction)
    names = {chain.name: CHAIN_IDS[index] for index, chain in enumerate(job.chains)}
    atoms.chain_id = np.array([names[name] for name in atoms.chain_id])
    file, text = pdb.PDBFile(), io.StringIO()
    file.set_structure(atoms)
    file.write(text)
    return text.getvalue()


def _as_atom14(job: Job, prediction: Prediction, topology: Any, positions: np.ndarray) -> Tensor:
    """The atoms that were predicted; residues of the topology are in the order of the tokens."""
    found = prediction.atom14[0].clone()
    letters = "".join(chain.sequence for chain in job.chains)
    for token, (residue, letter) in enumerate(zip(topology.residues(), letters, strict=True)):
        index = {atom.name: atom.index for atom in residue.atoms()}
        names = ATOM14[letter]
        found[token, : len(names)] = torch.from_numpy(positions[[index[name] for name in names]]).to(found)
    return found[None]
