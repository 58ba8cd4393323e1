"""A whole OpenFold3 with random weights and the features of one protein chain, made on the device they are used on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any
from unittest.mock import patch

import torch
import yaml
from openfold3.core.loss.loss_module import OpenFold3Loss
from openfold3.core.model.primitives import initialization
from openfold3.core.model.structure.diffusion_module import create_noise_schedule
from openfold3.projects.of3_all_atom.config.model_config import model_config
from openfold3.projects.of3_all_atom.model import OpenFold3
from openfold3_features import GAP, PROTEIN_TYPES, Chain, Features, atom_names, chain_features
from torch import Tensor

SEQUENCES = 128
"""Rows of the MSA."""
CHANGED, GAPS = 0.5, 0.1
"""Shares of the positions of an aligned sequence that differ from the query, and that are gaps."""
ZERO_SCALE = 0.5
"""Weights that OpenFold3 initialises as zero are drawn with this part of the usual standard deviation."""
C_ALPHA_DISTANCE = 3.8
"""Å."""

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
    # Its Fourier embedding draws with a generator of the CPU, whatever the device.
    generators = patch.object(torch, "Generator", partial(torch.Generator, device))
    with patch.object(initialization, "trunc_normal_init_", _draw), generators, torch.device(device):
        model = OpenFold3(config).to(device)
        for value in model.parameters():
            if value.dim() > 1 and not value.any():
                _draw(value, ZERO_SCALE**2)
    return model


@torch.no_grad()
def _draw(weights: Tensor, scale: float = 1.0, **_: Any) -> None:
    weights.normal_(std=(scale / weights.shape[-1]) ** 0.5)


def features(tokens: int, device: torch.device) -> Features:
    """Features of a chain of random residues with an MSA; reference conformers and coordinates are random walks."""
    rng = torch.Generator().manual_seed(1)
    types = torch.tensor(PROTEIN_TYPES)
    query = types[torch.randint(len(types), (tokens,), generator=rng)]
    others = types[torch.randint(len(types), (SEQUENCES, tokens), generator=rng)]
    drawn = torch.rand(SEQUENCES, tokens, generator=rng)
    drawn[0] = 1.0
    msa = torch.where(drawn < GAPS, GAP, torch.where(drawn < GAPS + CHANGED, others, query))
    counts = torch.tensor([len(names) for names in atom_names(query)])
    conformers = torch.randn(int(counts.sum()), 3, generator=rng)
    steps = torch.nn.functional.normalize(torch.randn(tokens, 3, generator=rng), dim=-1)
    positions = (C_ALPHA_DISTANCE * steps).cumsum(0).repeat_interleave(counts, 0) + conformers
    return chain_features(Chain(query, msa, conformers, positions, torch.ones(len(positions))), device)


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
            with torch.autocast(self.device.type, enabled=False):
                loss.backward()
        return {"loss": loss.detach()}

    def gradients(self) -> Result:
        """``gradients``: those of all parameters after a step, in one vector."""
        return {"gradients": torch.cat([x.grad.flatten() for x in self.model.parameters() if x.grad is not None])}
