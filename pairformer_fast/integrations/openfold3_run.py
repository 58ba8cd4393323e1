"""``run_openfold`` with one more setting: attention of this package, in training, in evaluation, or in both.

In the runner YAML of OpenFold3, ``train`` and ``eval`` under ``model_update: custom: settings: memory:`` each take
``use_flashbias: true`` and, to change how, ``flashbias:`` with fields of
:class:`~pairformer_fast.config.AttentionConfig` (``bias``, ``rank``, ``tolerance``, ...). Training keeps the bias dense
unless told otherwise.

With ``bias: learned`` for both, factor networks are trained with the model, of ``rank`` or from the side file that
``factors`` names; such files are written beside the checkpoints, and ``factors`` under ``eval`` is what prediction
takes (:mod:`~pairformer_fast.integrations.openfold3_learned`).

Checkpoints are OpenFold3's own: they name no class of this package and load without it.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from openfold3.core.loss.loss_module import OpenFold3Loss
from openfold3.core.runners.writer import OF3OutputWriter
from openfold3.entry_points import experiment_runner
from openfold3.entry_points.experiment_runner import InferenceExperimentRunner
from openfold3.projects.of3_all_atom.config.inference_query_format import InferenceQuerySet
from openfold3.projects.of3_all_atom.config.model_config import model_config
from openfold3.projects.of3_all_atom.model import OpenFold3
from openfold3.projects.of3_all_atom.project_entry import OF3ProjectEntry
from openfold3.projects.of3_all_atom.runner import OpenFold3AllAtom
from openfold3.run_openfold import cli
from pydantic import ValidationError

from pairformer_fast.bias import FactorNetworks, FactorsError, factor_ranks
from pairformer_fast.config import AttentionConfig, BiasMethod
from pairformer_fast.inference.errors import InputError
from pairformer_fast.integrations.acceleration import Acceleration, explain, read_config
from pairformer_fast.integrations.openfold3 import plan
from pairformer_fast.integrations.openfold3_learned import add_networks, trained_networks
from pairformer_fast.integrations.openfold3_loss import swap_loss

logger = logging.getLogger(__name__)

FLAG, OPTIONS, FACTORS = "use_flashbias", "flashbias", "factors"
DEFAULTS = {"train": AttentionConfig(bias=BiasMethod.DENSE), "eval": AttentionConfig()}

_LONGEST = 500
"""Characters of a reason: OpenFold3 names every parameter that a checkpoint lacks."""
_FAILURE = re.compile(r"(?:Failed to process|query_id\(s\)) (\S+?)(?: with|[:.] )")


def run(arguments: Sequence[str]) -> dict[str, Exception]:
    """Run a command of ``run_openfold``, ``["predict", "--query-json", ...]``.

    Returns
    -------
    dict of str to Exception
        Why which queries failed; OpenFold3 logs it and exits with 0 all the same.

    Raises
    ------
    InputError
        If the runner YAML or the query JSON has settings that are unknown, missing or wrong, the checkpoint cannot be
        read or does not fit the model, or factor networks do not fit the checkpoint.
    SystemExit
        With the status of ``run_openfold`` where that is not 0.
    """
    with (
        flashbias_flag(),
        _known_settings(),
        _usable_checkpoints(),
        logged_failures() as reasons,
        _failed_queries() as failed,
    ):
        try:
            cli.main(args=list(arguments), prog_name="pairformer-fast openfold3")
        except SystemExit as done:
            if done.code:
                raise
        except ValidationError as error:
            file = "query JSON" if error.title == InferenceQuerySet.__name__ else "runner YAML"
            raise InputError(f"{file}: {explain(error)}") from error
        except yaml.YAMLError as error:
            raise InputError(f"runner YAML: {error}") from error
        except FactorsError as error:
            raise InputError(str(error)) from error
    unknown = RuntimeError("OpenFold3 counts it as failed; its log has the reason")
    return {query: reasons.get(query, unknown) for query in sorted(failed)}


@contextmanager
def flashbias_flag() -> Iterator[None]:
    """Within this context OpenFold3's model configuration has the flag, and models that are built honour it.

    Models that were built before, or from configurations without the flag, stay OpenFold3's own.
    """
    construct, forward, predict = OpenFold3.__init__, OpenFold3.forward, OpenFold3AllAtom.predict_step
    step = OpenFold3AllAtom.training_step

    def construct_with_flag(self: Any, config: Any) -> None:
        attention = Switch(config.settings.memory)
        construct(self, config)
        attention.add_networks(self)
        self._flashbias = attention

    def step_with_loss(self: Any, batch: dict[str, Any], batch_idx: int) -> Any:
        attention = getattr(self.model, "_flashbias", None)
        if attention is not None:
            attention.loss = self.loss
        return step(self, batch, batch_idx)

    def forward_with_flag(self: Any, batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        attention = getattr(self, "_flashbias", None)
        if attention is None:
            return forward(self, batch)
        attention.set(self)
        result = forward(self, batch)
        attention.log()
        return result

    def predict_if_trained(self: Any, *arguments: Any, **options: Any) -> Any:
        attention = getattr(self.model, "_flashbias", None)
        if attention is not None:
            attention.check_prediction()
        return predict(self, *arguments, **options)

    memory = model_config.settings.memory
    with model_config.unlocked():
        for mode, default in DEFAULTS.items():
            memory[mode][FLAG] = False
            memory[mode][OPTIONS] = default.model_dump(mode="json") | {FACTORS: None}
    # The class itself stays: its name is in the checkpoints.
    with_flag = _replaced(OpenFold3, __init__=construct_with_flag, forward=forward_with_flag)
    runner_with_flag = _replaced(OpenFold3AllAtom, training_step=step_with_loss, predict_step=predict_if_trained)
    try:
        with with_flag, runner_with_flag, trained_networks():
            yield
    finally:
        with model_config.unlocked():
            for mode in DEFAULTS:
                del memory[mode][FLAG], memory[mode][OPTIONS]


class Switch:
    """Swaps attention as a model goes from training to evaluation and back; OpenFold3 has settings for each.

    Parameters
    ----------
    memory : ConfigDict
        ``settings.memory`` of the model's configuration.

    Attributes
    ----------
    loss : OpenFold3Loss, optional
        Of the model, swapped with its attention.

    Raises
    ------
    InputError
        If the values under ``flashbias`` are wrong.
    """

    def __init__(self, memory: Any) -> None:
        read = {mode: _attention_config(memory, mode) for mode in DEFAULTS}
        self._wanted = {mode: config for mode, (config, _) in read.items()}
        self._files = {mode: file for mode, (_, file) in read.items()}
        self._networks: FactorNetworks | None = None
        self._mode: str | None = None
        self._acceleration: Acceleration | None = None
        self.loss: OpenFold3Loss | None = None
        if self._learned("train") and not self._learned("eval"):
            raise InputError(
                f"settings.memory.train.{OPTIONS} of the runner YAML: a model that is trained with bias 'learned' has "
                f"no dense bias; set {FLAG} and the same bias under eval"
            )

    def _learned(self, mode: str) -> bool:
        config = self._wanted[mode]
        return config is not None and config.bias is BiasMethod.LEARNED

    def add_networks(self, model: Any) -> None:
        """Give a model the factor networks that its settings ask for, if they do.

        Raises
        ------
        InputError
            If their side file cannot be used, or there is neither a file nor a rank.
        """
        if not self._learned("eval"):
            return
        mode = "train" if self._learned("train") else "eval"
        config, file = self._wanted[mode], self._files["train"] or self._files["eval"]
        assert config is not None
        where = f"settings.memory.{mode}.{OPTIONS} of the runner YAML"
        wanted = plan(model)
        try:
            if file is not None:
                self._networks = FactorNetworks.load(file)
                wanted.check(self._networks)
            elif mode == "train" and config.rank is not None:
                self._networks = wanted.factor_networks(config.rank)
                logger.info("flashbias: fresh factor networks of rank %d", config.rank)
        except (FactorsError, FileNotFoundError) as error:
            raise InputError(f"{where}: {error}") from error
        if self._networks is None:
            missing = "rank, of fresh networks, or " if mode == "train" else ""
            raise InputError(f"{where}: bias 'learned' needs {missing}{FACTORS}, the file of networks")
        add_networks(model, self._networks.requires_grad_(mode == "train"))

    def check_prediction(self) -> None:
        """Raise InputError if a prediction would take networks that were never trained."""
        if self._networks is not None and not any(self._files.values()):
            raise InputError(
                f"settings.memory.eval.{OPTIONS} of the runner YAML: prediction with bias 'learned' needs {FACTORS}, "
                "the file of networks"
            )

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
        networks = self._networks if self._learned(mode) else None
        self._acceleration = None if config is None else Acceleration(plan(model), config, networks)
        if self.loss is not None:
            swap_loss(self.loss, config)
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
            ranks = [rank for report in chosen for rank in factor_ranks(report["rank"], report["dense_heads"])]
            mean = f", mean rank {sum(ranks) / len(ranks):.1f}, largest probed error {worst:.3g}" if ranks else ""
            logger.info("flashbias: factors in %d of %d calls of attention%s", len(chosen), len(reports), mean)


def _attention_config(memory: Any, mode: str) -> tuple[AttentionConfig | None, Path | None]:
    """What attention is to be, None for the host's own, and the side file that is named; checked in either case."""
    if OPTIONS not in memory[mode]:
        return None, None
    options = memory[mode][OPTIONS].to_dict()
    file = options.pop(FACTORS, None)
    where = f"settings.memory.{mode}.{OPTIONS} of the runner YAML"
    config = read_config(options, where)
    if file is not None and config.bias is not BiasMethod.LEARNED:
        raise InputError(f"{where}: {FACTORS} is for bias 'learned', not '{config.bias}'")
    if not memory[mode].get(FLAG):
        return None, None
    return config, None if file is None else Path(file)


@contextmanager
def _known_settings() -> Iterator[None]:
    """Within this context settings that are not OpenFold3's are an error that names them."""
    update = OF3ProjectEntry.get_model_config_with_update

    def update_with_known(self: Any, model_update: Any) -> Any:
        try:
            return update(self, model_update)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            config = self.get_model_config_with_presets()
            reason = _wrong_setting(model_update.custom, config, "custom") or " ".join(map(str, error.args))
            raise InputError(f"runner YAML: model_update: {reason}") from error

    with _replaced(OF3ProjectEntry, get_model_config_with_update=update_with_known):
        yield


@contextmanager
def _usable_checkpoints() -> Iterator[None]:
    """Within this context a checkpoint that OpenFold3 cannot read or take is an error that names its file."""
    load, take = experiment_runner.load_checkpoint, InferenceExperimentRunner._load_state_dict_with_version_validation

    def load_readable(path: Path) -> dict:
        try:
            return load(path)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"checkpoint {path} cannot be read, is it complete? ({reason})") from error

    def take_fitting(self: Any, state_dict: dict[str, Any]) -> None:
        try:
            take(self, state_dict)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"checkpoint {self.ckpt_path} does not fit the model: {error}"[:_LONGEST]) from error

    taking = _replaced(InferenceExperimentRunner, _load_state_dict_with_version_validation=take_fitting)
    with _replaced(experiment_runner, load_checkpoint=load_readable), taking:
        yield


def _wrong_setting(given: Mapping[str, Any], config: Any, path: str) -> str | None:
    """What is wrong with the first of the given settings that the configuration has no place for."""
    for name, value in given.items():
        here = f"{path}.{name}"
        if name not in config:
            alike = get_close_matches(str(name), list(config), n=1)
            hint = f"did you mean {alike[0]}?" if alike else f"{path} has {', '.join(config)}"
            return f"there is no {here}; {hint}"
        if not isinstance(config[name], type(config)):
            continue
        if not isinstance(value, Mapping):
            return f"{here} must hold settings such as {next(iter(config[name]), 'none')}, but is {value!r}"
        if (wrong := _wrong_setting(value, config[name], here)) is not None:
            return wrong
    return None


@contextmanager
def logged_failures() -> Iterator[dict[str, Exception]]:
    """Exceptions of the queries that fail within this context: OpenFold3 catches them and logs them with the name."""
    failures: dict[str, Exception] = {}

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error, match = sys.exc_info()[1], _FAILURE.search(record.getMessage())
            if isinstance(error, Exception) and match is not None:
                failures[match[1]] = error.with_traceback(None)

    host, handler = logging.getLogger("openfold3"), Keep(logging.WARNING)
    host.addHandler(handler)
    try:
        yield failures
    finally:
        host.removeHandler(handler)


@contextmanager
def _failed_queries() -> Iterator[set[str]]:
    """Names of the queries that OpenFold3 counts as failed when it writes its summary."""
    failed: set[str] = set()
    write = OF3OutputWriter._write_summary

    def write_and_keep(self: Any, *arguments: Any, failed_list: list[str], **options: Any) -> None:
        failed.update(failed_list)
        write(self, *arguments, failed_list=failed_list, **options)

    with _replaced(OF3OutputWriter, _write_summary=write_and_keep):
        yield failed


@contextmanager
def _replaced(owner: Any, **members: Any) -> Iterator[None]:
    """Within this context members of a module or class of OpenFold3 are others."""
    kept = {name: getattr(owner, name) for name in members}
    for name, member in members.items():
        setattr(owner, name, member)
    try:
        yield
    finally:
        for name, member in kept.items():
            setattr(owner, name, member)
