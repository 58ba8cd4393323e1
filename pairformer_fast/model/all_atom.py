"""Heavy atoms from residue frames and torsion angles, and back (AF2 Algorithm 24).

A residue is six rigid groups: the backbone (N, CA, C, CB), the carbonyl O that turns about CA-C, and one group
for each of chi1 to chi4. The shape of every group is read from ``data/ideal_geometry.json``, medians over
crystal structures that ``scripts/make_ideal_geometry.py`` wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from importlib import resources

import torch
from torch import Tensor, nn

from pairformer_fast.model.residue import ATOM14, CHI_ATOMS, CHI_PI_PERIODIC, RESTYPES, SYMMETRIC_ATOMS, VDW_RADIUS
from pairformer_fast.model.rigid import Rigid, dihedral

NUM_GROUPS = 6
NUM_TORSIONS = NUM_GROUPS - 1
_REMOTENESS = "ABGDEZH"


def torsion_atoms(aa: str) -> tuple[tuple[str, ...], ...]:
    """Atoms a-b-c-d of the torsions of a residue: the carbonyl O first, then chi1 to chi4 as far as they exist."""
    return (("N", "CA", "C", "O"), *CHI_ATOMS[aa])


def rigid_group(aa: str, atom: str) -> int:
    """Rigid group of a heavy atom: the last one whose torsion moves it."""
    if atom == "O":
        return 1
    if atom in ("N", "CA", "C", "CB"):
        return 0
    remoteness = _REMOTENESS.index(atom[1])
    moved = [k for k, chi in enumerate(CHI_ATOMS[aa]) if remoteness > _REMOTENESS.index(chi[2][1])]
    return 2 + max(moved)


def group_frame(positions: dict[str, Tensor], torsion: tuple[str, ...]) -> Rigid:
    """Frame of the group that a torsion a-b-c-d moves: origin c, x axis along b-c, d in the xy plane."""
    _, b, c, d = (positions[name] for name in torsion)
    return Rigid.from_axes(c, c - b, d - c)


def _default_frame(local: dict[str, Tensor], torsion: tuple[str, ...]) -> Rigid:
    """Frame of a group inside its parent group at torsion 0, where d lies on the side of a."""
    a, b, c, _ = (local[name] for name in torsion)
    return Rigid.from_axes(c, c - b, a - c)


class AllAtom(nn.Module):
    """Places the heavy atoms of every residue; holds the ideal geometry as buffers, no parameters."""

    group_of_atom: Tensor
    local_position: Tensor
    atom14_mask: Tensor
    default_rot: Tensor
    default_trans: Tensor
    torsion_index: Tensor
    torsion_mask: Tensor
    torsion_pi_periodic: Tensor
    symmetric_swap: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, value in _tables().items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, frames: Rigid, torsions: Tensor, aatype: Tensor) -> Tensor:
        """Coordinates of all heavy atoms.

        Parameters
        ----------
        frames : Rigid
            ``[B, N]`` residue frames, Å.
        torsions : Tensor
            ``[B, N, 5, 2]`` sine and cosine of the carbonyl torsion N-CA-C-O and of chi1 to chi4, unit length.
        aatype : Tensor
            ``[B, N]`` int64.

        Returns
        -------
        Tensor
            ``[B, N, 14, 3]`` Å; atoms a residue lacks are at the origin of its frame.
        """
        sin, cos = torsions.unbind(-1)
        zero, one = torch.zeros_like(sin), torch.ones_like(sin)
        turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=-1).unflatten(-1, (3, 3))
        default_rot, default_trans = self.default_rot[aatype], self.default_trans[aatype]
        groups = [frames]
        for g in range(1, NUM_GROUPS):
            parent = frames if g <= 2 else groups[-1]
            local = Rigid(default_rot[:, :, g] @ turn[:, :, g - 1], default_trans[:, :, g])
            groups.append(parent.compose(local))
        rot = torch.stack([g.rot for g in groups], dim=2)
        trans = torch.stack([g.trans for g in groups], dim=2)
        # The gradient of gather would add with atomics on a GPU, in another order on every run.
        of_group = self.group_of_atom[aatype][..., None] == torch.arange(
            NUM_GROUPS, device=aatype.device
        )  # [B, N, 14, G]
        of_group = of_group.to(trans.dtype)[..., None]
        atom_rot = (of_group[..., None] * rot[:, :, None]).sum(3)
        atom_trans = (of_group * trans[:, :, None]).sum(3)
        return Rigid(atom_rot, atom_trans).apply(self.local_position[aatype])

    def torsions(self, atom14: Tensor, atom14_mask: Tensor, aatype: Tensor) -> tuple[Tensor, Tensor]:
        """Torsions of given coordinates.

        Parameters
        ----------
        atom14 : Tensor
            ``[B, N, 14, 3]`` Å.
        atom14_mask : Tensor
            ``[B, N, 14]`` bool.
        aatype : Tensor
            ``[B, N]`` int64.

        Returns
        -------
        torsions : Tensor
            ``[B, N, 5, 2]`` sine and cosine.
        mask : Tensor
            ``[B, N, 5]`` bool: the torsion exists and its four atoms are known.
        """
        index = self.torsion_index[aatype]
        points = atom14[:, :, None].expand(-1, -1, NUM_TORSIONS, -1, -1)
        points = points.gather(3, index[..., None].expand(*index.shape, 3))
        known = atom14_mask[:, :, None].expand(-1, -1, NUM_TORSIONS, -1).gather(3, index).all(-1)
        return dihedral(*points.unbind(3)), known & self.torsion_mask[aatype]


@cache
def vdw_radii(device: torch.device) -> Tensor:
    """Van der Waals radii of atoms ``[residue types, 14]`` in Å, 0 where a type has no such atom."""
    rows = [[VDW_RADIUS[name[0]] for name in ATOM14[residue]] for residue in RESTYPES]
    padded = [row + [0.0] * (14 - len(row)) for row in rows]
    return torch.tensor([*padded, [0.0] * 14], device=device)


def _tables() -> dict[str, Tensor]:
    geometry = json.loads((resources.files("pairformer_fast.data") / "ideal_geometry.json").read_text("utf-8"))
    count = len(RESTYPES) + 1
    tables = {
        "group_of_atom": torch.zeros(count, 14, dtype=torch.long),
        "local_position": torch.zeros(count, 14, 3),
        "atom14_mask": torch.zeros(count, 14, dtype=torch.bool),
        "default_rot": torch.eye(3).repeat(count, NUM_GROUPS, 1, 1),
        "default_trans": torch.zeros(count, NUM_GROUPS, 3),
        "torsion_index": torch.zeros(count, NUM_TORSIONS, 4, dtype=torch.long),
        "torsion_mask": torch.zeros(count, NUM_TORSIONS, dtype=torch.bool),
        "torsion_pi_periodic": torch.zeros(count, NUM_TORSIONS, dtype=torch.bool),
        "symmetric_swap": torch.arange(14).repeat(count, 1),
    }
    for i, aa in enumerate(RESTYPES):
        _fill(tables, i, aa, {name: torch.tensor(xyz) for name, xyz in geometry[aa].items()})
    return tables


def _fill(tables: dict[str, Tensor], i: int, aa: str, local: dict[str, Tensor]) -> None:
    atoms = ATOM14[aa]
    for j, atom in enumerate(atoms):
        tables["group_of_atom"][i, j] = rigid_group(aa, atom)
        tables["local_position"][i, j] = local[atom]
        tables["atom14_mask"][i, j] = True
    for t, names in enumerate(torsion_atoms(aa)):
        frame = _default_frame(_seen_from_parent(local, t, names), names)
        tables["default_rot"][i, t + 1], tables["default_trans"][i, t + 1] = frame.rot, frame.trans
        tables["torsion_index"][i, t] = torch.tensor([atoms.index(name) for name in names])
        tables["torsion_mask"][i, t] = True
    for chi in CHI_PI_PERIODIC.get(aa, ()):
        tables["torsion_pi_periodic"][i, chi + 1] = True
    for a, b in SYMMETRIC_ATOMS.get(aa, ()):
        tables["symmetric_swap"][i, [atoms.index(a), atoms.index(b)]] = torch.tensor([atoms.index(b), atoms.index(a)])


def _seen_from_parent(local: dict[str, Tensor], torsion: int, names: Iterable[str]) -> dict[str, Tensor]:
    """Positions of a, b, c in the frame of the parent group of a torsion."""
    a, b, _, _ = names
    if torsion < 2:
        return local
    # The parent's own x axis is a -> b and its origin is b.
    return {**local, a: torch.tensor([-1.0, 0.0, 0.0]), b: torch.zeros(3)}
