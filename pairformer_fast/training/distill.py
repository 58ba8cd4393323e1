"""Factor networks fitted to the dense biases of a model that stays as it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from pairformer_fast.bias import FactorNetworks, relative_position, set_attention
from pairformer_fast.bias.learned import SUFFIX, sha256
from pairformer_fast.bias.toeplitz import toeplitz
from pairformer_fast.config import AttentionConfig, BiasMethod, Frozen
from pairformer_fast.features import TokenFeatures
from pairformer_fast.kernels.flash_bias import Factors
from pairformer_fast.model.checkpoint import load_checkpoint, trained_with_factors
from pairformer_fast.model.factors import HIDDEN, factor_networks
from pairformer_fast.model.folding import FoldingModel
from pairformer_fast.model.observe import Observed, observing, probed_errors
from pairformer_fast.training.dataset import AntibodyDataset, MixtureSampler, collate
from pairformer_fast.training.state import append_row, read_state, write_state

STATE_FILE = "distill_state.pt"
LOG_FILE = "distill.jsonl"
HELD_OUT = "val"
ROWS = 8
"""Rows of triangle attention whose weights say where a bias matters."""


class DistillSettings(Frozen):
    """Networks and optimisation.

    Attributes
    ----------
    rank, hidden, table : int
        Of the networks, see :class:`~pairformer_fast.bias.NetworkShape`; ``table`` None leaves the table out.
    steps, batch_size : int
        Batches of so many chains, drawn evenly from the training split.
    learning_rate : float
        Of the first step; it falls linearly to zero.
    within : float, optional
        Minutes after which the fit is over though steps are left; the rate falls over them if they end first.
    gradient_norm : float
        Norm that gradients are clipped to.
    held_out : int
        Structures of the validation split that errors are probed on.
    log_every, save_every : int
        Steps between rows of the log, and between saved states.
    """

    rank: int = Field(default=32, ge=1)
    hidden: int = Field(default=HIDDEN, ge=1)
    table: int | None = Field(default=32, ge=1)
    steps: int = Field(default=2000, ge=1)
    batch_size: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    within: float | None = Field(default=None, gt=0)
    gradient_norm: float = Field(default=1.0, gt=0)
    seed: int = 0
    held_out: int = Field(default=8, ge=1)
    log_every: int = Field(default=20, ge=1)
    save_every: int = Field(default=200, ge=1)


@dataclass
class _State:
    """What a resumed fit needs to go on as if it had not stopped."""

    networks: FactorNetworks
    optimizer: torch.optim.Optimizer
    identity: dict[str, Any]
    step: int = 0
    seconds: float = 0.0
    before: dict[str, float] | None = None

    def done(self, settings: DistillSettings) -> float:
        """Share of the fit that is over, by steps or by time."""
        by_time = 0.0 if settings.within is None else self.seconds / (60 * settings.within)
        return min(1.0, max(self.step / settings.steps, by_time))

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {"networks": self.networks.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"identity": self.identity, "step": self.step, "seconds": self.seconds, "before": self.before}
        write_state(path, state)

    def load(self, path: Path, device: torch.device) -> None:
        state = read_state(path, device)
        if state.get("identity") != self.identity:
            raise ValueError(f"{path} is of other weights or settings: change them or the output folder")
        self.networks.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.before = state["step"], state["seconds"], state["before"]


def distill(
    checkpoint: Path, data: Path, folder: Path, settings: DistillSettings, minutes: float | None = None
) -> Path | None:
    """Fit networks to a checkpoint's biases, or go on with the fit in ``folder``.

    Parameters
    ----------
    checkpoint : Path
        Weights, which stay as they are.
    data : Path
        Shards that ``scripts/prepare_antibody_data.py`` wrote.
    folder : Path
        State, log and side file; made if needed.
    settings : DistillSettings
    minutes : float, optional
        Stop after so long, with the state saved.

    Returns
    -------
    Path or None
        The side file; None if the fit is not over.

    Raises
    ------
    FileNotFoundError
        If the checkpoint or a split is missing; nothing has been written then.
    ValueError
        If the model has no dense bias, or the fit in ``folder`` is another one.
    """
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_checkpoint(checkpoint).requires_grad_(False).to(device)
    if trained_with_factors(checkpoint):
        raise ValueError(f"{checkpoint} was trained with learned factors: it has no dense bias to fit networks to")
    dataset, held_out = AntibodyDataset(data, "train"), AntibodyDataset(data, HELD_OUT)
    shares = {source: float(dataset.sources.count(source)) for source in set(dataset.sources)}
    sampler = MixtureSampler(dataset, shares, settings.batch_size, settings.seed)
    torch.manual_seed(settings.seed)
    networks = factor_networks(model, settings.rank, hidden=settings.hidden, table=settings.table).to(device)
    optimizer = torch.optim.Adam(networks.parameters(), lr=settings.learning_rate)
    state = _State(networks, optimizer, {"checkpoint": sha256(checkpoint), "settings": settings.model_dump()})
    if (folder / STATE_FILE).is_file():
        state.load(folder / STATE_FILE, device)
    folder.mkdir(parents=True, exist_ok=True)
    if state.before is None:
        state.before = held_out_errors(model, networks, held_out, settings.held_out)
    earlier = state.seconds
    while state.done(settings) < 1:
        batch = collate([dataset[draw] for draw in sampler.batch(state.step)]).to(device)
        loss = _fit(model, state, batch.features, settings)
        state.step += 1
        state.seconds = earlier + time.monotonic() - started
        over = state.done(settings) == 1
        out_of_time = minutes is not None and time.monotonic() - started > 60 * minutes
        if state.step % settings.log_every == 0:
            append_row(folder / LOG_FILE, {"step": state.step, "loss": round(loss, 5)})
        if out_of_time or over or state.step % settings.save_every == 0:
            state.save(folder / STATE_FILE)
        if out_of_time and not over:
            return None
    after = held_out_errors(model, networks, held_out, settings.held_out)
    facts = {"settings": settings.model_dump(), "step": state.step, "before": state.before, "after": after}
    side = folder / f"{checkpoint.stem}{SUFFIX}"
    networks.save(side, checkpoint, facts)
    append_row(folder / LOG_FILE, facts)
    return side


def held_out_errors(
    model: FoldingModel, networks: FactorNetworks, held_out: AntibodyDataset, count: int
) -> dict[str, float]:
    """Mean of :func:`~pairformer_fast.model.observe.probed_errors` over ``count`` structures, evenly spread."""
    set_attention(model, AttentionConfig(bias=BiasMethod.DENSE))
    device = next(networks.parameters()).device
    chosen: Sequence[int] = range(0, len(held_out), max(1, len(held_out) // count))[:count]
    found = [probed_errors(model, networks, collate([held_out[index]]).to(device).features) for index in chosen]
    return {path: round(fmean(errors[path] for errors in found), 5) for path in networks}


def _fit(model: FoldingModel, state: _State, features: TokenFeatures, settings: DistillSettings) -> float:
    """One optimiser step on every pass of a batch; the mean loss of the attentions."""
    first = state.step == 0
    set_attention(model, AttentionConfig(bias=BiasMethod.DENSE))
    state.optimizer.zero_grad()
    losses: list[Tensor] = []
    fresh = set(state.networks) if first else set()

    def visit(seen: Observed) -> None:
        network = state.networks[seen.path]
        if seen.path in fresh and network.table is not None and settings.table is not None:
            network.table.copy_(relative_position(seen.bias.float(), settings.table, seen.mask).table)
        fresh.discard(seen.path)
        with torch.enable_grad(), torch.autocast(seen.bias.device.type, enabled=False):
            loss = attended_error(network(seen.tokens, seen.keep, torch.float32), seen)
            loss.backward()
        losses.append(loss.detach())

    with (
        torch.no_grad(),
        torch.autocast(features.mask.device.type, torch.bfloat16, enabled=features.mask.is_cuda),
        observing(model, visit),
    ):
        model(features)
    for group in state.optimizer.param_groups:
        group["lr"] = settings.learning_rate * (1 - state.done(settings))
    nn.utils.clip_grad_norm_(state.networks.parameters(), settings.gradient_norm)
    state.optimizer.step()
    return float(torch.stack(losses).mean())


def attended_error(factors: Factors, seen: Observed) -> Tensor:
    r"""Squared error of the bias where attention looks.

    Let w be the attention weights of a query with the dense bias, and d the error of its logits. Softmax ignores a
    constant, so d counts less its mean under w; what is left, \sum_j w_j (d_j - \bar d)^2, is to second order twice the
    Kullback-Leibler divergence of the new weights. Weights are means over some rows of triangle attention.

    Returns
    -------
    Tensor
        Scalar, mean over heads and kept queries.
    """
    q, k, mask = seen.q.float(), seen.k.float(), seen.mask
    if q.ndim == 4:
        q, k, mask = q.unsqueeze(1), k.unsqueeze(1), mask.unsqueeze(1)
    bias = seen.bias.float()
    step = -(-q.shape[1] // ROWS)
    total, count = torch.zeros_like(bias), bias.new_zeros(len(bias))
    for row in range(0, q.shape[1], step):
        logits = torch.einsum("bqhd,bkhd->bhqk", q[:, row], k[:, row]) * q.shape[-1] ** -0.5 + bias
        dropped = ~mask[:, row, None, None]
        some = mask[:, row].any(-1)
        weights = logits.masked_fill(dropped, torch.finfo(logits.dtype).min).softmax(-1).masked_fill(dropped, 0)
        total, count = total + weights, count + some
    weights = total / count.clamp(min=1)[:, None, None, None]
    error = factors.phi_q @ factors.phi_k.mT - bias
    if factors.table is not None:
        error = error + toeplitz(factors.table, bias.shape[-1])
    error = error - (weights * error).sum(-1, keepdim=True)
    per_query = (weights * error.square()).sum(-1).masked_fill(~seen.keep[:, None], 0)
    return per_query.sum() / (seen.keep.sum() * bias.shape[1]).clamp(min=1)
