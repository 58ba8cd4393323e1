"""Small synthetic structures for tests of the training data."""

import numpy as np

from pairformer_fast.model.residue import ATOM14, RESTYPES
from pairformer_fast.training.shards import Structure


def helix(length: int) -> np.ndarray:
    """Ideal alpha-helical backbone N, CA, C, O ``[length, 4, 3]`` in Å, by internal coordinates."""
    atoms = [np.array([0.0, 0, 0]), np.array([1.46, 0, 0]), np.array([2.0, 1.42, 0])]
    # of the next atom: bond, angle, dihedral; N by psi, CA by omega, C by phi
    internal = [(1.329, 116.6, -47.0), (1.458, 121.7, 180.0), (1.525, 111.0, -57.0)]
    while len(atoms) < 3 * length + 1:
        bond, angle, dihedral = internal[len(atoms) % 3]
        atoms.append(_next_atom(atoms[-3:], bond, angle, dihedral))
    chain = np.array(atoms)
    backbone = np.empty((length, 4, 3))
    backbone[:, :3] = chain[: 3 * length].reshape(length, 3, 3)
    for i in range(length):
        n, ca, c = backbone[i, :3]
        backbone[i, 3] = _next_atom([n, ca, c], 1.231, 120.4, 133.0)
    return backbone.astype(np.float32)


def _next_atom(last: list[np.ndarray], bond: float, angle: float, dihedral: float) -> np.ndarray:
    a, b, c = last
    angle, dihedral = np.radians(angle), np.radians(dihedral)
    along = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, along)
    normal /= np.linalg.norm(normal)
    side = np.cross(normal, along)
    turn = np.sin(angle) * (np.cos(dihedral) * side + np.sin(dihedral) * normal)
    return c + bond * (turn - np.cos(angle) * along)


def structure(id: str, chains: list[str], source: str = "made", all_atoms: bool = False, seed: int = 0) -> Structure:
    """Helical chains 60 Å apart; side chains, if asked for, at random near CA."""
    rng = np.random.default_rng(seed)
    aatype = np.array([RESTYPES.index(aa) for chain in chains for aa in chain])
    mask = np.array([[a < (len(ATOM14[RESTYPES[aa]]) if all_atoms else 4) for a in range(14)] for aa in aatype])
    atom14 = np.zeros((len(aatype), 14, 3), dtype=np.float32)
    atom14[:, :4] = np.concatenate([helix(len(chain)) + np.array([60 * i, 0, 0]) for i, chain in enumerate(chains)])
    atom14[:, 4:] = atom14[:, 1:2] + rng.normal(0, 2, (len(aatype), 10, 3))
    return Structure(
        id=id,
        source=source,
        aatype=aatype,
        chain_index=np.repeat(np.arange(len(chains)), [len(chain) for chain in chains]),
        residue_index=np.concatenate([np.arange(len(chain)) for chain in chains]),
        cdr=rng.integers(0, 4, len(aatype)),
        atom14=atom14 * mask[..., None],
        atom14_mask=mask,
        weight=0.75,
    )
