"""The twenty standard residues: letters, heavy atoms, side-chain torsions. Topology only, no geometry."""

from __future__ import annotations

RESTYPES = "ARNDCQEGHILKMFPSTWYV"
"""One-letter codes in the order of ``aatype`` (alphabetical by three-letter code); 20 is unknown."""

UNKNOWN = len(RESTYPES)

_NAMES = "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL"

THREE_LETTER = dict(zip(RESTYPES, _NAMES.split(), strict=True))

BACKBONE = ("N", "CA", "C", "O")

_SIDE_CHAINS = {
    "A": "CB",
    "R": "CB CG CD NE CZ NH1 NH2",
    "N": "CB CG OD1 ND2",
    "D": "CB CG OD1 OD2",
    "C": "CB SG",
    "Q": "CB CG CD OE1 NE2",
    "E": "CB CG CD OE1 OE2",
    "G": "",
    "H": "CB CG ND1 CD2 CE1 NE2",
    "I": "CB CG1 CG2 CD1",
    "L": "CB CG CD1 CD2",
    "K": "CB CG CD CE NZ",
    "M": "CB CG SD CE",
    "F": "CB CG CD1 CD2 CE1 CE2 CZ",
    "P": "CB CG CD",
    "S": "CB OG",
    "T": "CB OG1 CG2",
    "W": "CB CG CD1 CD2 NE1 CE2 CE3 CZ2 CZ3 CH2",
    "Y": "CB CG CD1 CD2 CE1 CE2 CZ OH",
    "V": "CB CG1 CG2",
}

ATOM14 = {aa: BACKBONE + tuple(names.split()) for aa, names in _SIDE_CHAINS.items()}
"""Heavy atoms of each residue in the order of the ``atom14`` axis (4 to 14 names)."""

VDW_RADIUS = {"C": 1.7, "N": 1.55, "O": 1.52, "S": 1.8}
"""Van der Waals radii of heavy atoms, Å (Bondi 1964)."""

CLASH_OVERLAP = 0.4
"""Å by which the van der Waals spheres of two heavy atoms have to overlap for a clash (Word et al. 1999)."""

CHI_ATOMS = {
    aa: tuple(tuple(chi.split("-")) for chi in chis.split())
    for aa, chis in {
        "A": "",
        "R": "N-CA-CB-CG CA-CB-CG-CD CB-CG-CD-NE CG-CD-NE-CZ",
        "N": "N-CA-CB-CG CA-CB-CG-OD1",
        "D": "N-CA-CB-CG CA-CB-CG-OD1",
        "C": "N-CA-CB-SG",
        "Q": "N-CA-CB-CG CA-CB-CG-CD CB-CG-CD-OE1",
        "E": "N-CA-CB-CG CA-CB-CG-CD CB-CG-CD-OE1",
        "G": "",
        "H": "N-CA-CB-CG CA-CB-CG-ND1",
        "I": "N-CA-CB-CG1 CA-CB-CG1-CD1",
        "L": "N-CA-CB-CG CA-CB-CG-CD1",
        "K": "N-CA-CB-CG CA-CB-CG-CD CB-CG-CD-CE CG-CD-CE-NZ",
        "M": "N-CA-CB-CG CA-CB-CG-SD CB-CG-SD-CE",
        "F": "N-CA-CB-CG CA-CB-CG-CD1",
        "P": "N-CA-CB-CG CA-CB-CG-CD",
        "S": "N-CA-CB-OG",
        "T": "N-CA-CB-OG1",
        "W": "N-CA-CB-CG CA-CB-CG-CD1",
        "Y": "N-CA-CB-CG CA-CB-CG-CD1",
        "V": "N-CA-CB-CG1",
    }.items()
}
"""The four atoms of chi1, chi2, ... of each residue."""

CHI_PI_PERIODIC = {"D": (1,), "E": (2,), "F": (1,), "Y": (1,)}
"""Zero-based chi angles that a half turn leaves unchanged but for atom names."""

SYMMETRIC_ATOMS = {
    "D": (("OD1", "OD2"),),
    "E": (("OE1", "OE2"),),
    "F": (("CD1", "CD2"), ("CE1", "CE2")),
    "Y": (("CD1", "CD2"), ("CE1", "CE2")),
}
"""Pairs of atoms whose names a half turn of the last chi swaps."""
