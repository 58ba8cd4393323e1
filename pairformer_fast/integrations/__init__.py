"""Acceleration of models of other packages, in place: one module per host package."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from torch import nn

from pairformer_fast.bias import FactorNetworks
from pairformer_fast.config import AttentionConfig
from pairformer_fast.integrations.acceleration import Acceleration, Plan, Skipped
from pairformer_fast.model.factors import HIDDEN

__all__ = ["Acceleration", "Skipped", "accelerate", "factor_networks"]

_HOSTS = ("openfold3", "openfold", "boltz", "protenix")
"""Top-level packages; the module here that knows one has its name."""


def accelerate(
    model: nn.Module, config: AttentionConfig | None = None, factors: FactorNetworks | str | Path | None = None
) -> Acceleration:
    """Let the attention of a built model of another package run through this one, in place.

    Only classes change: parameter objects, ``state_dict`` keys, hooks, and hence optimisers, averaged weights and
    checkpoints stay as they are. The pair blocks and SwiGLU transitions of OpenFold3, the pair updates of Boltz and
    Protenix and OpenFold's triangle multiplications and transitions run this package's operations as a whole, so hooks
    on their parts are not called; everything else of the host is left alone. Where a layer in one of them is not the
    host's own, such as an adapter of low rank or a forward replaced on the instance, the host's code runs around the
    attention, and :attr:`Acceleration.skipped` says so; in a transition of OpenFold3 a hook on a layer is such a
    change, too. Accelerate after such changes, and before ``torch.compile``.

    Parameters
    ----------
    model : nn.Module
        A model of OpenFold3 0.5 (``openfold3``), of OpenFold for AlphaFold 2 (``openfold``), of Boltz 1 or 2
        (``boltz``) or of Protenix (``protenix``), or any part of one that holds attention with a pair bias: a block, a
        stack, a wrapper around the model.
    config : AttentionConfig, optional
        How to compute attention, and what becomes of the pair bias; ``AttentionConfig()`` if omitted. A
        decomposition passes no gradient to the bias: training needs ``AttentionConfig(bias="dense")``, ``"learned"``,
        or ``"auto"`` where it is dense (:mod:`pairformer_fast.bias.policy`).
    factors : FactorNetworks or path, optional
        For ``AttentionConfig(bias="learned")``: networks of :func:`factor_networks`, or the side file that they were
        saved to. Those of a file are frozen and on the device of the model, others are taken as they are, to be
        trained. They are for the triangle and the single attention of OpenFold3's Pairformer and MSA stacks; other
        attention keeps its dense bias. They never become part of the model.

    Returns
    -------
    Acceleration
        What was swapped and what was not; collects the reports on the bias; undoes the swap.

    Raises
    ------
    FileNotFoundError, FactorsError
        If factor networks are missing or do not fit the model.
    ValueError
        If the model holds nothing that can be accelerated, or learned factors are wanted without networks. The model is
        as it was after any error.

    Examples
    --------
    >>> acceleration = accelerate(model, AttentionConfig(bias="svd", tolerance=0.05))  # doctest: +SKIP
    >>> model(batch); acceleration.reports()  # doctest: +SKIP
    >>> acceleration.restore()  # doctest: +SKIP
    """
    config = AttentionConfig() if config is None else config
    if isinstance(factors, (str, Path)):
        factors = FactorNetworks.load(factors).requires_grad_(False).eval().to(next(model.parameters()).device)
    return Acceleration(_plan(model), config, factors)


def factor_networks(model: nn.Module, rank: int, *, hidden: int = HIDDEN) -> FactorNetworks:
    """Fresh networks for the attention of a model of OpenFold3 that can take learned factors, on the CPU.

    Parameters
    ----------
    model : nn.Module
        As for :func:`accelerate`, and not accelerated.
    rank : int
        Of all factors.
    hidden : int
        Width of the hidden layers.

    Raises
    ------
    FactorsError, ValueError
        If the model has no such attention.
    """
    return _plan(model).factor_networks(rank, hidden)


def _plan(model: nn.Module) -> Plan:
    packages = {base.__module__.partition(".")[0] for module in model.modules() for base in type(module).__mro__}
    match [host for host in _HOSTS if host in packages]:
        case [host]:
            return import_module(f"{__name__}.{host}").plan(model)
        case []:
            raise ValueError(
                f"{type(model).__name__} has no module of a package that can be accelerated ({', '.join(_HOSTS)}); "
                "give the built model or a part of it, such as a Pairformer block"
            )
        case several:
            raise ValueError(
                f"{type(model).__name__} has modules of {' and '.join(several)}; accelerate the part of each package "
                "by a call of its own"
            )
