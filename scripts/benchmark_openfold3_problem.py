"""A whole OpenFold3 with random weights and the features of one protein chain, made on the device they are used on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from unittest.mock import patch

import torch
import yaml
from openfold3.core.data.resources.residues import STANDARD_PROTEIN_RESIDUES_3, STANDARD_RESIDUES_WITH_GAP_3
from openfold3.core.data.resources.token_atom_constants import TOKEN_NAME_TO_ATOM_NAMES
from openfold3.core.loss.loss_module import OpenFold3Loss
from openfold3.core.model.primitives import initialization
from openfold3.core.model.structure.diffusion_module import create_noise_schedule
from openfold3.projects.of3_all_atom.config.model_config import model_config
from openfold3.projects.of3_all_atom.model import OpenFold3
from torch import Tensor

SEQUENCES, TEMPLATES = 128, 4
"""Rows of the MSA, and templates, all empty: OpenFold3 makes that many for a query without any."""
CHANGED, GAPS = 0.5, 0.1
"""Shares of the positions of an aligned sequence that differ from the query, and that are gaps."""
ZERO_SCALE = 0.5
"""Weights that OpenFold3 initialises as zero are drawn with this part of the usual standard deviation."""
LOSS_WEIGHTS = {"bond": 0.0, "smooth_lddt": 4.0, "mse": 4.0, "distogram": 0.03} | dict.fromkeys(
    ("plddt", "pde", "experimentally_resolved", "pae"), 1e-4
)
"""Those of OpenFold3's data sets for the first stage of training."""
RESIDUES = [STANDARD_RESIDUES_WITH_GAP_3.index(name) for name in STANDARD_PROTEIN_RESIDUES_3 if name != "UNK"]
GAP = STANDARD_RESIDUES_WITH_GAP_3.index("GAP")
ELEMENTS = {"C": 6, "N": 7, "O": 8, "S": 16}
C_ALPHA_DISTANCE = 3.8
"""Å."""

Features = dict[str, Any]
Result = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """Blocks of the trunk and of the diffusion transformer; the widths are always production's."""

    trunk: int = 48
    diffusion: int = 24
    samples: int = 5
    steps: int = 50
    training_samples: int = 48
    training_steps: int = 20


FULL = Size()
DRY = Size(trunk=2, diffusion=2, samples=2, steps=3, training_samples=2, training_steps=2)


def build(preset: str, size: Size, device: torch.device) -> OpenFold3:
    """OpenFold3 with one of its presets and deterministic random weights, none of which is a zero matrix.

    Matrices are drawn from N(0, 1 / fan-in); vectors are as OpenFold3 initialises them.
    """
    config = deepcopy(model_config)
    presets = files("openfold3.projects.of3_all_atom.config") / "model_setting_presets.yml"
    config.update(yaml.safe_load(presets.read_text(encoding="utf-8"))[preset])
    architecture = config.architecture
    architecture.pairformer.no_blocks = size.trunk
    architecture.diffusion_module.diffusion_transformer.no_blocks = size.diffusion
    architecture.shared.num_recycles = 0
    sampling = architecture.shared.diffusion
    sampling.no_samples, sampling.no_mini_rollout_steps = size.training_samples, size.training_steps
    sampling.no_full_rollout_samples, sampling.no_full_rollout_steps = size.samples, size.steps
    torch.manual_seed(0)
    with patch.object(initialization, "trunc_normal_init_", _draw), torch.device(device):
        model = OpenFold3(config).to(device)
        for value in model.parameters():
            if value.dim() > 1 and not value.any():
                _draw(value, ZERO_SCALE**2)
    return model


@torch.no_grad()
def _draw(weights: Tensor, scale: float = 1.0, **_: Any) -> None:
    weights.normal_(std=(scale / weights.shape[-1]) ** 0.5)


def features(tokens: int, device: torch.device) -> Features:
    """Features of a protein chain of random residues, as OpenFold3's pipeline makes them for a query with an MSA.

    Keys, shapes and dtypes are those of a prediction; reference conformers and coordinates are random walks.
    """
    rng = torch.Generator().manual_seed(1)
    residues = torch.tensor(RESIDUES)
    query = residues[torch.randint(len(RESIDUES), (tokens,), generator=rng)]
    names = [TOKEN_NAME_TO_ATOM_NAMES[STANDARD_RESIDUES_WITH_GAP_3[index]] for index in query.tolist()]
    counts = torch.tensor([len(atoms) for atoms in names])
    token_of_atom = torch.repeat_interleave(torch.arange(tokens), counts)
    atoms, starts = len(token_of_atom), counts.cumsum(0) - counts
    others = residues[torch.randint(len(RESIDUES), (SEQUENCES, tokens), generator=rng)]
    drawn = torch.rand(SEQUENCES, tokens, generator=rng)
    drawn[0] = 1.0
    msa = torch.where(drawn < GAPS, GAP, torch.where(drawn < GAPS + CHANGED, others, query))
    msa_one_hot = _one_hot(msa, len(STANDARD_RESIDUES_WITH_GAP_3))
    ones, zeros = torch.ones(tokens, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int32)
    conformer = torch.randn(atoms, 3, generator=rng)
    template = torch.zeros(TEMPLATES, tokens)
    chain: Features = {
        "residue_index": torch.arange(1, tokens + 1, dtype=torch.int32),
        "token_index": torch.arange(tokens, dtype=torch.int32),
        "mol_sym_token_index": torch.arange(tokens, dtype=torch.int32),
        "mol_sym_component_id": torch.arange(1, tokens + 1, dtype=torch.int32),
        **dict.fromkeys(("asym_id", "entity_id", "sym_id", "is_protein"), ones),
        **dict.fromkeys(("mol_entity_id", "mol_sym_id"), ones),
        **dict.fromkeys(("is_rna", "is_dna", "is_ligand", "is_atomized"), zeros),
        "token_bonds": torch.zeros(tokens, tokens, dtype=torch.int32),
        "token_mask": torch.ones(tokens),
        "atom_mask": torch.ones(atoms),
        "start_atom_index": starts.int(),
        "num_atoms_per_token": counts.int(),
        "restype": _one_hot(query, len(STANDARD_RESIDUES_WITH_GAP_3)),
    }
    batch: Features = chain | {
        "cyclic_mask": torch.zeros(tokens, dtype=torch.bool),
        "atom_to_token_index": token_of_atom.int(),
        "ref_pos": conformer,
        "ref_mask": torch.ones(atoms, dtype=torch.int32),
        "ref_element": _one_hot(torch.tensor([ELEMENTS[atom[0]] - 1 for one in names for atom in one]), 119),
        "ref_charge": torch.zeros(atoms),
        "ref_atom_name_chars": _one_hot(torch.tensor([_characters(atom) for one in names for atom in one]), 64),
        "ref_space_uid": token_of_atom.int(),
        "msa": msa_one_hot,
        "msa_mask": torch.ones(SEQUENCES, tokens),
        "has_deletion": torch.zeros(SEQUENCES, tokens),
        "deletion_value": torch.zeros(SEQUENCES, tokens),
        "profile": msa_one_hot.float().mean(0),
        "deletion_mean": torch.zeros(tokens),
        "num_paired_seqs": torch.tensor(1, dtype=torch.int32),
        "template_restype": _one_hot(torch.full((TEMPLATES, tokens), GAP), len(STANDARD_RESIDUES_WITH_GAP_3)),
        "template_pseudo_beta_mask": template,
        "template_backbone_frame_mask": template,
        "template_distogram": torch.zeros(TEMPLATES, tokens, tokens, 39),
        "template_unit_vector": torch.zeros(TEMPLATES, tokens, tokens, 3),
    }
    steps = torch.nn.functional.normalize(torch.randn(tokens, 3, generator=rng), dim=-1)
    walk = (C_ALPHA_DISTANCE * steps).cumsum(0)
    resolved = {"atom_positions": walk[token_of_atom] + conformer, "atom_resolved_mask": torch.ones(atoms)}
    batch["ground_truth"] = chain | resolved
    batch["loss_weights"] = {name: torch.tensor(value) for name, value in LOSS_WEIGHTS.items()}
    batch = _on(batch, device)
    permutations = {uid: torch.arange(count, device=device)[None] for uid, count in enumerate(counts.tolist())}
    return batch | {"ref_space_uid_to_perm": [permutations]}


def _one_hot(indices: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(indices, classes).int()


def _characters(atom: str) -> list[int]:
    return [ord(character) - 32 for character in atom.ljust(4)]


def _on(given: Any, device: torch.device) -> Any:
    """The same with a batch of one."""
    if isinstance(given, dict):
        return {name: _on(value, device) for name, value in given.items()}
    return given[None].to(device)


class Problem:
    """A model and its inputs at one size, and what OpenFold3's own code without kernels computes from them."""

    def __init__(self, model: OpenFold3, tokens: int) -> None:
        self.model, self.tokens = model, tokens
        self.device = next(model.parameters()).device
        self.batch = features(tokens, self.device)
        self.loss = OpenFold3Loss(config=model.config.architecture.loss_module)
        if not model.training:
            for name in ("ground_truth", "loss_weights", "ref_space_uid_to_perm"):
                del self.batch[name]

    @contextmanager
    def precision(self, exact: bool = False) -> Iterator[None]:
        """As Lightning's ``bf16-mixed`` with OpenFold3's setting for fp32 products; or fp32 throughout."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if exact else "high")
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=not exact):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    @torch.no_grad()
    def trunk(self, exact: bool = False) -> Result:
        """One cycle of ``run_trunk``: embedders of the input, templates and the MSA, MSA module, Pairformer.

        Returns
        -------
        dict of str to Tensor
            ``s_input``, ``s`` ``[1, N, C_s]`` and ``z`` ``[1, N, N, C_z]``, fp32.
        """
        torch.manual_seed(0)
        with self.precision(exact):
            found = self.model.run_trunk(self.batch, num_cycles=1, inplace_safe=True)
        return dict(zip(("s_input", "s", "z"), found, strict=True))

    @torch.no_grad()
    def sample(self, trunk: Result) -> Result:
        """All steps of ``sample_diffusion`` from the representations of a trunk, in fp32 as OpenFold3 has it.

        Returns
        -------
        dict of str to Tensor
            ``x`` ``[1, samples, atoms, 3]`` in Å.
        """
        torch.manual_seed(0)
        config = self.model.config.architecture
        sampling = config.shared.diffusion
        batch = {name: value.unsqueeze(1) for name, value in self.batch.items()}
        s_input, s, z = (trunk[name].unsqueeze(1) for name in ("s_input", "s", "z"))
        with self.precision(), torch.autocast(self.device.type, enabled=False):
            schedule = create_noise_schedule(
                sampling.no_full_rollout_steps, **config.noise_schedule, dtype=s.dtype, device=s.device
            )
            x = self.model.sample_diffusion(
                batch=batch,
                si_input=s_input,
                si_trunk=s,
                zij_trunk=z,
                noise_schedule=schedule,
                no_rollout_samples=sampling.no_full_rollout_samples,
                chunk_size=self.model.settings.memory.eval.chunk_size,
                use_high_precision_attention=True,
            )
        return {"x": x}

    @torch.no_grad()
    def predict(self) -> Result:
        """``OpenFold3.forward``: trunk, sampling and confidence; ``x`` ``[1, samples, atoms, 3]`` in Å."""
        torch.manual_seed(0)
        with self.precision():
            return {"x": self.model(dict(self.batch))[1]["atom_positions_predicted"]}

    def step(self) -> Result:
        """Forward, OpenFold3's ``loss`` and backward."""
        torch.manual_seed(0)
        self.model.zero_grad(set_to_none=True)
        with self.precision():
            batch, output = self.model(dict(self.batch))
            loss = self.loss(batch=batch, output=output)
        loss.backward()
        return {"loss": loss.detach()}

    def gradients(self) -> Result:
        """``gradients``: those of all parameters after a step, in one vector."""
        return {"gradients": torch.cat([x.grad.flatten() for x in self.model.parameters() if x.grad is not None])}
