"""``run_openfold`` with one more setting: attention of this package, in training, in evaluation, or in both.

In the runner YAML of OpenFold3, ``train`` and ``eval`` under ``model_update: custom: settings: memory:`` each take
``use_flashbias: true`` and, to change how, ``flashbias:`` with fields of
:class:`~pairformer_fast.config.AttentionConfig` (``bias``, ``rank``, ``tolerance``, ...). Training keeps the bias dense
unless told otherwise.

Checkpoints are OpenFold3's own: they name no class of this package and load without it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from openfold3.core.runners.writer import OF3OutputWriter
from openfold3.projects.of3_all_atom.config.model_config import model_config
from openfold3.projects.of3_all_atom.model import OpenFold3
from openfold3.run_openfold import cli
from pydantic import ValidationError

from pairformer_fast.config import AttentionConfig, BiasMethod
from pairformer_fast.inference.errors import InputError
from pairformer_fast.integrations.acceleration import Acceleration
from pairformer_fast.integrations.openfold3 import plan

logger = logging.getLogger(__name__)

FLAG, OPTIONS = "use_flashbias", "flashbias"
DEFAULTS = {"train": AttentionConfig(bias=BiasMethod.DENSE), "eval": AttentionConfig()}


def run(arguments: Sequence[str]) -> list[str]:
    """Run a command of ``run_openfold``, ``["predict", "--query-json", ...]``.

    Returns
    -------
    list of str
        Queries that failed; OpenFold3 logs the reasons and exits with 0 all the same.

    Raises
    ------
    InputError
        If the values under ``flashbias`` are wrong.
    SystemExit
        With the status of ``run_openfold`` where that is not 0.
    """
    with flashbias_flag(), _failed_queries() as failed:
        try:
            cli.main(args=list(arguments), prog_name="pairformer-fast openfold3")
        except SystemExit as done:
            if done.code:
                raise
    return sorted(failed)


@contextmanager
def flashbias_flag() -> Iterator[None]:
    """Within this context OpenFold3's model configuration has the flag, and models that are built honour it."""
    construct, forward = OpenFold3.__init__, OpenFold3.forward

    def construct_with_flag(self: Any, config: Any) -> None:
        attention = Switch(config.settings.memory)
        construct(self, config)
        self._flashbias = attention

    def forward_with_flag(self: Any, batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        self._flashbias.set(self)
        result = forward(self, batch)
        self._flashbias.log()
        return result

    memory = model_config.settings.memory
    with model_config.unlocked():
        for mode, default in DEFAULTS.items():
            memory[mode][FLAG] = False
            memory[mode][OPTIONS] = default.model_dump(mode="json")
    # The class itself stays: its name is in the checkpoints.
    OpenFold3.__init__, OpenFold3.forward = construct_with_flag, forward_with_flag
    try:
        yield
    finally:
        OpenFold3.__init__, OpenFold3.forward = construct, forward
        with model_config.unlocked():
            for mode in DEFAULTS:
                del memory[mode][FLAG], memory[mode][OPTIONS]


class Switch:
    """Swaps attention as a model goes from training to evaluation and back; OpenFold3 has settings for each.

    Parameters
    ----------
    memory : ConfigDict
        ``settings.memory`` of the model's configuration.

    Raises
    ------
    InputError
        If the values under ``flashbias`` are wrong.
    """

    def __init__(self, memory: Any) -> None:
        self._wanted = {mode: _attention_config(memory, mode) for mode in DEFAULTS}
        self._mode: str | None = None
        self._acceleration: Acceleration | None = None

    def set(self, model: Any) -> None:
        """Make the attention of ``model`` what its mode asks for.

        Called before every forward pass, since trainers change modes without calling ``train()``.
        """
        mode = "train" if model.training else "eval"
        if mode == self._mode:
            if self._acceleration is not None:
                self._acceleration.reset()
            return
        if self._acceleration is not None:
            self._acceleration.restore()
        config = self._wanted[mode]
        self._acceleration = None if config is None else Acceleration(plan(model), config)
        self._mode = mode

    def reports(self) -> list[dict[str, Any]]:
        """What became of each bias since the last :meth:`set`; empty where OpenFold3's own attention runs."""
        return [] if self._acceleration is None else self._acceleration.reports()

    def log(self) -> None:
        """Say once per evaluation what became of the bias."""
        reports = self.reports()
        if reports:
            chosen = [report for report in reports if report["choice"] == "factors"]
            worst = max((error for report in chosen for error in report["probed_max"] or ()), default=0.0)
            ranks = [rank for report in chosen for rank in report["rank"]]
            mean = f", mean rank {sum(ranks) / len(ranks):.1f}, largest probed error {worst:.3g}" if ranks else ""
            logger.info("flashbias: factors in %d of %d calls of attention%s", len(chosen), len(reports), mean)


def _attention_config(memory: Any, mode: str) -> AttentionConfig | None:
    if not memory[mode][FLAG]:
        return None
    try:
        return AttentionConfig.model_validate(memory[mode][OPTIONS].to_dict())
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors())
        raise InputError(f"settings.memory.{mode}.{OPTIONS} of the runner YAML: {wrong}") from None


@contextmanager
def _failed_queries() -> Iterator[set[str]]:
    """Names of the queries that OpenFold3 counts as failed when it writes its summary."""
    failed: set[str] = set()
    write = OF3OutputWriter._write_summary

    def write_and_keep(self: Any, *arguments: Any, failed_list: list[str], **options: Any) -> None:
        failed.update(failed_list)
        write(self, *arguments, failed_list=failed_list, **options)

    OF3OutputWriter._write_summary = write_and_keep
    try:
        yield failed
    finally:
        OF3OutputWriter._write_summary = write
