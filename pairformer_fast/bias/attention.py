"""Where the bias of every attention module becomes factors and the kernel takes them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pairformer_fast.bias.costs import predicted_cost
from pairformer_fast.bias.factors import BiasFactors
from pairformer_fast.bias.learned import FactorNetwork, FactorNetworks, FactorsError
from pairformer_fast.bias.methods import MissingFactorNetworksError
from pairformer_fast.bias.policy import Factorization, factorize, keeps_dense
from pairformer_fast.config import AttentionConfig, Backend, BiasMethod
from pairformer_fast.kernels.flash_bias import (
    Factors,
    chosen_backend,
    flash_bias_attention,
    packed_flash_bias_attention,
)


@dataclass(frozen=True)
class BiasReport:
    """What one call did with its bias; one entry per head, the worst over the batch.

    Errors are those against the dense bias. Factors of a network have none: no dense bias is computed, and a model that
    was trained with them has none at all.

    Attributes
    ----------
    choice : str
        ``factors`` or ``dense``.
    backend : str
        What computed attention, such as ``torch`` or ``triton``.
    rank : tuple of int
        Rank in use; N for a dense bias.
    dense_heads : tuple of int
        Which heads keep the dense bias; all of them if that is the choice.
    reason : str, optional
        Why the dense bias was kept; None with factors.
    eps : tuple of float, optional
        Largest half range of the residual in a row (see :class:`~pairformer_fast.bias.certificate.Certificate`).
    bound : tuple of float, optional
        tanh(eps / 2), guaranteed bound on the total variation of attention weights.
    probed_mean, probed_std, probed_max : tuple of float, optional
        Total variation measured on sampled queries, and its spread over them.
    predicted_cost : float, optional
        Time of this attention relative to that with the dense bias, from :mod:`pairformer_fast.bias.costs`, without
        what the factors cost to make; None where no time was measured.
    """

    choice: str
    backend: str
    rank: tuple[int, ...]
    eps: tuple[float, ...] | None = None
    bound: tuple[float, ...] | None = None
    probed_mean: tuple[float, ...] | None = None
    probed_std: tuple[float, ...] | None = None
    probed_max: tuple[float, ...] | None = None
    predicted_cost: float | None = None
    dense_heads: tuple[int, ...] = ()
    reason: str | None = None

    @classmethod
    def of(cls, outcome: Factorization, backend: Backend, q: Tensor) -> BiasReport:
        """Summary of a factorisation, and of what computed attention with it for queries ``q``."""
        factors, probed = outcome.factors, outcome.probed
        heads, tokens = outcome.bias.shape[1:3]
        if factors is None or probed is None:
            exact, every = (0.0,) * heads, tuple(range(heads))
            return cls("dense", backend.value, (tokens,) * heads, *(exact,) * 5, 1.0, every, outcome.reason)
        dense = factors.dense_heads
        ranks = factors.rank.masked_fill(dense, tokens)
        errors = (factors.certificate.eps, factors.certificate.bound, probed.mean, probed.std, probed.max)
        rank, eps, bound, mean, std, largest = (tuple(value.amax(0).tolist()) for value in (ranks, *errors))
        cost = predicted_cost(backend, q, factors.phi_q.shape[-1], float(dense.float().mean()))
        some = tuple(dense.any(0).nonzero().flatten().tolist())
        return cls("factors", backend.value, rank, eps, bound, mean, std, largest, cost, some)


def factor_ranks(rank: Iterable[int], dense_heads: Container[int]) -> list[int]:
    """Of a report's ranks those of heads with factors."""
    return [value for head, value in enumerate(rank) if head not in dense_heads]


@dataclass(frozen=True, eq=False)
class Attached:
    """Keeps a network out of the submodules of what holds it."""

    network: FactorNetwork


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


@dataclass(eq=False)
class Recycled:
    """What an attention keeps from one recycle to the next, see :func:`warm_starts`.

    Attributes
    ----------
    phi_k : Tensor, optional
        ``[B, H, N, R]`` of its last factors; None before the first.
    """

    phi_k: Tensor | None = None

    def start(self, bias: Tensor) -> Tensor | None:
        """The warm start for a bias ``[B, H, N, N]``, if there is one of its shape."""
        fits = self.phi_k is not None and self.phi_k.shape[:3] == bias.shape[:3]
        return self.phi_k if fits else None


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
    attached : Attached, optional
        Network of the factors; see :func:`attach_factors`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.report: list[BiasReport] = []
        self.attached: Attached | None = None
        self._observer: Callable[[Decision], None] | None = None
        self._recycled: Recycled | None = None

    @property
    def learned(self) -> bool:
        """Whether factors come from a network, so that no dense bias is needed."""
        return self.config.bias is BiasMethod.LEARNED

    @property
    def followed(self) -> bool:
        """Whether its decisions are shown to somebody, or serve the next recycle."""
        return self._observer is not None or self._recycled is not None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | Factors, mask: Tensor | None) -> Tensor:
        """Attend.

        Parameters
        ----------
        q, k, v : Tensor
            ``[B, I, N, H, D]`` or ``[B, N, H, D]``, q not scaled.
        bias : Tensor or Factors
            Dense additive logits ``[B, H, N, N]``, or what :meth:`factors` gave.
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
        decided = bias if isinstance(bias, Factors) else self.decide(q, k, bias, mask)
        return self.attend(q, k, v, decided, mask)

    def decide(self, q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor | BiasFactors:
        """What attention is to take as its bias; arguments as in :meth:`forward`, of all rows I or of a sample."""
        self._check_gradient(q, bias)
        return self._decide(q, k, bias, mask).for_attention

    def factors(self, tokens: Tensor, keep: Tensor, q: Tensor) -> Factors:
        """What attention is to take as its bias where factors are :attr:`learned`.

        Parameters
        ----------
        tokens : Tensor
            ``[B, N, channels]`` features that the network reads.
        keep : Tensor
            Bool ``[B, N]``, True for tokens that are not padding.
        q : Tensor
            As in :meth:`forward`, of all rows I or of a sample.

        Returns
        -------
        Factors
            Differentiable, dtype of q.

        Raises
        ------
        MissingFactorNetworksError
            If no network is attached.
        """
        if self.attached is None:
            raise MissingFactorNetworksError(
                "bias is 'learned', but the model has no factor networks: attach_factors(model, networks) gives it some"
            )
        factors = self.attached.network(tokens, keep, q.dtype)
        if not self.training:
            heads, rank = factors.phi_q.shape[1], factors.phi_q.shape[-1]
            backend = chosen_backend(self.config.backend, q)
            cost = predicted_cost(backend, q, rank)
            self.report.append(BiasReport("factors", backend.value, (rank,) * heads, predicted_cost=cost))
        return factors

    def attend(self, q: Tensor, k: Tensor, v: Tensor, decided: Tensor | Factors, mask: Tensor | None) -> Tensor:
        """Attend, in all rows I or in some, with what :meth:`decide` or :meth:`factors` gave."""
        return flash_bias_attention(q, k, v, decided, mask, self.config.backend)

    def attend_packed(self, qkv: Tensor, decided: Tensor | Factors, mask: Tensor | None) -> Tensor:
        """The same for ``qkv [B, I, N, 3, H, D]``, which saves copies of gradients; ``[B, I, N, H, D]``."""
        return packed_flash_bias_attention(qkv, decided, mask, self.config.backend)

    def _decide(self, q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None) -> Factorization:
        """What becomes of the bias, reported in evaluation mode."""
        recycled = self._recycled
        outcome = factorize(bias, self.config, q, k, mask, None if recycled is None else recycled.start(bias))
        if recycled is not None and outcome.factors is not None:
            recycled.phi_k = outcome.factors.phi_k
        if not self.training:
            report = BiasReport.of(outcome, chosen_backend(self.config.backend, q), q)
            self.report.append(report)
            if self._observer is not None:
                self._observer(Decision(q, k, mask, self.config, outcome, report))
        return outcome

    def reset(self) -> None:
        """Forget the reports."""
        self.report.clear()

    def _check_gradient(self, q: Tensor, bias: Tensor) -> None:
        if not (torch.is_grad_enabled() and bias.requires_grad):
            return
        if self.config.bias is not BiasMethod.LEARNED and not keeps_dense(self.config, q):
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


def attach_factors(model: nn.Module, networks: FactorNetworks) -> None:
    """Give every attention of ``model`` its network, which ``AttentionConfig(bias="learned")`` then uses.

    The networks do not become part of the model: its ``state_dict``, ``parameters`` and ``to`` know nothing of them.

    Raises
    ------
    FactorsError
        If the paths of the networks are not those of the model's attentions; nothing is changed then.
    """
    attentions = _attentions(model)
    missing, unknown = sorted(attentions.keys() - set(networks)), sorted(set(networks) - attentions.keys())
    if missing or unknown:
        raise FactorsError(
            f"factor networks do not fit {type(model).__name__}: {len(missing)} of its {len(attentions)} attentions "
            f"have none{_first(missing)}, {len(unknown)} networks belong to none{_first(unknown)}"
        )
    for path, attention in attentions.items():
        attention.attached = Attached(networks[path])


def detach_factors(model: nn.Module) -> None:
    """Take the networks of :func:`attach_factors` away again."""
    for attention in _attentions(model).values():
        attention.attached = None


def _first(paths: list[str]) -> str:
    return f" (such as {paths[0]})" if paths else ""


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


@contextmanager
def warm_starts(model: nn.Module) -> Iterator[None]:
    """Let every attention of ``model`` begin from its factors of the recycle before, in one run of the model.

    It saves ``randomised`` of a fixed rank a power iteration and is as accurate (see
    :func:`~pairformer_fast.bias.randomised.factorize_randomised`); nothing else changes. Nothing is kept beyond
    the body of the ``with`` statement, which should run the model on one input: results then do not depend on earlier
    ones.
    """
    cores = [module for module in model.modules() if isinstance(module, PairBiasAttention)]
    try:
        for core in cores:
            core._recycled = Recycled()
        yield
    finally:
        for core in cores:
            core._recycled = None


def _attentions(model: nn.Module) -> dict[str, PairBiasAttention]:
    found = {path: module for path, module in model.named_modules() if isinstance(module, PairBiasAttention)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no PairBiasAttention to configure")
    return found
