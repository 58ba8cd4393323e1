"""Train a tiny OpenFold3 on a folder of structures with the flag off and on, and compare the loss curves.

Needs the extra ``openfold``; a few minutes on a CPU.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from benchmark_rows import RESULTS, machine
from biotite.structure import AtomArray, chain_iter, filter_amino_acids, residue_iter
from biotite.structure.info import residue as ideal_residue
from biotite.structure.io.pdb import PDBFile
from torch import Tensor

from pairformer_fast.bias import PairBiasAttention
from pairformer_fast.inference.files import write_atomically
from pairformer_fast.user_errors import run_script

try:
    import pytorch_lightning as pl
    from openfold3.core.data.resources.residues import STANDARD_RESIDUES_WITH_GAP_3
    from openfold3.projects.of3_all_atom.project_entry import ModelUpdate, OF3ProjectEntry
    from openfold3_features import PROTEIN_TYPES, Chain, Features, atom_names, chain_features

    from pairformer_fast.integrations.openfold3_run import flashbias_flag
except ModuleNotFoundError as error:
    sys.exit(f"train_openfold3_tiny.py: {error}; OpenFold3 comes with pip install 'pairformer_fast[openfold]'")

PAIR = {"c_hidden_mul": 32, "c_hidden_pair_att": 8, "transition_n": 2}
SINGLE = {"c_hidden_pair_bias": 16, "no_heads_pair_bias": 4}
ATOMS = {"no_blocks": 1}
TINY = {
    "settings": {"lr_scheduler": {"warmup_no_steps": 20}, "blocks_per_ckpt": None, "ckpt_intermediate_steps": False},
    "architecture": {
        "shared": {
            "c_s": 64,
            "c_z": 32,
            "num_recycles": 0,
            "diffusion": {"no_samples": 2, "no_mini_rollout_steps": 2},
        },
        "input_embedder": {"atom_attn_enc": {"c_token": 64} | ATOMS},
        "template": {"template_pair_stack": {"no_blocks": 1}},
        "msa": {"msa_module": {"no_blocks": 1} | PAIR},
        "pairformer": {"no_blocks": 2} | PAIR | SINGLE,
        "diffusion_module": {
            "atom_attn_enc": {"c_token": 128} | ATOMS,
            "atom_attn_dec": ATOMS,
            "diffusion_transformer": {"no_blocks": 2, "c_hidden": 32, "no_heads": 4},
        },
        "heads": {"pairformer_embedding": {"pairformer": {"no_blocks": 1} | PAIR | SINGLE}},
    },
}
LAST_PLACE = 2.0**-23
"""The relative change of one weight that shows how far rounding alone carries two runs apart."""
OFF, ON, CHANGED = "OpenFold3", "use_flashbias: true (dense)", "OpenFold3, one weight changed in its last place"


def main(
    structures: Annotated[Path, typer.Argument(help="Folder of PDB files of proteins.", exists=True, file_okay=False)],
    steps: Annotated[int, typer.Option(help="Training steps of each run.", min=2)] = 200,
    crop: Annotated[int, typer.Option(help="Residues of a training example.", min=17)] = 32,
    seed: Annotated[int, typer.Option(help="Of weights, examples and noise.")] = 0,
    processes: Annotated[int, typer.Option(help="Runs at the same time, one thread each.", min=1, max=3)] = 1,
    output: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "openfold3_training.json",
) -> None:
    """Loss curves of three runs that have weights, examples and noise in common."""
    chains = [chain for path in sorted(structures.glob("*.pdb")) for chain in read(path) if len(chain.query) >= crop]
    if not chains:
        raise ValueError(f"no protein chain of {crop} residues or more in the .pdb files of {structures}")
    examples = Examples(chains, crop, steps, seed)
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        started = {name: pool.submit(train, name, examples, seed) for name in (OFF, ON, CHANGED)}
        runs = {name: run.result() for name, run in started.items()}
    for name, losses in runs.items():
        print(f"{name}: loss {losses[0]:.4f} at first, {np.mean(losses[-len(losses) // 4 :]):.4f} in the last quarter")
    document = {
        "suite": "openfold3_training",
        "what": "tiny OpenFold3, Lightning fit in fp32 with OpenFold3's loss, optimiser, clipping and averaged weights",
        "structures": len(list(structures.glob("*.pdb"))),
        "chains": len(chains),
        "steps": steps,
        "crop": crop,
        "seed": seed,
        "losses": runs,
        "relative_difference": {name: differences(runs[name], runs[OFF]) for name in (ON, CHANGED)},
        **machine(),
    }
    write_atomically(output, json.dumps(document) + "\n")
    print(json.dumps(document["relative_difference"], indent=1))
    print(f"wrote {output}; draw it with scripts/plot_openfold3_training.py")


def read(path: Path) -> Iterator[Chain]:
    """Protein chains of a PDB file; atoms that are missing there count as not resolved."""
    structure = PDBFile.read(path).get_structure(model=1)
    known = [STANDARD_RESIDUES_WITH_GAP_3[index] for index in PROTEIN_TYPES]
    structure = structure[filter_amino_acids(structure) & np.isin(structure.res_name, known)]
    for chain in chain_iter(structure):
        residues = list(residue_iter(chain))
        query = torch.tensor([STANDARD_RESIDUES_WITH_GAP_3.index(residue.res_name[0]) for residue in residues])
        names = atom_names(query)
        ideal = [ideal_residue(residue.res_name[0]) for residue in residues]
        conformers, _ = zip(*map(_coordinates, ideal, names), strict=True)
        positions, resolved = zip(*map(_coordinates, residues, names), strict=True)
        yield Chain(query, query[None], torch.cat(conformers), torch.cat(positions), torch.cat(resolved))


def _coordinates(residue: AtomArray, names: list[str]) -> tuple[Tensor, Tensor]:
    """Positions ``[atoms, 3]`` of the named atoms, zero where one is missing, and which are there."""
    found = dict(zip(residue.atom_name, residue.coord, strict=True))
    positions = torch.tensor(np.array([found.get(name, np.zeros(3)) for name in names]), dtype=torch.float32)
    return positions, torch.tensor([float(name in found) for name in names])


class Examples(torch.utils.data.Dataset):
    """A crop of consecutive residues of a random chain for every step."""

    def __init__(self, chains: list[Chain], crop: int, steps: int, seed: int) -> None:
        self.chains, self.crop, self.steps, self.seed = chains, crop, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Features:
        rng = np.random.default_rng((self.seed, step))
        chain = self.chains[rng.integers(len(self.chains))]
        start = int(rng.integers(len(chain.query) - self.crop + 1))
        tokens = slice(start, start + self.crop)
        ends = np.cumsum([0, *map(len, atom_names(chain.query))])
        atoms = slice(ends[tokens.start], ends[tokens.stop])
        of_atoms = (x[atoms] for x in (chain.conformers, chain.positions, chain.resolved))
        features = chain_features(Chain(chain.query[tokens], chain.msa[:, tokens], *of_atoms), torch.device("cpu"))
        return features | {"pdb_id": ["crystal"], "preferred_chain_or_interface": ["A"]}


class Losses(pl.Callback):
    """Keeps the loss of every step, whose noise has a seed of its own."""

    def __init__(self, seed: int) -> None:
        self.seed, self.losses = seed, list[float]()

    def on_train_batch_start(self, *_: object) -> None:
        pl.seed_everything(self.seed + len(self.losses), verbose=False)

    def on_train_batch_end(self, _trainer: object, _module: object, outputs: Any, *_: object) -> None:
        self.losses.append(float(outputs["loss"]))


def train(name: str, examples: Examples, seed: int) -> list[float]:
    """Losses of one run of OpenFold3's Lightning module."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with flashbias_flag() if name == ON else nullcontext():
        custom = TINY | {"settings": TINY["settings"] | _memory(name == ON)}
        config = OF3ProjectEntry().get_model_config_with_update(ModelUpdate(presets=["train"], custom=custom))
        pl.seed_everything(seed, verbose=False)
        runner = OF3ProjectEntry().runner(config)
        if name == CHANGED:
            weight = runner.model.pairformer_stack.blocks[0].pair_stack.tri_att_start.linear_z.weight
            weight.data[0, 0] *= 1 + LAST_PLACE
        runner.on_train_epoch_start = runner.on_train_epoch_end = lambda: None  # these read a sampler of OpenFold3's
        watch = Losses(seed)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[watch],
        )
        trainer.fit(runner, torch.utils.data.DataLoader(examples, batch_size=None))
    swapped = sum(isinstance(module, PairBiasAttention) for module in runner.modules())
    assert bool(swapped) == (name == ON)
    return watch.losses


def _memory(on: bool) -> dict[str, Any]:
    return {"memory": {"train": {"use_flashbias": True, "flashbias": {"bias": "dense"}}}} if on else {}


def differences(found: list[float], expected: list[float]) -> dict[str, float]:
    """Largest relative difference of the losses of single steps up to a step, and that of the means at the end."""
    single = np.abs(np.array(found) - expected) / np.abs(expected)
    marks = [mark for mark in (1, 3, 10, 30, 100) if mark < len(single)]
    ends = [float(np.mean(losses[-len(losses) // 4 :])) for losses in (found, expected)]
    largest = {f"up to step {mark}": float(single[:mark].max()) for mark in [*marks, len(single)]}
    return largest | {"of the mean of the last quarter": abs(ends[0] - ends[1]) / abs(ends[1])}


if __name__ == "__main__":
    run_script(main)
