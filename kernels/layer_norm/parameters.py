"""Parameters of a layer norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class NormParameters:
    """Scale and offset of a layer norm.

    Attributes
    ----------
    weight : Tensor
        ``[C]``, floating point.
    bias : Tensor, optional
        ``[C]``, floating point.
    eps : float
        Added to the variance.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float = 1e-5

    @classmethod
    def of(cls, module: Any) -> NormParameters:
        """Those of ``torch.nn.LayerNorm``, or of any module with its attributes ``weight``, ``bias`` and ``eps``.

        Raises
        ------
        ValueError
            If the module has no weight.
        """
        if module.weight is None:
            raise ValueError("the layer norm has no weight: make it with elementwise_affine=True")
        return cls(module.weight, module.bias, module.eps)
