"""Features of one protein chain for OpenFold3, made from tensors instead of files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from openfold3.core.data.resources.residues import STANDARD_PROTEIN_RESIDUES_3, STANDARD_RESIDUES_WITH_GAP_3
from openfold3.core.data.resources.token_atom_constants import TOKEN_NAME_TO_ATOM_NAMES
from torch import Tensor

TEMPLATES = 4
"""All empty: OpenFold3 makes that many for a query without any."""
LOSS_WEIGHTS = {"bond": 0.0, "smooth_lddt": 4.0, "mse": 4.0, "distogram": 0.03} | dict.fromkeys(
    ("plddt", "pde", "experimentally_resolved", "pae"), 1e-4
)
"""Those of OpenFold3's data sets for the first stage of training."""
PROTEIN_TYPES = [STANDARD_RESIDUES_WITH_GAP_3.index(name) for name in STANDARD_PROTEIN_RESIDUES_3 if name != "UNK"]
GAP = STANDARD_RESIDUES_WITH_GAP_3.index("GAP")
TYPES = len(STANDARD_RESIDUES_WITH_GAP_3)
ELEMENTS = {"C": 6, "N": 7, "O": 8, "S": 16}

Features = dict[str, Any]


@dataclass(frozen=True)
class Chain:
    """A protein chain whose atoms are those of :func:`atom_names`, in order; coordinates in Å.

    Attributes
    ----------
    query : Tensor
        Residue types ``[N]``, as OpenFold3 numbers them.
    msa : Tensor
        Residue types ``[S, N]``, the query first.
    conformers, positions : Tensor
        ``[A, 3]``: of each residue alone, and in the structure.
    resolved : Tensor
        ``[A]``, 1 where there is a position.
    """

    query: Tensor
    msa: Tensor
    conformers: Tensor
    positions: Tensor
    resolved: Tensor


def atom_names(query: Tensor) -> list[list[str]]:
    """Names of the atoms of each residue."""
    return [TOKEN_NAME_TO_ATOM_NAMES[STANDARD_RESIDUES_WITH_GAP_3[index]] for index in query.tolist()]


def chain_features(chain: Chain, device: torch.device) -> Features:
    """Keys, shapes and dtypes are those of OpenFold3's pipeline for a batch of one, the ground truth included."""
    names, tokens, (sequences, _) = atom_names(chain.query), len(chain.query), chain.msa.shape
    counts = torch.tensor([len(atoms) for atoms in names])
    token_of_atom = torch.repeat_interleave(torch.arange(tokens), counts)
    atoms = len(token_of_atom)
    ones, zeros = torch.ones(tokens, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int32)
    msa, template = _one_hot(chain.msa, TYPES), torch.zeros(TEMPLATES, tokens)
    common: Features = {
        "residue_index": torch.arange(1, tokens + 1, dtype=torch.int32),
        "token_index": torch.arange(tokens, dtype=torch.int32),
        "mol_sym_token_index": torch.arange(tokens, dtype=torch.int32),
        "mol_sym_component_id": torch.arange(1, tokens + 1, dtype=torch.int32),
        **dict.fromkeys(("asym_id", "entity_id", "sym_id", "is_protein", "mol_entity_id", "mol_sym_id"), ones),
        **dict.fromkeys(("is_rna", "is_dna", "is_ligand", "is_atomized"), zeros),
        "token_bonds": torch.zeros(tokens, tokens, dtype=torch.int32),
        "token_mask": torch.ones(tokens),
        "atom_mask": torch.ones(atoms),
        "start_atom_index": (counts.cumsum(0) - counts).int(),
        "num_atoms_per_token": counts.int(),
        "restype": _one_hot(chain.query, TYPES),
    }
    batch: Features = common | {
        "cyclic_mask": torch.zeros(tokens, dtype=torch.bool),
        "atom_to_token_index": token_of_atom.int(),
        "ref_pos": chain.conformers,
        "ref_mask": torch.ones(atoms, dtype=torch.int32),
        "ref_element": _one_hot(torch.tensor([ELEMENTS[atom[0]] - 1 for one in names for atom in one]), 119),
        "ref_charge": torch.zeros(atoms),
        "ref_atom_name_chars": _one_hot(torch.tensor([_characters(atom) for one in names for atom in one]), 64),
        "ref_space_uid": token_of_atom.int(),
        "msa": msa,
        "msa_mask": torch.ones(sequences, tokens),
        "has_deletion": torch.zeros(sequences, tokens),
        "deletion_value": torch.zeros(sequences, tokens),
        "profile": msa.float().mean(0),
        "deletion_mean": torch.zeros(tokens),
        "num_paired_seqs": torch.tensor(1, dtype=torch.int32),
        "template_restype": _one_hot(torch.full((TEMPLATES, tokens), GAP), TYPES),
        "template_pseudo_beta_mask": template,
        "template_backbone_frame_mask": template,
        "template_distogram": torch.zeros(TEMPLATES, tokens, tokens, 39),
        "template_unit_vector": torch.zeros(TEMPLATES, tokens, tokens, 3),
        "ground_truth": common | {"atom_positions": chain.positions, "atom_resolved_mask": chain.resolved},
        "loss_weights": {name: torch.tensor(value) for name, value in LOSS_WEIGHTS.items()},
    }
    permutations = {uid: torch.arange(count, device=device)[None] for uid, count in enumerate(counts.tolist())}
    return _on(batch, device) | {"ref_space_uid_to_perm": [permutations]}


def _one_hot(indices: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(indices, classes).int()


def _characters(atom: str) -> list[int]:
    return [ord(character) - 32 for character in atom.ljust(4)]


def _on(given: Any, device: torch.device) -> Any:
    """The same with a batch of one."""
    if isinstance(given, dict):
        return {name: _on(value, device) for name, value in given.items()}
    return given[None].to(device)
