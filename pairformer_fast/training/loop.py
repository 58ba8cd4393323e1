"""One training run: one process a GPU, resumable after a kill at any moment."""

from __future__ import annotations

import itertools
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader

from pairformer_fast.bias import set_attention
from pairformer_fast.config import AttentionConfig, Backend
from pairformer_fast.training.dataset import AntibodyDataset, Augmentation, Batch, MixtureSampler, collate
from pairformer_fast.training.evaluate import evaluate
from pairformer_fast.training.losses import term_scales, term_weights
from pairformer_fast.training.origin import gpu_seconds
from pairformer_fast.training.run import Run
from pairformer_fast.training.settings import TrainConfig, TrainSettings
from pairformer_fast.training.state import append_row
from pairformer_fast.training.step import GradientStep

STATE_FILE = "state.pt"
LOG_FILE = "log.jsonl"
WEIGHTS_FILE = "model.safetensors"
HOLD_OUTS = ("val", "crystal")
EVALUATED = 5
"""Structures folded together at the end of a run."""


def train(
    config: TrainConfig, data: Path, folder: Path, minutes: float | None = None, origin: Path | None = None
) -> bool:
    """Train, or go on with the run in ``folder``.

    Parameters
    ----------
    config : TrainConfig
        Model and settings.
    data : Path
        Shards that ``scripts/prepare_antibody_data.py`` wrote.
    folder : Path
        State, log and weights; made if needed.
    minutes : float, optional
        Stop after so long, with the state saved.
    origin : Path, optional
        Weights to start from, see :meth:`Run.start`; fresh ones if omitted.

    Returns
    -------
    bool
        Whether the last step was reached.

    Raises
    ------
    FileNotFoundError
        If ``data`` lacks a split, or there is no file ``origin``; nothing has been written then.
    ValueError
        If the run in ``folder`` is of another kind, such as with a dense bias instead of learned factors, or started
        from other weights; if ``origin`` does not fit the settings, which also leaves nothing written.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        return _train(config, data, folder, minutes, origin, device, rank, world)
    finally:
        if world > 1:
            distributed.destroy_process_group()


def _train(
    config: TrainConfig,
    data: Path,
    folder: Path,
    minutes: float | None,
    origin: Path | None,
    device: torch.device,
    rank: int,
    world: int,
) -> bool:
    settings = config.train
    dataset, *held_out = (AntibodyDataset(data, split) for split in ("train", *HOLD_OUTS))
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    run = Run.start(config, device, origin)
    if (folder / STATE_FILE).is_file():
        run.load(folder / STATE_FILE, device)
    before = run.seconds
    gradients = GradientStep(run.model, run.parameters)
    augmentation = Augmentation(settings.heavy_only, settings.light_only, settings.swapped)
    sampler = MixtureSampler(
        dataset, settings.mixture, settings.batch_size, settings.seed, augmentation, rank, world, start=run.step
    )
    folder.mkdir(parents=True, exist_ok=True)
    pad = partial(collate, lengths=settings.padded_lengths)
    batches = DataLoader(dataset, batch_sampler=sampler, collate_fn=pad, num_workers=1)
    with _progress(rank) as progress:
        task = progress.add_task("training", total=settings.steps, completed=run.step, loss="")
        for batch in itertools.islice(batches, settings.steps - run.step):
            losses = _step(run, gradients, batch, settings, rank)
            run.step += 1
            run.seconds = before + time.monotonic() - started
            out_of_time = _agree(minutes is not None and time.monotonic() - started > 60 * minutes, device, world)
            if run.step % settings.log_every == 0:
                numbers = {name: round(float(value), 4) for name, value in losses.items()}
                progress.update(task, completed=run.step, loss=f"loss {numbers['total']:.3f}")
                if rank == 0:
                    facts = {"step": run.step, "seconds": round(run.seconds, 1), "gpus": world}
                    append_row(folder / LOG_FILE, facts | numbers)
            if rank == 0 and (out_of_time or run.step % settings.save_every == 0 or run.step == settings.steps):
                run.save(folder / STATE_FILE)
            if out_of_time:
                break
    if rank == 0:
        _finish(run, config, held_out, folder, device, world)
    return run.step >= settings.steps


def _step(run: Run, gradients: GradientStep, batch: Batch, settings: TrainSettings, rank: int) -> dict[str, Tensor]:
    """One optimiser step. Noise depends on the seed, the step and the rank only, so a resumed run repeats it."""
    torch.manual_seed(settings.seed * 1_000_003 + run.step * 1009 + rank)
    recycles = int(torch.randint(settings.max_recycles + 1, (), generator=torch.Generator().manual_seed(run.step)))
    for group in run.optimizer.param_groups:
        group["lr"] = settings.learning_rate * schedule(run.step, settings)
    run.model.train()
    progress = settings.loss_from + (1 - settings.loss_from) * run.step / settings.steps
    losses = gradients(batch, recycles, term_weights(progress) * term_scales(settings.loss_scale))
    norm = nn.utils.clip_grad_norm_(run.parameters, settings.gradient_norm)
    if norm.isfinite():
        run.optimizer.step()
        run.average()
    return {**losses, "gradient_norm": norm}


def schedule(step: int, settings: TrainSettings) -> float:
    """Share of the peak learning rate: linear warm-up, constant, linear fall to zero."""
    warm = min(1.0, (step + 1) / max(settings.warmup, 1))
    done = step / settings.steps
    return warm * min(1.0, (1 - done) / max(1 - settings.decay_from, 1e-9))


def _agree(stop: bool, device: torch.device, world: int) -> bool:
    """Whether any process wants to stop."""
    if world == 1:
        return stop
    flag = torch.tensor(float(stop), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


def _finish(
    run: Run, config: TrainConfig, held_out: list[AntibodyDataset], folder: Path, device: torch.device, world: int
) -> None:
    """Write the averaged weights and measure them on the hold-outs."""
    model = run.averaged_model.eval()
    set_attention(model, AttentionConfig(backend=Backend.REFERENCE, bias=config.attention.bias))
    facts: dict[str, Any] = {
        "step": run.step,
        "seconds": round(run.seconds, 1),
        "gpus": world,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "train": config.train.model_dump(),
        "attention": config.attention.model_dump(mode="json"),
        "origin": run.origin,
    }
    facts["gpu_seconds"] = round(gpu_seconds(facts), 1)
    run.save_weights(folder / WEIGHTS_FILE, facts)
    summaries = (evaluate(model, dataset, device, batch_size=EVALUATED).summary() for dataset in held_out)
    results = dict(zip(HOLD_OUTS, summaries, strict=True))
    append_row(folder / LOG_FILE, {**facts, "evaluation": results})
    Console(stderr=True).print_json(data=results)


def _progress(rank: int) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[loss]}"), console=Console(stderr=True), disable=rank != 0)
