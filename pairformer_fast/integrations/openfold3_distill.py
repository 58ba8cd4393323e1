"""Factor networks fitted to the dense biases of a frozen OpenFold3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pairformer_fast.bias import FactorNetworks
from pairformer_fast.config import Backend
from pairformer_fast.integrations.openfold3 import plan, single_tokens
from pairformer_fast.model.attention import TriangleUpdate
from pairformer_fast.model.factors import CORE
from pairformer_fast.model.observe import Observed
from pairformer_fast.training.distill import DistillSettings, attended_error

DEFAULT = DistillSettings()


def distill(
    model: nn.Module,
    networks: FactorNetworks,
    run: Callable[[int], object],
    steps: int,
    *,
    learning_rate: float = DEFAULT.learning_rate,
    gradient_norm: float = DEFAULT.gradient_norm,
) -> list[float]:
    """Fit networks to the biases that a model computes, where attention looks.

    Parameters
    ----------
    model : nn.Module
        An OpenFold3, or a part of it, that is not accelerated; it is run without gradients and stays as it is.
    networks : FactorNetworks
        Of :func:`~pairformer_fast.integrations.factor_networks`, on the device of the model; they are changed in place.
    run : callable
        Runs the model on some features, other ones in each step, whose number it gets: ``run(0)``, ``run(1)``, ...
    steps : int
        Steps of Adam; each sums the gradients of all passes through all attention in one run.
    learning_rate : float
        Of the first step; it falls linearly to zero.
    gradient_norm : float
        To which gradients are clipped.

    Returns
    -------
    list of float
        Mean loss of each step, see :func:`~pairformer_fast.training.distill.attended_error`.

    Raises
    ------
    FactorsError
        If the networks do not fit the model.
    ValueError
        If the model has no attention of OpenFold3 that is its own, or a run did not reach any.
    """
    optimizer = torch.optim.Adam(networks.parameters(), lr=learning_rate)
    losses: list[float] = []
    for step in range(steps):
        found: list[Tensor] = []
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        optimizer.zero_grad()
        with torch.no_grad(), observing(model, networks, partial(_learn, networks, found)):
            run(step)
        if not found:
            raise ValueError("the run did not reach any attention of the model that has a factor network")
        nn.utils.clip_grad_norm_(networks.parameters(), gradient_norm)
        optimizer.step()
        losses.append(float(torch.stack(found).mean()))
    return losses


def _learn(networks: FactorNetworks, losses: list[Tensor], seen: Observed) -> None:
    with torch.enable_grad(), torch.autocast(seen.bias.device.type, enabled=False):
        loss = attended_error(networks[seen.path](seen.tokens, seen.keep, torch.float32), seen)
        loss.backward()
    losses.append(loss.detach())


@contextmanager
def observing(model: nn.Module, networks: FactorNetworks, visit: Callable[[Observed], None]) -> Iterator[None]:
    """Call ``visit`` before every attention of a model that has a network, as the model runs without gradients.

    Raises
    ------
    FactorsError, ValueError
        As :func:`distill`.
    """
    found = plan(model)
    found.check(networks)
    with ExitStack() as hooks:
        for path in networks:
            attention = model.get_submodule(path.removesuffix(CORE).removesuffix("."))
            see = _triangle if hasattr(attention, "starting") else _single

            def before(module: Any, given: tuple, options: dict[str, Any], path: str = path, see: Any = see) -> None:
                visit(see(path, module, *given, **options))

            hooks.callback(attention.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield


def _triangle(path: str, module: Any, x: Tensor, mask: Tensor, transpose_bias: bool = False, **_flags: Any) -> Observed:
    """OpenFold3 calls attention around the ending node with the transposed pair representation."""
    z, mask = (x.transpose(-2, -3), mask.mT) if transpose_bias else (x, mask)
    z, keep = z.reshape(-1, *z.shape[-3:]), (mask != 0).expand(z.shape[:-1]).reshape(-1, *z.shape[-3:-1])
    update = TriangleUpdate(module, transpose_bias, Backend.AUTO)
    q, k, rows = update.sample(z, keep)
    tokens, kept = update.tokens(z, keep)
    return Observed(path, q, k, rows, update.bias(z), tokens, kept)


def _single(path: str, module: Any, a: Tensor, z: Tensor, mask: Tensor, **_flags: Any) -> Observed:
    normed, tokens, keep = single_tokens(module, a, z, mask, Backend.AUTO)
    q, k, _ = (x.transpose(-2, -3) for x in module.mha._prep_qkv(normed, normed, apply_scale=False))
    bias = module.linear_z(module.layer_norm_z(z)).movedim(-1, -3)
    return Observed(path, q, k, keep, bias.reshape(-1, *bias.shape[-3:]), tokens, keep)
