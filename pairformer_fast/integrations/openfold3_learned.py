"""Training of factor networks with OpenFold3's own runner: its optimiser, clipping, averages and checkpoints.

The optimiser finds the networks among the parameters of the model, whose ``state_dict`` knows nothing of them. They are
averaged with the decay of OpenFold3's own averages, and as OpenFold3 validates, predicts and starts from averaged
weights, the averages are what validation uses and what the side file has that is written beside each checkpoint. To go
on with training exactly, a checkpoint also holds both under :data:`ENTRY`, as plain tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from openfold3.core.utils.exponential_moving_average import ExponentialMovingAverage
from openfold3.projects.of3_all_atom.runner import OpenFold3AllAtom
from torch import Tensor, nn

from pairformer_fast.bias import FactorNetworks, FactorsError
from pairformer_fast.bias.learned import side_file
from pairformer_fast.model.factors import CORE

logger = logging.getLogger(__name__)

NAME = "flashbias_networks"
"""Of the module in the model that holds the parameters."""

ENTRY = "flashbias_networks"
"""Of a checkpoint."""

CONFIDENCE = "aux_heads."
"""Start of the paths of attention that some samples give no gradient."""


class SideParameters(nn.Module):
    """Parameters of factor networks, part of a model but not of its ``state_dict``.

    Attributes
    ----------
    networks : FactorNetworks
    trained : bool
        Whether they were made to be trained; others are frozen.
    """

    def __init__(self, networks: FactorNetworks) -> None:
        super().__init__()
        self._networks = (networks,)  # in a tuple, it is no submodule
        self.trained = any(parameter.requires_grad for parameter in networks.parameters())
        for name, parameter in networks.named_parameters():
            self.register_parameter(_flat(name), parameter)

    @property
    def networks(self) -> FactorNetworks:
        return self._networks[0]

    def of_confidence(self) -> set[str]:
        """Names of the parameters for attention of the confidence heads."""
        paths = [path for path in self.networks if path.startswith(CONFIDENCE)]
        own = {id(parameter) for path in paths for parameter in self.networks[path].parameters()}
        return {name for name, parameter in self.named_parameters() if id(parameter) in own}

    def _save_to_state_dict(self, *_: Any) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


def add_networks(model: nn.Module, networks: FactorNetworks) -> None:
    """Make the parameters of networks those of a model; if they are trained, projections to dense biases are frozen."""
    added = SideParameters(networks)
    model.add_module(NAME, added)
    if added.trained:
        _freeze_projections(model, networks)


def _freeze_projections(model: nn.Module, networks: FactorNetworks) -> None:
    """Those to dense biases get no gradient, and with several GPUs a parameter without gradient is an error."""
    for path in networks:
        attention = model.get_submodule(path.removesuffix(f".{CORE}"))
        attention.get_submodule("linear_z").requires_grad_(False)


def networks_in_training(model: nn.Module) -> SideParameters | None:
    """What :func:`add_networks` added to a model to be trained; None if it did not."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, SideParameters) and found.trained else None


class FactorTraining(pl.Callback):
    """Averages, checkpoints and side files of the networks of a model in training.

    Parameters
    ----------
    networks : FactorNetworks
    decay : float
        Of the averages.
    """

    def __init__(self, networks: FactorNetworks, decay: float) -> None:
        self._networks = networks
        self._averages = ExponentialMovingAverage(networks, decay)
        self._trained: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin with averages of the present weights, unless a checkpoint gave some, and write side files."""
        if not self._averages.params:
            self._averages.init_params(self._networks)
        self._averages.to(next(self._networks.parameters()).device)
        save, remove = trainer.save_checkpoint, trainer.strategy.remove_checkpoint

        def save_both(filepath: str | Path, *arguments: Any, **options: Any) -> None:
            save(filepath, *arguments, **options)
            if trainer.is_global_zero:
                facts = {"checkpoint": Path(filepath).name, "step": trainer.global_step}
                self.averaged().save(side_file(filepath), metadata=facts)

        def remove_both(filepath: str | Path) -> None:
            remove(filepath)
            if trainer.is_global_zero:
                side_file(filepath).unlink(missing_ok=True)

        trainer.save_checkpoint, trainer.strategy.remove_checkpoint = save_both, remove_both

    def averaged(self) -> FactorNetworks:
        """The averages, as networks."""
        networks = FactorNetworks(self._networks.shapes)
        networks.load_state_dict(self._averages.params)
        return networks

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the averages where OpenFold3 updates its own."""
        if pl_module._is_opt_step_ready(batch_idx):
            self._averages.update(self._networks)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Validate with the averages."""
        if self._averages.params:
            self._trained = {name: value.detach().clone() for name, value in self._networks.state_dict().items()}
            self._networks.load_state_dict(self._averages.params)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Go back to the weights in training."""
        if self._trained is not None:
            self._networks.load_state_dict(self._trained)
            self._trained = None

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add weights and averages."""
        checkpoint[ENTRY] = {"weights": dict(self._networks.state_dict()), "averages": dict(self._averages.params)}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take weights and averages from a checkpoint that has them.

        Raises
        ------
        FactorsError
            If they are for other networks.
        """
        if ENTRY not in checkpoint:
            logger.warning("flashbias: the checkpoint has no factor networks; training goes on with those given")
            return
        try:
            self._networks.load_state_dict(checkpoint[ENTRY]["weights"])
        except RuntimeError as error:
            first = " ".join(str(error).splitlines()[:2])
            raise FactorsError(f"the factor networks of the checkpoint are others (rank, width?): {first}") from error
        self._averages.params = {name: value.clone() for name, value in checkpoint[ENTRY]["averages"].items()}


@contextmanager
def trained_networks() -> Iterator[None]:
    """Within this context OpenFold3's runner trains the networks of its model."""
    callbacks, confidence = OpenFold3AllAtom.configure_callbacks, OpenFold3AllAtom._identify_confidence_params
    freeze = OpenFold3AllAtom._freeze_model_params

    def configure_callbacks(self: Any) -> list[Any]:
        added = networks_in_training(self.model)
        own = [] if added is None else [FactorTraining(added.networks, self.config.settings.ema.decay)]
        return [*callbacks(self), *own]

    def identify_confidence_params(self: Any) -> None:
        confidence(self)
        added = networks_in_training(self.model)
        if added is not None:
            self.confidence_param_names |= {f"{NAME}.{name}" for name in added.of_confidence()}

    def freeze_model_params(self: Any, exempt_submodule: list[nn.Module]) -> None:
        """In training of confidence alone, its networks are trained."""
        freeze(self, exempt_submodule)
        added = networks_in_training(self.model)
        if added is not None:
            _freeze_projections(self.model, added.networks)
            for path in added.networks:
                added.networks[path].requires_grad_(path.startswith(CONFIDENCE))

    with (
        _replaced("configure_callbacks", configure_callbacks),
        _replaced("_identify_confidence_params", identify_confidence_params),
        _replaced("_freeze_model_params", freeze_model_params),
    ):
        yield


@contextmanager
def _replaced(name: str, method: Callable[..., Any]) -> Iterator[None]:
    """A method of OpenFold3's runner."""
    inherited = name not in vars(OpenFold3AllAtom)
    before = getattr(OpenFold3AllAtom, name)
    setattr(OpenFold3AllAtom, name, method)
    try:
        yield
    finally:
        if inherited:
            delattr(OpenFold3AllAtom, name)
        else:
            setattr(OpenFold3AllAtom, name, before)


def _flat(name: str) -> str:
    """Name of a parameter, which may not hold dots."""
    return name.replace(".", ":")
