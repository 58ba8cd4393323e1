"""The swap of classes itself, whatever the host: done at once, undone exactly."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

from pydantic import ValidationError
from torch import nn

from pairformer_fast.bias import (
    Configured,
    FactorNetworks,
    FactorsError,
    MissingFactorNetworksError,
    NetworkShape,
    PairBiasAttention,
)
from pairformer_fast.bias.attention import Attached
from pairformer_fast.config import AttentionConfig, BiasMethod
from pairformer_fast.inference.errors import InputError
from pairformer_fast.model.factors import HIDDEN, core_path

CORE = "core"
"""Name of the :class:`~pairformer_fast.bias.PairBiasAttention` within the module that takes q, k and v to it."""


class NewClass(NamedTuple):
    """A module and the class it is to get."""

    module: nn.Module
    cls: type[nn.Module]


class Releases:
    """Mixed into a class that holds memory beside its modules."""

    def release(self) -> None:
        """Free it; the module works on."""
        raise NotImplementedError


class Target(NamedTuple):
    """One attention to swap.

    Attributes
    ----------
    path : str
        Within the model.
    classes : tuple of NewClass
        All modules that change together.
    holder : nn.Module
        Which of them gets the core.
    """

    path: str
    classes: tuple[NewClass, ...]
    holder: nn.Module


@dataclass(frozen=True)
class Skipped:
    """A module that looks like what is swapped and was left as it was.

    Attributes
    ----------
    path : str
        Within the model; empty for the model itself.
    cls : str
        Its class, with its module.
    reason : str
        Why.
    """

    path: str
    cls: str
    reason: str

    @classmethod
    def of(cls, path: str, module: nn.Module, reason: str) -> Skipped:
        """A module that is left as it is."""
        return cls(path, f"{type(module).__module__}.{type(module).__qualname__}", reason)


@dataclass(frozen=True)
class Plan:
    """What would be swapped in a model, and what not.

    Attributes
    ----------
    targets : sequence of Target
        Attention.
    skipped : sequence of Skipped
        What looks like it.
    around : mapping of str to NewClass
        Modules that hold attention or stand beside it and change with it, by their paths.
    learnable : mapping of str to tuple of int
        Features of a token and heads of the attention that factor networks can be for, by the path of its core.
    """

    targets: Sequence[Target]
    skipped: Sequence[Skipped]
    around: Mapping[str, NewClass] = field(default_factory=dict)
    learnable: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def factor_networks(self, rank: int, hidden: int = HIDDEN) -> FactorNetworks:
        """Fresh networks for all attention that can have one, on the CPU.

        Raises
        ------
        FactorsError
            If there is no such attention.
        """
        if not self.learnable:
            raise FactorsError("no attention here can take learned factors: they are for pair blocks of OpenFold3")
        shapes = {}
        for path, (channels, heads) in self.learnable.items():
            shapes[path] = NetworkShape(channels=channels, heads=heads, rank=rank, hidden=hidden)
        return FactorNetworks(shapes)

    def check(self, networks: FactorNetworks) -> None:
        """Raise FactorsError unless there is a network of the right size for all attention that can have one."""
        given = {path: (shape.channels, shape.heads) for path, shape in networks.shapes.items()}
        wrong = sorted(p for p in given.keys() | self.learnable.keys() if given.get(p) != self.learnable.get(p))
        if wrong:
            first = wrong[0]
            raise FactorsError(
                f"the factor networks do not fit the model at {len(wrong)} attentions; {first} has (features, heads) "
                f"{self.learnable.get(first, 'none')} in the model and {given.get(first, 'none')} in the networks"
            )


def sort_out(
    model: nn.Module,
    found: Iterable[tuple[str, nn.Module]],
    obstacle: Callable[[nn.Module], str | None],
    target: Callable[[str, nn.Module], Target],
    known: Iterable[type[nn.Module]],
) -> tuple[list[Target], list[Skipped]]:
    """What of the attention ``found`` in a model to swap, and what an ``obstacle`` keeps as it is.

    Raises
    ------
    ValueError
        If there is nothing to swap; the message names the ``known`` classes.
    """
    targets: list[Target] = []
    skipped: list[Skipped] = []
    for path, module in found:
        reason = obstacle(module)
        if reason is None:
            targets.append(target(path, module))
        else:
            skipped.append(Skipped.of(path, module, reason))
    if not targets:
        looked_for = ", ".join(cls.__name__ for cls in known)
        others = "".join(f"; {s.path or 'the model'} ({s.cls}): {s.reason}" for s in skipped[:3])
        raise ValueError(f"{type(model).__name__} has nothing to accelerate: looked for {looked_for}{others}")
    return targets, skipped


def looks_like_attention(module: nn.Module) -> bool:
    """Whether the name of its class says so."""
    return "attention" in type(module).__name__.lower()


def attention_owners(
    model: nn.Module, attention: type[nn.Module], others: tuple[type[nn.Module], ...] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a model that own a host's multi-head ``attention``, and what looks like them and holds no such module.

    ``others`` are classes that belong to the latter whatever their names.
    """

    def alike(module: nn.Module) -> bool:
        return isinstance(module, others) or looks_like_attention(module)

    for path, module in model.named_modules():
        if isinstance(module, (attention, PairBiasAttention)):
            continue
        owns = any(isinstance(child, attention) for child in module.children())
        if owns or (alike(module) and sum(map(alike, module.modules())) == 1):
            yield path, module


def instance_obstacle(module: nn.Module, holder: str = "mha") -> str | None:
    """What was done to this very attention, not to its class, that keeps it from being swapped; None if nothing.

    ``holder`` is the path within it of what is to get the core; empty for itself.
    """
    part = module.get_submodule(holder)
    if "forward" in vars(module) or "forward" in vars(part):
        return "its forward was replaced on the instance"
    if hasattr(part, CORE):
        return f"its {holder or 'module'} already has an attribute '{CORE}'"
    return None


def foreign_part(module: nn.Module, takes: Callable[[nn.Module], bool]) -> str | None:
    """Path of the first part of a module, itself included, that may compute something else; None if there is none.

    Weights are read here where a host calls its layers. What was put around a layer or in its place, such as an adapter
    of low rank, or a forward that was replaced on the instance, would have no effect.

    Parameters
    ----------
    module : nn.Module
    takes : callable
        Whether the operations here can stand for a part.
    """
    for path, part in module.named_modules():
        if "forward" in vars(part) or not takes(part):
            return path
    return None


def block_obstacle(
    block: nn.Module,
    path: str,
    parts: Mapping[str, type[nn.Module]],
    takes: Callable[[nn.Module], bool],
    swapped: Container[str],
) -> str | None:
    """Why the updates of a pair representation in a block cannot run here as a whole; None if they can.

    Parameters
    ----------
    block : nn.Module
    path : str
        Of the block within the model.
    parts : mapping of str to class
        What the block has to be made of.
    takes : callable
        As for :func:`foreign_part`.
    swapped : container of str
        Paths of the attention that is accelerated.
    """
    if "forward" in vars(block):
        return "its forward was replaced on the instance"
    for name, cls in parts.items():
        part = block.get_submodule(name)
        if type(part) is not cls:
            return f"its {name} is not {cls.__name__} but {type(part).__qualname__}"
        if (inner := foreign_part(part, takes)) is not None:
            return f"its {name}{inner and '.'}{inner} is not the host's own, or of a kind that is not known here"
    for name in ("tri_att_start", "tri_att_end"):
        if f"{path}.{name}".removeprefix(".") not in swapped:
            return f"its {name} is not accelerated"
    return None


def read_config(options: Mapping[str, Any], where: str) -> AttentionConfig:
    """What is set in a host's configuration, in which it stands at ``where``.

    Raises
    ------
    InputError
        If a field is unknown or its value is wrong.
    """
    try:
        return AttentionConfig.model_validate(options)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """Each wrong field, by its path, and what is wrong with it."""
    return "; ".join(": ".join(filter(None, [".".join(map(str, d["loc"])), d["msg"]])) for d in error.errors())


class Acceleration:
    """A swap that was done; as a context manager it is undone at the end.

    Attributes
    ----------
    swapped : tuple of str
        Paths of the accelerated attention modules within the model.
    around : tuple of str
        Paths of other modules that run here as a whole, such as the pair blocks and transitions of OpenFold3 and the
        triangle multiplications and transitions of OpenFold.
    skipped : tuple of Skipped
        What looks like one of them and still runs the host's code.
    """

    def __init__(self, plan: Plan, config: AttentionConfig, networks: FactorNetworks | None = None) -> None:
        if networks is not None:
            plan.check(networks)
        self._networks = networks
        self._check(config)
        self.swapped = tuple(target.path for target in plan.targets)
        self.around = tuple(plan.around)
        self.skipped = tuple(plan.skipped)
        self._cores: dict[str, PairBiasAttention] = {}
        changes = [change for target in plan.targets for change in target.classes] + list(plan.around.values())
        self._undo = [NewClass(module, type(module)) for module, _ in changes]
        self._holders = [target.holder for target in plan.targets]
        for target in plan.targets:
            core = PairBiasAttention().train(target.holder.training)
            if networks is not None and core_path(target.path) in plan.learnable:
                core.attached = Attached(networks[core_path(target.path)])
            target.holder.add_module(CORE, core)
            self._cores[target.path] = core
        for module, cls in changes:
            module.__class__ = cls
        self._parts = [module for module, _ in changes if isinstance(module, Configured)]
        self.configure(config)

    def __repr__(self) -> str:
        return f"Acceleration({len(self.swapped)} swapped, {len(self.skipped)} skipped)"

    def configure(self, config: AttentionConfig) -> None:
        """Compute as ``config`` says from now on, and forget the reports.

        With learned factors, attention that has no network keeps its dense bias.

        Raises
        ------
        MissingFactorNetworksError
            A ValueError: the bias is to be learned, and there are no networks.
        """
        self._check(config)
        dense = config.model_copy(update={"bias": BiasMethod.DENSE, "rank": None})
        for core in self._cores.values():
            core.config = dense if config.bias is BiasMethod.LEARNED and core.attached is None else config
        for part in self._parts:
            part.config = config
        self.reset()

    def _check(self, config: AttentionConfig) -> None:
        if config.bias is BiasMethod.LEARNED and self._networks is None:
            raise MissingFactorNetworksError(
                "bias 'learned' needs factor networks: accelerate(model, config, factors=...) takes them or their file"
            )

    def reports(self) -> list[dict[str, Any]]:
        """What became of the bias in each call in evaluation mode since the last :meth:`reset`, JSON-ready.

        Beside the fields of :class:`~pairformer_fast.bias.BiasReport` each has ``name``, the path of the attention
        module within the model. Reports add up over calls: reset between predictions.
        """
        return [{"name": path, **asdict(report)} for path, core in self._cores.items() for report in core.report]

    def reset(self) -> None:
        """Forget the reports."""
        for core in self._cores.values():
            core.reset()

    def restore(self) -> None:
        """Give every module the class it had, and take the cores out again; nothing happens the second time."""
        for part in self._parts:
            del part.config
        for module, cls in self._undo:
            if isinstance(module, Releases):
                module.release()
            module.__class__ = cls
        for holder in self._holders:
            delattr(holder, CORE)
        self._parts.clear()
        self._undo.clear()
        self._holders.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()
