"""Layers that were changed after a model was built, as adapters of low rank and monkey patches do."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class LowRankAdapter(nn.Module):
    """Adds an update of low rank to a linear layer, and looks like it otherwise, as those of PEFT do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        generator = torch.Generator().manual_seed(3)
        for name, shape in {"a": (2, layer.in_features), "b": (layer.out_features, 2)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.a.T @ self.b.T


def adapt(model: nn.Module, path: str) -> None:
    """Put an adapter around the linear layer at a path."""
    model.set_submodule(path, LowRankAdapter(model.get_submodule(path)))


def patch(model: nn.Module, path: str) -> None:
    """Replace the forward of the instance at a path."""
    layer = model.get_submodule(path)
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


CHANGES: tuple[Callable[[nn.Module, str], None], ...] = (adapt, patch)
