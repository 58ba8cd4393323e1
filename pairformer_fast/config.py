"""Every choice a user can make, in frozen pydantic models: one place, validated on construction."""

from __future__ import annotations

from enum import StrEnum
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

DEFAULT_TOLERANCE = 0.1
"""Default bound on the probed change of attention weights (mean total variation, 0 to 1).

On the bundled weights structures then move by about 0.1 Å (``data/benchmarks/fold.json``)."""


class Backend(StrEnum):
    """Implementation of :func:`pairformer_fast.kernels.flash_bias.flash_bias_attention`.

    ``reference`` is explicit PyTorch, ``torch`` uses scaled_dot_product_attention, ``triton`` is the kernel for CUDA.
    ``auto`` takes ``triton`` for what it supports on a GPU and ``torch`` elsewhere.
    """

    AUTO = "auto"
    REFERENCE = "reference"
    TORCH = "torch"
    TRITON = "triton"


class BiasMethod(StrEnum):
    """What becomes of a pair bias before attention sees it."""

    AUTO = "auto"
    DENSE = "dense"
    SVD = "svd"
    RANDOMISED = "randomised"
    STRUCTURED = "structured"
    LANDMARK = "landmark"
    LEARNED = "learned"


class Frozen(BaseModel):
    """Immutable base: unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a preset by name (``antibody``) or a YAML file by path.

        Raises
        ------
        FileNotFoundError
            If neither a file nor a shipped preset has that name.
        ValueError
            If it is no YAML mapping, or has unknown keys or values out of range; the message says which.
        """
        content = read_yaml(path)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
            raise ValueError(f"{path}: {'; '.join(wrong)}") from None


class AttentionConfig(Frozen):
    """How attention with a pair bias is computed, everywhere in a model.

    Attributes
    ----------
    backend : Backend
        Implementation of attention. An explicit ``triton`` is an error where there is no CUDA GPU.
    bias : BiasMethod
        ``dense`` keeps the N x N bias; ``svd`` replaces it by the best factors of their rank, ``randomised`` by nearly
        the best ones for less, ``structured`` by a table of relative positions and factors, ``landmark`` by factors
        from rows and columns at a few tokens; ``auto`` takes factors where measured costs say that they pay
        (:mod:`pairformer_fast.bias.policy`), and the dense bias elsewhere; ``learned`` takes factors
        of the networks that are attached to the model (:func:`~pairformer_fast.bias.attach_factors`), at their rank,
        and never computes the N x N bias.
    rank : int, optional
        Fixed rank for every head. Excludes a search by tolerance.
    tolerance : float
        Largest accepted mean total variation between the attention weights of the dense bias and of its
        factors (0 to 1), measured on a sample of rows, or guaranteed by tanh(eps/2) if ``certified``. Each head
        gets the least rank that meets it, or keeps the dense bias if that is above N / 2.
    certified : bool
        Use the hard bound of the certificate instead of the probe.
    graphs : bool
        Let models of other packages launch blocks by CUDA graphs where they can (OpenFold3). They hold some memory, and
        what Python does in a block is then not done for every block.
    """

    backend: Backend = Backend.AUTO
    bias: BiasMethod = BiasMethod.AUTO
    rank: int | None = Field(default=None, ge=1)
    tolerance: float = Field(default=DEFAULT_TOLERANCE, gt=0, le=1)
    certified: bool = False
    graphs: bool = True

    @classmethod
    def reference(cls) -> AttentionConfig:
        """Plain PyTorch with the dense bias: the truth that every other path is held against."""
        return cls(backend=Backend.REFERENCE, bias=BiasMethod.DENSE)


class PairformerConfig(Frozen):
    """Dimensions of a Pairformer stack (AF3 Algorithm 17); the defaults are production's."""

    c_s: int = Field(default=384, ge=1)
    c_z: int = Field(default=128, ge=1)
    c_hidden_mul: int = Field(default=128, ge=1)
    c_hidden_pair_att: int = Field(default=32, ge=1)
    no_heads_pair: int = Field(default=4, ge=1)
    c_hidden_pair_bias: int = Field(default=24, ge=1)
    no_heads_pair_bias: int = Field(default=16, ge=1)
    transition_n: int = Field(default=4, ge=1)
    pair_dropout: float = Field(default=0.25, ge=0, lt=1)
    no_blocks: int = Field(default=48, ge=1)


class StructureModuleConfig(Frozen):
    """Dimensions of the structure module (AF2 Algorithms 20-24)."""

    c_s: int = Field(default=384, ge=1)
    c_hidden_ipa: int = Field(default=16, ge=1)
    no_heads_ipa: int = Field(default=12, ge=1)
    no_qk_points: int = Field(default=4, ge=1)
    no_v_points: int = Field(default=8, ge=1)
    no_blocks: int = Field(default=8, ge=1)
    c_angle: int = Field(default=128, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)


class ModelConfig(Frozen):
    """The whole folding model.

    While it is trained, ``residue_dropout`` of the residues show the trunk no type.
    """

    pairformer: PairformerConfig = PairformerConfig()
    structure: StructureModuleConfig = StructureModuleConfig()
    residue_dropout: float = Field(default=0.0, ge=0, lt=1)
    max_relative_idx: int = Field(default=32, ge=1)
    max_relative_chain: int = Field(default=2, ge=1)
    recycles: int = Field(default=3, ge=0, description="default number of recycles at inference")
    recycle_bins: int = Field(default=15, ge=2)
    distogram_bins: int = Field(default=64, ge=2)
    plddt_bins: int = Field(default=50, ge=2)
    pae_bins: int = Field(default=64, ge=2)
    domain: str = Field(default="any", pattern="^(any|antibody)$", description="which sequences the weights are for")

    @model_validator(mode="after")
    def _same_single_width(self) -> ModelConfig:
        if self.pairformer.c_s != self.structure.c_s:
            raise ValueError(
                f"pairformer.c_s ({self.pairformer.c_s}) and structure.c_s ({self.structure.c_s}) must be equal"
            )
        return self


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Parse a YAML mapping from a file, or from ``configs/<name>.yaml`` of the package.

    Raises
    ------
    FileNotFoundError, ValueError
        As :meth:`Frozen.from_yaml`.
    """
    file: Traversable = Path(path)
    if not file.is_file():
        file = resources.files("pairformer_fast.configs") / f"{path}.yaml"
        if not file.is_file():
            raise FileNotFoundError(f"no file {path} and no preset of that name in configs/")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a YAML mapping, such as 'model: ...'")
    return content
