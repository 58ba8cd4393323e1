"""A Pairformer replayed from CUDA graphs: inference with few tokens, where launches take longer than the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pairformer_fast.bias import PairBiasAttention
from pairformer_fast.bias.policy import keeps_dense

BUCKET = 32
LARGEST = 512
WARM_UP = 2


@dataclass(frozen=True, eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, Tensor]


class GraphedPairformer:
    """Runs a block or stack by CUDA graphs, one for each number of tokens rounded up to a multiple of ``bucket``.

    Masked tokens are added to fill a bucket. Parameters are read where they lie: weights may be loaded into them, but
    not replaced or moved. A graph is captured at the first call of its size, and holds its memory until the end.

    Parameters
    ----------
    module : nn.Module
        :class:`~pairformer_fast.model.pairformer.PairformerBlock` or ``PairformerStack`` on a CUDA device, in
        ``eval()`` mode.
    bucket : int
        Sizes that share a graph differ by less than this.
    largest : int
        More tokens than this are computed without a graph.

    Raises
    ------
    ValueError
        If the module is not on a GPU.
    """

    def __init__(self, module: nn.Module, *, bucket: int = BUCKET, largest: int = LARGEST) -> None:
        device = next(module.parameters()).device
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs need a module on a GPU, but its parameters are on {device}")
        self.module = module
        self.bucket = bucket
        self.largest = largest
        self._captured: dict[Any, _Captured] = {}

    @torch.no_grad()
    def __call__(self, s: Tensor, z: Tensor, mask: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Updated ``s [B, N, C_s]`` and ``z [B, N, N, C_z]``; arguments as of the module.

        Raises
        ------
        RuntimeError
            If the module is in training mode, or its configuration decomposes biases, which asks the host.
        """
        self._check(z)
        tokens = s.shape[1]
        size = -(-tokens // self.bucket) * self.bucket
        if size > self.largest:
            return self.module(s, z, mask, pair_mask)
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        cores = ((core.config, core.attached) for core in self._cores())
        key = (len(s), size, s.dtype, z.dtype, autocast, *cores)
        if key not in self._captured:
            self._captured[key] = self._capture(s, z, size)
        captured = self._captured[key]
        held_s, held_z, held_mask, held_pair_mask = captured.inputs
        held_s[:, :tokens] = s
        held_z[:, :tokens, :tokens] = z
        held_mask.zero_()[:, :tokens] = mask
        held_pair_mask.zero_()[:, :tokens, :tokens] = pair_mask
        captured.graph.replay()
        s_out, z_out = captured.outputs
        return s_out[:, :tokens].clone(), z_out[:, :tokens, :tokens].clone()

    def _cores(self) -> list[PairBiasAttention]:
        return [module for module in self.module.modules() if isinstance(module, PairBiasAttention)]

    def _check(self, z: Tensor) -> None:
        if self.module.training:
            raise RuntimeError("CUDA graphs are for inference here: call eval() on the module")
        if not all(core.learned or keeps_dense(core.config, z[..., :1]) for core in self._cores()):
            raise RuntimeError(
                "a bias is decomposed by asking the host, which a CUDA graph cannot hold: set bias 'dense', 'learned', "
                "or 'auto' where its costs keep the dense bias"
            )

    def _capture(self, s: Tensor, z: Tensor, size: int) -> _Captured:
        batch = len(s)
        inputs = (
            s.new_zeros(batch, size, s.shape[-1]),
            z.new_zeros(batch, size, size, z.shape[-1]),
            torch.ones(batch, size, dtype=torch.bool, device=s.device),
            torch.ones(batch, size, size, dtype=torch.bool, device=s.device),
        )
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.module(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        # Autocast would reuse weights that it cast outside of the graph.
        torch.clear_autocast_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.module(*inputs)
        return _Captured(graph, inputs, outputs)
