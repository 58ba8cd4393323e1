"""Where the bias of every attention module becomes factors and the kernel takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pairformer_fast.bias.factors import BiasFactors
from pairformer_fast.bias.policy import Factorization, factorize, keeps_dense
from pairformer_fast.config import AttentionConfig, Backend, BiasMethod
from pairformer_fast.kernels.flash_bias import chosen_backend, flash_bias_attention


@dataclass(frozen=True)
class BiasReport:
    """What one call did with its bias; one entry per head, the worst over the batch.

    Attributes
    ----------
    choice : str
        ``factors`` or ``dense``.
    backend : str
        What computed attention, such as ``torch`` or ``triton``.
    rank : tuple of int
        Rank in use; N for a dense bias.
    eps : tuple of float
        Largest half range of the residual in a row (see :class:`~pairformer_fast.bias.certificate.Certificate`).
    bound : tuple of float
        tanh(eps / 2), guaranteed bound on the total variation of attention weights.
    probed_mean, probed_max : tuple of float
        Total variation measured on sampled queries.
    """

    choice: str
    backend: str
    rank: tuple[int, ...]
    eps: tuple[float, ...]
    bound: tuple[float, ...]
    probed_mean: tuple[float, ...]
    probed_max: tuple[float, ...]

    @classmethod
    def of(cls, outcome: Factorization, backend: Backend) -> BiasReport:
        """Summary of a factorisation, and of what computed attention with it."""
        factors, probed = outcome.factors, outcome.probed
        if factors is None or probed is None:
            heads, tokens = outcome.bias.shape[1:3]
            exact = (0.0,) * heads
            return cls("dense", backend.value, (tokens,) * heads, exact, exact, exact, exact)
        per_head = (factors.rank, factors.certificate.eps, factors.certificate.bound, probed.mean, probed.max)
        return cls("factors", backend.value, *(tuple(value.amax(0).tolist()) for value in per_head))


@dataclass(frozen=True, eq=False)
class Decision:
    """What one call of attention in evaluation mode was given and made of its bias, see :func:`observed_decisions`.

    Attributes
    ----------
    q, k, mask : Tensor
        As in :meth:`PairBiasAttention.decide`.
    config : AttentionConfig
        What was asked for.
    outcome : Factorization
        The dense bias, and the factors that replace it, if any do.
    report : BiasReport
        Summary of the outcome.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    config: AttentionConfig
    outcome: Factorization
    report: BiasReport


class Configured(nn.Module):
    """A part of a model that computes as an :class:`~pairformer_fast.config.AttentionConfig` says.

    Attributes
    ----------
    config : AttentionConfig
        How to compute; plain PyTorch with the dense bias unless :func:`set_attention` set it otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = AttentionConfig.reference()


class PairBiasAttention(Configured):
    """Attention with a pair bias: parameter-free, the one door between a model and the kernels.

    Attributes
    ----------
    report : list of BiasReport
        One entry per decision about a bias in evaluation mode, until :meth:`reset`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.report: list[BiasReport] = []
        self._observer: Callable[[Decision], None] | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """Attend.

        Parameters
        ----------
        q, k, v : Tensor
            ``[B, I, N, H, D]`` or ``[B, N, H, D]``, q not scaled.
        bias : Tensor
            Dense additive logits ``[B, H, N, N]``.
        mask : Tensor, optional
            Bool ``[B, I, N]`` or ``[B, N]``, True = keep.

        Returns
        -------
        Tensor
            Shape of q.

        Raises
        ------
        RuntimeError
            If a gradient of the bias is wanted from a decomposition, which is not differentiated.
        """
        return self.attend(q, k, v, self.decide(q, k, bias, mask), mask)

    def decide(self, q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor | BiasFactors:
        """What attention is to take as its bias; arguments as in :meth:`forward`, of all rows I or of a sample."""
        self._check_gradient(q, bias)
        return self._decide(q, k, bias, mask).for_attention

    def attend(self, q: Tensor, k: Tensor, v: Tensor, decided: Tensor | BiasFactors, mask: Tensor | None) -> Tensor:
        """Attend, in all rows I or in some, with what :meth:`decide` gave."""
        return flash_bias_attention(q, k, v, decided, mask, self.config.backend)

    def _decide(self, q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None) -> Factorization:
        """What becomes of the bias, reported in evaluation mode."""
        outcome = factorize(bias, self.config, q, k, mask)
        if not self.training:
            report = BiasReport.of(outcome, chosen_backend(self.config.backend, q))
            self.report.append(report)
            if self._observer is not None:
                self._observer(Decision(q, k, mask, self.config, outcome, report))
        return outcome

    def reset(self) -> None:
        """Forget the reports."""
        self.report.clear()

    def _check_gradient(self, q: Tensor, bias: Tensor) -> None:
        passes = self.config.bias is BiasMethod.LEARNED or keeps_dense(self.config, q)
        if not passes and torch.is_grad_enabled() and bias.requires_grad:
            raise RuntimeError(
                f"bias method '{self.config.bias}' does not pass gradients to the bias; train with "
                "AttentionConfig(bias='dense'), or run inference under torch.no_grad()"
            )


def set_attention(model: nn.Module, config: AttentionConfig) -> None:
    """Set ``config`` on every part of ``model`` that is :class:`Configured`, and clear the reports.

    Raises
    ------
    ValueError
        If the model has none.
    """
    for attention in _attentions(model).values():
        attention.reset()
    for module in model.modules():
        if isinstance(module, Configured):
            module.config = config


def collect_reports(model: nn.Module) -> list[dict[str, Any]]:
    """Reports of all calls since the last reset, as JSON-ready dictionaries in module order.

    Beside the fields of :class:`BiasReport` each has ``name``, the path of the attention module within the model, such
    as ``pairformer_stack.blocks.3.pair_stack.tri_att_start.mha.core``.

    Raises
    ------
    ValueError
        If the model has no :class:`PairBiasAttention`.
    """
    return [{"name": path, **asdict(report)} for path, module in _attentions(model).items() for report in module.report]


@contextmanager
def observed_decisions(model: nn.Module, observer: Callable[[str, Decision], None]) -> Iterator[None]:
    """Show every decision about a bias to ``observer`` while the body of a ``with`` statement runs the model.

    Parameters
    ----------
    model : nn.Module
        The model; nothing else in it changes.
    observer : callable
        Takes the path of the attention module within the model, as in :func:`collect_reports`, and the decision. It is
        called before attention is computed; its tensors must not be changed.

    Raises
    ------
    ValueError
        If the model has no :class:`PairBiasAttention`.
    """
    cores = _attentions(model)
    before = {path: core._observer for path, core in cores.items()}
    try:
        for path, core in cores.items():
            core._observer = partial(observer, path)
        yield
    finally:
        for path, core in cores.items():
            core._observer = before[path]


def _attentions(model: nn.Module) -> dict[str, PairBiasAttention]:
    found = {path: module for path, module in model.named_modules() if isinstance(module, PairBiasAttention)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no PairBiasAttention to configure")
    return found
