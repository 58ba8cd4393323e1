"""Settings of a training run, read from a preset of ``configs/``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pairformer_fast.config import AttentionConfig, Backend, BiasMethod, Frozen, ModelConfig
from pairformer_fast.training.losses import WEIGHTS


class TrainSettings(Frozen):
    """Optimisation and data mixture.

    Attributes
    ----------
    steps : int
        Length of the run; the learning rate falls to zero over it.
    batch_size : int
        Chains a step and GPU.
    learning_rate : float
        The peak; it rises linearly over ``warmup`` steps and falls from the share ``decay_from`` of all steps on.
    weight_decay, gradient_norm, ema_decay : float
        Of AdamW; norm that gradients are clipped to; of the moving average of the weights.
    max_recycles : int
        Recycles of a step are drawn from 0 to this.
    mixture : dict
        Relative share of each data source.
    loss_from : float
        Share of the schedule of the loss's weights at which the run starts: 1 keeps their last values, for weights that
        have been through it.
    loss_scale : dict
        Factors of the weights of single terms of the loss.
    padded_lengths : tuple of int
        Batches are padded to the least of these that holds them, so that few CUDA graphs serve them all; longer ones to
        their own longest structure.
    heavy_only, light_only, swapped : float
        Share of the Fv of which only one domain is shown, or the light chain first.
    log_every, save_every : int
        Steps between rows of the log, and between saved states.
    """

    seed: int = 0
    steps: int = Field(default=10_000, ge=1)
    batch_size: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: int = Field(default=500, ge=0)
    decay_from: float = Field(default=0.6, ge=0, le=1, description="share of the steps before the rate falls")
    weight_decay: float = Field(default=0.01, ge=0)
    gradient_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    loss_from: float = Field(default=0.0, ge=0, le=1)
    loss_scale: dict[str, float] = Field(default={})
    max_recycles: int = Field(default=1, ge=0)
    mixture: dict[str, float] = Field(default={"sabdab": 0.5, "covabdab": 0.5})
    padded_lengths: tuple[int, ...] = (136, 240, 256)
    heavy_only: float = Field(default=0.1, ge=0, le=1)
    light_only: float = Field(default=0.2, ge=0, le=1)
    swapped: float = Field(default=0.1, ge=0, le=1)
    log_every: int = Field(default=50, ge=1)
    save_every: int = Field(default=500, ge=1)

    @field_validator("loss_scale")
    @classmethod
    def _terms_exist(cls, scales: dict[str, float]) -> dict[str, float]:
        unknown = sorted(scales.keys() - WEIGHTS.keys())
        if unknown or min(scales.values(), default=0) < 0:
            raise ValueError(f"must give a factor of at least 0 to some of {', '.join(WEIGHTS)}, but got {scales}")
        return scales


class TrainAttention(Frozen):
    """What the pair bias is while a model trains.

    Attributes
    ----------
    bias : BiasMethod
        ``dense``, or ``learned``: factors of networks that are trained with the model, of which a side file is written
        beside the weights. Such a model has no dense bias: its projections are never used.
    rank, hidden, table : int, optional
        Of the networks, see :class:`~pairformer_fast.bias.NetworkShape`; for ``learned`` only, ``rank`` by default 16
        and ``hidden`` 128.
    backend : Backend
        Implementation of attention and of the operations around it: with ``auto`` the kernels on a GPU, and PyTorch
        elsewhere.
    """

    bias: Literal[BiasMethod.DENSE, BiasMethod.LEARNED] = BiasMethod.DENSE
    rank: int | None = Field(default=None, ge=1)
    hidden: int | None = Field(default=None, ge=1)
    table: int | None = Field(default=None, ge=1)
    backend: Backend = Backend.AUTO

    @model_validator(mode="after")
    def _networks_for_learned_only(self) -> TrainAttention:
        given = [name for name in ("rank", "hidden", "table") if getattr(self, name) is not None]
        if self.bias is BiasMethod.DENSE and given:
            raise ValueError(f"{given[0]} is for factor networks: drop it or set bias learned")
        return self

    @property
    def config(self) -> AttentionConfig:
        """How attention is computed."""
        return AttentionConfig(backend=self.backend, bias=self.bias)


class TrainConfig(Frozen):
    """A preset: dimensions of the model and settings of the run."""

    model: ModelConfig
    attention: TrainAttention = TrainAttention()
    train: TrainSettings = TrainSettings()
