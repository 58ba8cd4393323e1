"""What is trained, and its state on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pairformer_fast.bias import FactorNetworks, FactorsError, attach_factors, set_attention
from pairformer_fast.bias.learned import side_file
from pairformer_fast.config import BiasMethod
from pairformer_fast.model.checkpoint import save_checkpoint
from pairformer_fast.model.factors import HIDDEN, factor_networks, load_factors
from pairformer_fast.model.folding import FoldingModel
from pairformer_fast.training.origin import load_start, origin_facts
from pairformer_fast.training.settings import TrainAttention, TrainConfig
from pairformer_fast.training.state import read_state, write_state

RANK = 16
"""Default rank of factors that are trained with a model."""


@dataclass
class Averaged:
    """A module that is trained, and the moving average of its weights."""

    module: nn.Module
    average: AveragedModel

    @classmethod
    def of(cls, module: nn.Module, decay: float) -> Averaged:
        """With an average that starts at the first update."""
        return cls(module, AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay)))


@dataclass
class Run:
    """Everything that a resumed run needs to go on as if it had not stopped.

    Attributes
    ----------
    parts : dict of str to Averaged
        ``model``, and ``networks`` where factors are learned.
    optimizer : torch.optim.Optimizer
        Of all parts together.
    origin : dict, optional
        :func:`~pairformer_fast.training.origin.origin_facts` of the weights that the run started from.
    step : int
        Steps done.
    seconds : float
        Wall-clock time of them.
    """

    parts: dict[str, Averaged]
    optimizer: torch.optim.Optimizer
    origin: dict[str, Any] | None = None
    step: int = 0
    seconds: float = 0.0

    @classmethod
    def start(cls, config: TrainConfig, device: torch.device, origin: Path | None = None) -> Run:
        """Weights of a checkpoint, or fresh ones, as the global random state has them.

        Parameters
        ----------
        config : TrainConfig
        device : torch.device
        origin : Path, optional
            Checkpoint to start from. Where factors are learned, networks come from its side file if it has one.

        Raises
        ------
        FileNotFoundError, CheckpointError, FactorsError
            If the checkpoint or its side file cannot be read, or does not fit the settings.
        """
        settings = config.train
        model = FoldingModel(config.model)
        if origin is not None:
            load_start(model, origin, config.attention.bias)
        model.to(device)
        set_attention(model, config.attention.config)
        parts = {"model": Averaged.of(model, settings.ema_decay)}
        if config.attention.bias is BiasMethod.LEARNED:
            networks = Averaged.of(_networks(model, config.attention, origin).to(device), settings.ema_decay)
            attach_factors(model, cast(FactorNetworks, networks.module))
            attach_factors(parts["model"].average.module, cast(FactorNetworks, networks.average.module))
            parts["networks"] = networks
        optimizer = torch.optim.AdamW(
            [parameter for part in parts.values() for parameter in part.module.parameters()],
            lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay,
            fused=device.type == "cuda",
        )  # fmt: skip
        return cls(parts, optimizer, None if origin is None else origin_facts(origin, config.attention.bias))

    @property
    def model(self) -> FoldingModel:
        """What is trained."""
        return cast(FoldingModel, self.parts["model"].module)

    @property
    def averaged_model(self) -> FoldingModel:
        """With averaged weights, and averaged networks where factors are learned."""
        return cast(FoldingModel, self.parts["model"].average.module)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that is optimised."""
        return [parameter for part in self.parts.values() for parameter in part.module.parameters()]

    def average(self) -> None:
        """Take the present weights into the averages."""
        for part in self.parts.values():
            part.average.update_parameters(part.module)

    def save(self, path: Path) -> None:
        """Write the state whole or not at all."""
        state: dict[str, Any] = {name: part.module.state_dict() for name, part in self.parts.items()}
        state |= {_average_of(name): part.average.state_dict() for name, part in self.parts.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "step": self.step, "seconds": self.seconds}
        state |= {"origin": self.origin}
        write_state(path, state)

    def load(self, path: Path, device: torch.device) -> None:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            If the file cannot be read, one run has learned factors and the other a dense bias, their networks differ,
            or the runs started from different weights.
        """
        state = read_state(path, device)
        if state.get("origin") != self.origin:
            names = [facts["weights"] if facts else "fresh weights" for facts in (state.get("origin"), self.origin)]
            raise ValueError(
                f"{path} is of a run that started from {names[0]}, but this one starts from {names[1]}, or these have "
                "changed since: start from the same or change the output folder"
            )
        if ("networks" in state) != ("networks" in self.parts):
            bias = {True: "learned", False: "dense"}
            raise ValueError(
                f"{path} is of a run with attention.bias {bias['networks' in state]}, but the settings ask for "
                f"{bias['networks' in self.parts]}: change them or the output folder"
            )
        for name, part in self.parts.items():
            try:
                part.module.load_state_dict(state[name])
            except RuntimeError as error:
                message = f"{path} does not fit the settings of the {name}: change them or the output folder"
                raise ValueError(message) from error
            part.average.load_state_dict(state[_average_of(name)])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save_weights(self, path: Path, facts: dict[str, Any]) -> None:
        """Write averaged weights, and averaged networks beside them where factors are learned."""
        save_checkpoint(self.averaged_model, path, facts)
        if "networks" in self.parts:
            cast(FactorNetworks, self.parts["networks"].average.module).save(side_file(path), path, facts)


def _networks(model: FoldingModel, attention: TrainAttention, origin: Path | None) -> FactorNetworks:
    """Networks of the side file of ``origin`` if there is one, else fresh ones."""
    rank = RANK if attention.rank is None else attention.rank
    hidden = HIDDEN if attention.hidden is None else attention.hidden
    networks = factor_networks(model, rank, hidden=hidden, table=attention.table)
    if origin is None or not side_file(origin).is_file():
        return networks
    loaded = load_factors(side_file(origin), model, origin)
    for name, shape in networks.shapes.items():
        if loaded.shapes[name] != shape:
            raise FactorsError(
                f"{side_file(origin)} does not fit the settings: {name} has {loaded.shapes[name]} there and {shape} in "
                "the settings: change attention in the preset, or remove the file to start with fresh networks"
            )
    return loaded.requires_grad_(True).train()


def _average_of(name: str) -> str:
    return "average" if name == "model" else f"average_{name}"
