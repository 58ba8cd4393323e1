"""What a user may ask of a folding run; contradictory requests are refused on construction."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from pairformer_fast.config import DEFAULT_TOLERANCE, AttentionConfig, BiasMethod, Frozen


class Model(StrEnum):
    """What predicts: ``pairformer`` is this package's model, ``openfold3`` is OpenFold3 with attention swapped."""

    PAIRFORMER = "pairformer"
    OPENFOLD3 = "openfold3"


class Attention(StrEnum):
    """Which path predicts: ``flashbias`` is the accelerated one, ``auto`` takes it."""

    AUTO = "auto"
    FLASHBIAS = "flashbias"
    REFERENCE = "reference"


class Precision(StrEnum):
    """``auto`` is fp32 on a CPU and bf16 (autocast) on CUDA. Both paths of a comparison run in the same precision."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class FoldSettings(Frozen):
    """Settings of :func:`pairformer_fast.inference.pipeline.fold`.

    Attributes
    ----------
    model : Model
        ``openfold3`` is for :func:`pairformer_fast.integrations.openfold3_fold.fold`.
    attention : Attention
        ``reference`` runs the unaccelerated model only.
    bias : BiasMethod
        How the accelerated path represents the pair bias.
    rank : int, optional
        Fixed rank of the factors; excludes ``tolerance``.
    tolerance : float, optional
        See :class:`~pairformer_fast.config.AttentionConfig`, whose default holds if omitted.
    device : str
        ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:INDEX``.
    precision : Precision
        Of both paths.
    seed : int
        Seeds torch before each prediction.
    recycles : int, optional
        The checkpoint's default if omitted.
    compare : bool, optional
        Also predict with the reference and compare. By default yes, unless ``attention`` is ``reference``.
    checkpoint : Path, optional
        Weights; the bundled ones if omitted, for ``learned`` those that were trained with factors. OpenFold3 needs one
        of its own.
    factors : Path, optional
        Factor networks for ``bias`` ``learned``; those beside the checkpoint if omitted.
    msa_dir : Path, optional
        Folder with alignments, for OpenFold3.
    runner_yaml : Path, optional
        Further settings of OpenFold3, in its format.
    relax : bool
        Relax the structures of both paths in a force field, see :mod:`pairformer_fast.inference.relaxation`.
    """

    model: Model = Model.PAIRFORMER
    attention: Attention = Attention.AUTO
    bias: BiasMethod = BiasMethod.AUTO
    rank: int | None = Field(default=None, ge=1)
    tolerance: float | None = Field(default=None, gt=0, le=1)
    device: str = "auto"
    precision: Precision = Precision.AUTO
    seed: int = Field(default=0, ge=0, lt=2**63)
    recycles: int | None = Field(default=None, ge=0)
    compare: bool | None = None
    checkpoint: Path | None = None
    factors: Path | None = None
    msa_dir: Path | None = None
    runner_yaml: Path | None = None
    relax: bool = False

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError(f"must be auto, cpu, cuda or cuda:INDEX, but got {device!r}")
        return device

    @model_validator(mode="after")
    def _of_the_chosen_model(self) -> FoldSettings:
        if self.model is Model.PAIRFORMER:
            for option, value in {"--msa-dir": self.msa_dir, "--runner-yaml": self.runner_yaml}.items():
                if value is not None:
                    raise ValueError(f"{option} is for --model openfold3: drop it or choose that model")
            return self
        if self.factors is not None and self.bias is not BiasMethod.LEARNED:
            raise ValueError(f"--factors {self.factors}: only --bias learned takes factor networks")
        if self.relax:
            raise ValueError("--relax is for --model pairformer: drop it or choose that model")
        if self.checkpoint is None:
            raise ValueError("--model openfold3 needs --checkpoint FILE: its weights do not come with this package")
        if ":" in self.device:
            raise ValueError(
                f"--device {self.device}: OpenFold3 takes the first GPU it sees; choose --device cuda and hide the "
                "others with CUDA_VISIBLE_DEVICES"
            )
        if self.seed >= 2**32:
            raise ValueError(f"--seed {self.seed}: OpenFold3 takes seeds below 2**32")
        return self

    @model_validator(mode="after")
    def _without_contradiction(self) -> FoldSettings:
        factors = {"rank": self.rank, "tolerance": self.tolerance}
        given = [name for name, value in factors.items() if value is not None]
        if len(given) == 2:
            raise ValueError("rank and tolerance exclude each other: give one of them")
        if self.bias is BiasMethod.DENSE and given:
            raise ValueError(f"{given[0]} is for factors, but bias is dense: drop {given[0]} or choose bias svd")
        if self.bias is BiasMethod.LEARNED and given:
            raise ValueError(f"the rank of learned factors is that of their networks: drop {given[0]}")
        if self.attention is Attention.REFERENCE:
            if self.bias not in (BiasMethod.AUTO, BiasMethod.DENSE):
                raise ValueError(
                    f"attention reference uses the dense bias: drop bias {self.bias} or choose attention flashbias"
                )
            if given:
                raise ValueError(f"attention reference has no factors: drop {given[0]} or choose attention flashbias")
            if self.compare:
                raise ValueError("attention reference leaves nothing to compare: drop compare or choose flashbias")
        return self

    @property
    def accelerated(self) -> AttentionConfig | None:
        """Attention of the accelerated path; None if only the reference runs."""
        if self.attention is Attention.REFERENCE:
            return None
        tolerance = DEFAULT_TOLERANCE if self.tolerance is None else self.tolerance
        return AttentionConfig(bias=self.bias, rank=self.rank, tolerance=tolerance)

    @property
    def reference(self) -> AttentionConfig | None:
        """Attention of the reference path; None if it does not run."""
        runs = self.attention is Attention.REFERENCE or self.compare is not False
        return AttentionConfig.reference() if runs else None
