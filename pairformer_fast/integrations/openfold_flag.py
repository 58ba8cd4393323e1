"""A flag in the configuration of OpenFold for AlphaFold 2: models that are built with it run through this package.

``globals.use_flashbias`` turns it on, and ``globals.flashbias`` may hold fields of
:class:`~pairformer_fast.config.AttentionConfig` (``bias``, ``rank``, ``tolerance``, ...). They apply in evaluation; in
training the bias stays dense, since a decomposition passes it no gradient. Checkpoints are OpenFold's own.
"""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from openfold.config import config as openfold_config
from openfold.model.model import AlphaFold
from torch import nn

from pairformer_fast.config import AttentionConfig, BiasMethod
from pairformer_fast.inference.errors import InputError
from pairformer_fast.integrations.acceleration import Acceleration, read_config
from pairformer_fast.integrations.openfold import plan

FLAG, OPTIONS = "use_flashbias", "flashbias"


class FlaggedAcceleration(Acceleration):
    """A swap that keeps the bias dense while the model trains.

    Reports are those of the last forward pass of the model.

    Parameters
    ----------
    model : nn.Module
        The whole model.
    config : AttentionConfig
        What evaluation does.
    """

    def __init__(self, model: nn.Module, config: AttentionConfig) -> None:
        dense = config.model_copy(update={"bias": BiasMethod.DENSE, "rank": None})
        super().__init__(plan(model), dense)
        self._of_mode = {"train": dense, "eval": config}
        self._hook = model.register_forward_pre_hook(self._follow_mode)

    def restore(self) -> None:
        """Undo the swap, as of the base class."""
        self._hook.remove()
        super().restore()

    def _follow_mode(self, model: nn.Module, _arguments: tuple[Any, ...]) -> None:
        self.configure(self._of_mode["train" if model.training else "eval"])


def accelerate_as_configured(model: AlphaFold) -> Acceleration | None:
    """Accelerate a built ``AlphaFold`` if its configuration says so.

    Parameters
    ----------
    model : AlphaFold
        With ``use_flashbias: true`` under the ``globals`` of the configuration that it was built with, or without.

    Returns
    -------
    Acceleration or None
        What was swapped; collects the reports on the bias; undoes the swap. None if the flag is not set.

    Raises
    ------
    InputError
        If the flag is no bool or the values under ``flashbias`` are wrong; nothing is swapped then.

    Examples
    --------
    >>> config = model_config("model_1")  # doctest: +SKIP
    >>> config.globals.use_flashbias, config.globals.flashbias = True, {"bias": "svd", "rank": 32}  # doctest: +SKIP
    >>> acceleration = accelerate_as_configured(AlphaFold(config))  # doctest: +SKIP
    """
    config = _attention_config(model.globals)
    return None if config is None else FlaggedAcceleration(model, config)


@contextmanager
def flashbias_flag() -> Iterator[None]:
    """Within this context every ``AlphaFold`` that is built honours the flag, in OpenFold's own scripts too.

    OpenFold's configuration has the flag and the options there, so that ``--experiment_config_json`` can set
    ``globals.use_flashbias`` and ``globals.flashbias.rank``.

    Raises
    ------
    InputError
        When a model is built, as :func:`accelerate_as_configured`.

    Examples
    --------
    >>> with flashbias_flag():  # doctest: +SKIP
    ...     runpy.run_path("train_openfold.py", run_name="__main__")
    """
    construct, defaults = AlphaFold.__init__, openfold_config.globals

    def construct_with_flag(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        _attention_config(config.globals)
        construct(self, config, *arguments, **options)
        accelerate_as_configured(self)

    with openfold_config.unlocked():
        defaults[FLAG], defaults[OPTIONS] = False, AttentionConfig().model_dump(mode="json")
    # The class itself stays: its name is in what Lightning and pickle write.
    AlphaFold.__init__ = construct_with_flag
    try:
        yield
    finally:
        AlphaFold.__init__ = construct
        with openfold_config.unlocked():
            del defaults[FLAG], defaults[OPTIONS]


def _attention_config(settings: Any) -> AttentionConfig | None:
    """What ``globals`` ask for; None without the flag."""
    flag, options = settings.get(FLAG, False), settings.get(OPTIONS, {})
    if not isinstance(flag, bool):
        raise InputError(f"globals.{FLAG} must be true or false, but is {flag!r}")
    options = options.to_dict() if hasattr(options, "to_dict") else options
    if not isinstance(options, Mapping):
        raise InputError(f"globals.{OPTIONS} must hold fields such as bias and rank, but is {options!r}")
    config = read_config(options, f"globals.{OPTIONS} of OpenFold's configuration")
    if config.bias is BiasMethod.LEARNED:
        raise InputError(
            f"globals.{OPTIONS}: bias 'learned' is not for OpenFold, which takes no factor networks; choose another"
        )
    return config if flag else None
