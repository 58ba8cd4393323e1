"""Ways to run one OpenFold3: its own code, its kernels, cuEquivariance's, and ours swapped in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from openfold3.core.loss.loss_module import OpenFold3Loss
from openfold3.core.utils.chunk_utils import ChunkSizeTuner
from torch import nn

from pairformer_fast import AttentionConfig, accelerate
from pairformer_fast.config import BiasMethod
from pairformer_fast.integrations import Acceleration
from pairformer_fast.integrations.openfold3_loss import accelerated_loss

TRITON, CUEQUIVARIANCE = "use_triton_triangle_kernels", "use_cueq_triangle_kernels"
OPENFOLD3 = ("openfold3",)


@dataclass(frozen=True)
class Implementation:
    """Name in the rows, the kernels of OpenFold3 that are on in training and in evaluation, and our config.

    Ours keeps the defaults of OpenFold3 for what is not swapped.
    """

    name: str
    training: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    attention: AttentionConfig | None = None
    distributions: tuple[str, ...] = OPENFOLD3
    needs_gpu: bool = False
    trains: bool = True

    def version(self) -> str | None:
        """Versions of the packages, None if they are not installed."""
        try:
            return ", ".join(f"{name} {metadata.version(name)}" for name in self.distributions)
        except metadata.PackageNotFoundError:
            return None

    @contextmanager
    def applied(self, model: nn.Module, loss: OpenFold3Loss) -> Iterator[Acceleration | None]:
        """Within this context the model and its loss run this way; the model measures its chunk sizes anew.

        Raises
        ------
        ImportError
            If the package of the kernels is missing: OpenFold3 would go on without them.
        RuntimeError
            If the kernels need a GPU and the model is on a CPU.
        """
        if CUEQUIVARIANCE in self.training + self.evaluation:
            import_module("cuequivariance_torch")
        on_a_cpu = next(model.parameters()).device.type == "cpu"
        if on_a_cpu and self.needs_gpu:
            raise RuntimeError("needs a CUDA GPU")
        for mode, chosen in (("train", self.training), ("eval", self.evaluation)):
            memory = model.settings.memory[mode]
            for flag in (TRITON, CUEQUIVARIANCE):
                memory[flag] = flag in chosen and not on_a_cpu
        for module in model.modules():
            if isinstance(tuner := getattr(module, "chunk_size_tuner", None), ChunkSizeTuner):
                tuner.cached_arg_data = None
        if self.attention is None:
            yield None
            return
        with accelerate(model, self.attention) as acceleration, accelerated_loss(loss, self.attention):
            yield acceleration


EAGER = Implementation("OpenFold3 eager")
IMPLEMENTATIONS = (
    EAGER,
    Implementation("pairformer_fast dense", evaluation=(TRITON,), attention=AttentionConfig(bias=BiasMethod.DENSE)),
    Implementation(
        "OpenFold3 cuEquivariance",
        (CUEQUIVARIANCE,),
        (CUEQUIVARIANCE,),
        distributions=("openfold3", "cuequivariance-torch"),
        needs_gpu=True,
    ),
    Implementation("OpenFold3 Triton", (TRITON,), (TRITON,), needs_gpu=True),
    Implementation("pairformer_fast auto", evaluation=(TRITON,), attention=AttentionConfig(), trains=False),
)
"""OpenFold3's own code first, which the others are compared with. On a GPU training with ``auto`` is ``dense``."""


def biases(acceleration: Acceleration | None) -> dict[str, Any] | None:
    """What became of the pair biases in the last run: how many stayed dense, and the ranks of the others' factors."""
    if acceleration is None:
        return None
    reports = acceleration.reports()
    ranks = [max(report["rank"]) for report in reports if report["choice"] == "factors"]
    return {"dense": len(reports) - len(ranks), "factors": len(ranks), "largest_rank": max(ranks, default=None)}
