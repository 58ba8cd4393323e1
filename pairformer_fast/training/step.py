"""Gradients of a batch; on a GPU as a CUDA graph, since thousands of small launches would cost more than the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, distributed, nn

from pairformer_fast.features import TokenFeatures
from pairformer_fast.model.folding import FoldingModel
from pairformer_fast.training.dataset import Batch
from pairformer_fast.training.losses import WEIGHTS, compute_losses

WARM_UP = 2


@dataclass(frozen=True)
class _Captured:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    losses: dict[str, Tensor]


class GradientStep:
    """Losses and gradients of a model; gradients are averaged over all processes.

    Parameters
    ----------
    model : FoldingModel
        In training mode.
    parameters : sequence of Parameter, optional
        Those that take part, whose ``.grad`` tensors are overwritten by every call; by default the model's.
    """

    def __init__(self, model: FoldingModel, parameters: Sequence[nn.Parameter] | None = None) -> None:
        self.model = model
        self.parameters = list(model.parameters() if parameters is None else parameters)
        self.device = self.parameters[0].device
        self.weights = torch.zeros(len(WEIGHTS), device=self.device)
        self._captured: dict[tuple[torch.Size, int], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        # Overwritten in place: the graphs know them by address.
        self._gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def __call__(self, batch: Batch, recycles: int, weights: Tensor) -> dict[str, Tensor]:
        """Fill the gradients of the total loss.

        Parameters
        ----------
        batch : Batch
            On any device.
        recycles : int
            Passes without gradient before the last.
        weights : Tensor
            Of the terms of the loss, ``[terms]``.

        Returns
        -------
        dict of str to Tensor
            All terms of this process, valid until the next call.
        """
        self.weights.copy_(weights)
        if self.device.type == "cuda":
            key = (batch.cdr.shape, recycles)
            if key not in self._captured:
                noise = torch.cuda.get_rng_state(self.device)
                self._captured[key] = self._capture(batch.to(self.device), recycles)
                # A resumed run captures at another step than the run that it continues, and must draw the same noise.
                torch.cuda.set_rng_state(noise, self.device)
            captured = self._captured[key]
            for static, given in zip(_tensors(captured.batch), _tensors(batch), strict=True):
                static.copy_(given)
            captured.graph.replay()
            losses = captured.losses
        else:
            losses = self._run(batch, recycles)
        if distributed.is_initialized():
            self._average_gradients()
        return losses

    def _run(self, batch: Batch, recycles: int) -> dict[str, Tensor]:
        torch._foreach_zero_(self._gradients)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            output = self.model.run(batch.features, recycles)
            losses = compute_losses(output, batch, self.model.structure_module.all_atom, self.weights)
        losses["total"].backward()
        return {name: value.detach() for name, value in losses.items()}

    def _capture(self, batch: Batch, recycles: int) -> _Captured:
        self._warm_up(batch, recycles)
        graph = torch.cuda.CUDAGraph()
        # thread_local: the watchdog of NCCL may query events of its own meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            losses = self._run(batch, recycles)
        return _Captured(graph, batch, losses)

    def _warm_up(self, batch: Batch, recycles: int) -> None:
        """Let libraries allocate and kernels compile for the batch's shape: a capture may not hold that."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._run(batch, recycles)
        torch.cuda.current_stream().wait_stream(stream)

    def _average_gradients(self) -> None:
        flat = torch.cat([gradient.flatten() for gradient in self._gradients])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        parts = flat.split([gradient.numel() for gradient in self._gradients])
        shaped = [part.view_as(gradient) for part, gradient in zip(parts, self._gradients, strict=True)]
        torch._foreach_copy_(self._gradients, shaped)


def _tensors(item: Batch | TokenFeatures) -> list[Tensor]:
    """All tensors of a batch in a fixed order."""
    values = [getattr(item, field.name) for field in fields(item)]
    return [t for value in values for t in (_tensors(value) if isinstance(value, TokenFeatures) else [value])]
