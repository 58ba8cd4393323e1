"""Relieve a predicted structure of clashes and close its peptide bonds, with as little motion as possible.

A model that places every residue and side chain for itself lets their atoms overlap. Here residues move as in
:mod:`~pairformer_fast.model.closure`, and side chains turn about chi1 to chi4, until no two atoms are nearer than their
van der Waals spheres allow (Word et al. 1999). Bond lengths and angles within residues stay, and the ring of proline;
disulfide bonds that are about there are closed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pairformer_fast.model.all_atom import AllAtom, vdw_radii
from pairformer_fast.model.closure import Descent, Strain, distance, moved, with_oxygens
from pairformer_fast.model.residue import CLASH_OVERLAP, RESTYPES
from pairformer_fast.model.rigid import distances, normalize, turned

STEPS, REFRESH = 200, 50
"""Steps of the minimisation, and after how many pairs of near atoms are sought again."""
LEARNING_RATES = (0.03, 0.06)
"""Of the motion of residues (Å, radians) and of the turns of side chains (radians)."""
TURN = 0.3
"""Weight of squared turns (radians) of side chains against the squared motion (Å) of N, CA and C."""
OVERLAP, BOND = 10.0, 100.0
"""Weights of squared overlaps and of the restraints across peptide and disulfide bonds (Å)."""
MARGIN = 0.05
"""Å by which spheres are kept further apart than a clash is."""
WATCHED = 5.0
"""Å within which pairs of atoms are watched."""
DISULFIDE = 3.0
"""Å below which two SG that are each other's nearest are taken for bonded."""
CHIS = 4
_BEYOND_CB = 5
"""First atom of a side chain after CB."""
_CB, _SG = 4, 5
# distances across a disulfide bond, Å (bond and angle of Engh and Huber 1991): atom of either cysteine, distance
_ACROSS_DISULFIDE = ((_SG, _SG, 2.033), (_CB, _SG, 3.03), (_SG, _CB, 3.03))


def relieve_clashes(atom14: Tensor, atom14_mask: Tensor, chain_index: Tensor, aatype: Tensor) -> Tensor:
    """Structures with few or no clashes and with closed peptide and disulfide bonds; O is placed anew.

    Takes about a second for an antibody Fv on a CPU.

    Parameters
    ----------
    atom14 : Tensor
        ``[B, N, 14, 3]`` Å, finite, complete backbones.
    atom14_mask : Tensor
        ``[B, N, 14]`` bool, False for atoms that are not there, which may be anywhere.
    chain_index : Tensor
        ``[B, N]`` int64, -1 for padding; residues of a chain that follow one another are bonded.
    aatype : Tensor
        ``[B, N]`` int64; of residues of unknown type only the backbone is moved, and clashes are not seen.

    Returns
    -------
    Tensor
        ``[B, N, 14, 3]`` Å.
    """
    with torch.inference_mode(False), torch.enable_grad():
        return _minimise(atom14.clone(), atom14_mask.clone(), chain_index.clone(), aatype.clone())


def _minimise(start: Tensor, mask: Tensor, chain: Tensor, aatype: Tensor) -> Tensor:
    mask = mask & (chain >= 0)[..., None]
    strain, side_chains = Strain(start, chain, aatype, BOND), _SideChains(aatype, mask)
    bridges = _disulfides(start, mask, aatype)
    radii = (vdw_radii(start.device)[aatype] * mask).flatten(1)
    motion = torch.zeros(*chain.shape, 6, device=start.device, requires_grad=True)
    turns = torch.zeros(*chain.shape, CHIS, device=start.device, requires_grad=True)
    groups = [{"params": [x], "lr": rate} for x, rate in zip((motion, turns), LEARNING_RATES, strict=True)]
    descent = Descent(*groups, steps=STEPS)

    def placed() -> Tensor:
        return with_oxygens(moved(side_chains.turned(start, turns), motion), strain.bonded)

    for step in range(STEPS):
        atoms = placed()
        if step % REFRESH == 0:
            structure, first, second = _near_atoms(atoms.detach(), radii, chain, aatype, bridges)
            least = radii[structure, first] + radii[structure, second] - CLASH_OVERLAP + MARGIN
        points = atoms.flatten(1, 2)
        overlap = (least - distance(points[structure, first], points[structure, second])).relu()
        loss = strain(atoms[:, :, :3]) + TURN * turns.square().sum() + OVERLAP * overlap.square().sum()
        descent.step(loss + BOND * _disulfide_strain(atoms, bridges))
    with torch.no_grad():
        return placed()


class _SideChains:
    """Which atoms a chi angle turns, and about which bond."""

    def __init__(self, aatype: Tensor, mask: Tensor) -> None:
        tables = AllAtom().to(aatype.device)
        self._group = tables.group_of_atom[aatype]  # [B, N, 14]
        self._bonds = tables.torsion_index[aatype][:, :, 1:, 1:3]  # [B, N, 4, 2], without that of the carbonyl
        known = mask[:, :, None].expand(-1, -1, CHIS, -1).gather(3, self._bonds).all(-1)
        self._turns = known & tables.torsion_mask[aatype][:, :, 1:] & (aatype != RESTYPES.index("P"))[..., None]

    def turned(self, atoms: Tensor, turns: Tensor) -> Tensor:
        """Atoms ``[B, N, 14, 3]`` after turns ``[B, N, 4]`` (radians), each about its bond as it lies by then."""
        for chi in range(CHIS):
            ends = self._bonds[:, :, chi, :, None].expand(-1, -1, -1, 3)
            near, far = atoms.gather(2, ends).split(1, dim=2)
            axis = normalize(far - near).expand_as(atoms)
            moved_atoms = far + turned(atoms - far, axis, turns[:, :, chi, None, None])
            # Groups of atoms: backbone, carbonyl O, then one for each chi.
            turns_along = (self._group >= 2 + chi) & self._turns[:, :, chi, None]
            atoms = torch.where(turns_along[..., None], moved_atoms, atoms)
        return atoms


def _disulfides(atoms: Tensor, mask: Tensor, aatype: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Structure, residue and residue of pairs of cysteines that are taken for bonded."""
    sulphur = mask[:, :, _SG] & (aatype == RESTYPES.index("C"))
    apart = distances(atoms[:, :, _SG]).masked_fill(~(sulphur[:, :, None] & sulphur[:, None]), torch.inf)
    apart.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = apart == apart.amin(dim=2, keepdim=True)
    structure, first, second = (nearest & nearest.mT & (apart < DISULFIDE)).triu(1).nonzero(as_tuple=True)
    return structure, first, second


def _disulfide_strain(atoms: Tensor, bridges: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Squared deviations (Å) of the distances across disulfide bonds, summed."""
    structure, first, second = bridges
    apart = [distance(atoms[structure, first, a], atoms[structure, second, b]) for a, b, _ in _ACROSS_DISULFIDE]
    ideal = torch.tensor([length for *_, length in _ACROSS_DISULFIDE], device=atoms.device)
    return (torch.stack(apart, dim=-1) - ideal).square().sum()


def _near_atoms(
    atoms: Tensor, radii: Tensor, chain: Tensor, aatype: Tensor, bridges: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Structure, atom and atom, of ``14 N``, of pairs that may clash.

    None of one residue or of two with a disulfide bond, nor of residues that follow one another unless a side chain
    beyond CB is concerned; proline's ring is bonded to the residue before.
    """
    proline = RESTYPES.index("P")
    bridged = torch.zeros(*aatype.shape, aatype.shape[1], dtype=torch.bool, device=aatype.device)
    bridged[bridges] = True
    found = []
    for index, (points, radius) in enumerate(zip(atoms.flatten(1, 2), radii, strict=True)):
        atom = radius.nonzero().squeeze(-1)
        residue, slot = atom // 14, atom % 14
        near = torch.cdist(points[atom], points[atom]) < WATCHED
        near &= residue[:, None] < residue
        follows = (residue[:, None] + 1 == residue) & (chain[index, residue][:, None] == chain[index, residue])
        beyond = (slot[:, None] >= _BEYOND_CB) | (slot >= _BEYOND_CB)
        near &= ~follows | (beyond & (aatype[index, residue] != proline))
        near &= ~bridged[index, residue[:, None], residue]
        first, second = near.nonzero(as_tuple=True)
        found.append(torch.stack([torch.full_like(first, index), atom[first], atom[second]]))
    structure, first, second = torch.cat(found, dim=1)
    return structure, first, second
