"""Write data/ideal_geometry.json: the shape of every rigid group, medians over crystal structures."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import biotite.structure as struc
import numpy as np
import torch
import typer
from biotite.structure.io.pdb import PDBFile

from pairformer_fast.inference.files import write_atomically
from pairformer_fast.model.all_atom import group_frame, rigid_group, torsion_atoms
from pairformer_fast.model.residue import ATOM14, RESTYPES, THREE_LETTER
from pairformer_fast.model.rigid import Rigid
from pairformer_fast.user_errors import run_script

ROOT = Path(__file__).resolve().parent.parent
ONE_LETTER = {three: one for one, three in THREE_LETTER.items()}


def main(
    structures: Annotated[
        Path, typer.Argument(help="Folder that is searched for PDB files.", exists=True, file_okay=False)
    ],
    output: Annotated[Path, typer.Option(help="File to write.")] = ROOT / "data" / "ideal_geometry.json",
    least: Annotated[int, typer.Option(help="Fewest complete residues of each type.")] = 30,
) -> None:
    """Collect every complete residue, express each atom in the frame of its rigid group, take medians."""
    samples: dict[str, dict[str, list[np.ndarray]]] = {aa: defaultdict(list) for aa in RESTYPES}
    for path in sorted(structures.rglob("*.pdb")):
        atoms = PDBFile.read(path).get_structure(model=1, altloc="first")
        for residue in struc.residue_iter(atoms[atoms.element != "H"]):
            aa = ONE_LETTER.get(residue.res_name[0])
            positions = {
                str(n): torch.tensor(x, dtype=torch.float64)
                for n, x in zip(residue.atom_name, residue.coord, strict=True)
            }
            if aa and set(ATOM14[aa]) <= positions.keys():
                for atom, xyz in local_positions(aa, positions).items():
                    samples[aa][atom].append(xyz)
    few = {aa: len(s["CA"]) for aa, s in samples.items() if len(s["CA"]) < least}
    if few:
        raise typer.BadParameter(f"fewer than {least} complete residues of {few}: give a folder with more structures")
    geometry = {
        aa: {atom: np.round(np.median(xyz, axis=0), 4).tolist() for atom, xyz in atoms.items()}
        for aa, atoms in samples.items()
    }
    write_atomically(output, json.dumps(geometry, indent=1) + "\n")
    spread = {aa: max(float(np.std(x, axis=0).max()) for x in atoms.values()) for aa, atoms in samples.items()}
    for aa in RESTYPES:
        print(f"{aa}: {len(samples[aa]['CA'])} residues, largest standard deviation {spread[aa]:.3f} Å")


def local_positions(aa: str, positions: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Coordinates (Å) of each heavy atom in the frame of its rigid group."""
    frames = [Rigid.from_backbone(*(positions[name] for name in ("N", "CA", "C")))]
    frames += [group_frame(positions, torsion) for torsion in torsion_atoms(aa)]
    return {atom: frames[rigid_group(aa, atom)].invert_apply(positions[atom]).numpy() for atom in ATOM14[aa]}


if __name__ == "__main__":
    run_script(main)
