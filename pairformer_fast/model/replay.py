"""Blocks of one kind from one CUDA graph, where launches take longer than the work.

The graph reads its inputs and the parameters from tensors of its own. A block's parameters are copied there before its
replay, a few microseconds of a GPU, so that a stack of any depth costs the capture of one block.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from pairformer_fast.bias import BiasReport, PairBiasAttention
from pairformer_fast.bias.policy import keeps_dense

_log = logging.getLogger(__name__)

KEPT_BYTES = 2**26
"""A graph with larger states is captured anew for every pass through a stack, not held between them."""

States = tuple[Tensor, ...]


class CaptureError(RuntimeError):
    """Something cannot be captured here, such as for lack of memory; the cause says why."""


class Graph(Protocol):
    """What :func:`capture` gives."""

    def replay(self) -> None:
        """Do again what was captured, with what its inputs hold now."""


class GraphMemory:
    """Memory for graphs that are replayed one after the other, kept between them.

    All are captured on one stream: PyTorch gives memory that was freed on a stream to that stream alone.
    """

    def __init__(self) -> None:
        self.capturing = threading.RLock()
        self._stream: torch.cuda.Stream | None = None
        self._anchor: tuple[Any, torch.cuda.CUDAGraph] | None = None

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """Where to capture."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def pool(self, device: torch.device) -> Any:
        """Handle of the pool, to be asked for on the stream.

        PyTorch forgets a pool without graphs, so one that does next to nothing stays.
        """
        if self._anchor is None:
            handle, graph, x = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph(), torch.zeros(1, device=device)
            graph.capture_begin(pool=handle, capture_error_mode="thread_local")
            x.zero_()
            graph.capture_end()
            self._anchor = handle, graph
        return self._anchor[0]

    def abandon(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        """Use another pool from now on: PyTorch (2.11 to 2.13) allocates on in this one for a broken ``graph``."""
        if self._anchor is not None:
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(device.index, self._anchor[0])
                torch._C._cuda_releasePool(device.index, self._anchor[0])
            # Pinned memory goes on asking both whether they are captured.
            _ABANDONED.append((graph, *self._anchor))
            self._anchor = self._stream = None


_ABANDONED: list[Any] = []

_SHARED: WeakValueDictionary[tuple[int | None, int], GraphMemory] = WeakValueDictionary()


def graph_memory(device: torch.device) -> GraphMemory:
    """Memory of all graphs that are replayed on the current stream of a device, which does one after the other."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _SHARED.setdefault((device.index, stream), GraphMemory())


class _CudaGraph:
    """A CUDA graph in memory that outlives it."""

    def __init__(self, device: torch.device, memory: GraphMemory) -> None:
        self._graph, self._device, self._memory = torch.cuda.CUDAGraph(), device, memory

    def capture(self, run: Callable[[], Any], known: bool) -> Any:
        """Capture, after a first run if it is not known; unlike ``torch.cuda.graph``, keep cached memory."""
        side = self._memory.stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            if not known:
                run()
            # thread_local: autograd and the watchdog of NCCL have threads of their own.
            self._graph.capture_begin(pool=self._memory.pool(self._device), capture_error_mode="thread_local")
            try:
                result = run()
                self._graph.capture_end()
            except BaseException as error:
                self._abandon()
                if not isinstance(error, RuntimeError):
                    raise
                raise CaptureError(f"this cannot be captured: {error}") from error
        torch.cuda.current_stream(self._device).wait_stream(side)
        return result

    def _abandon(self) -> None:
        try:
            self._graph.capture_end()
        except RuntimeError:
            self._memory.abandon(self._graph, self._device)

    def replay(self) -> None:
        self._graph.replay()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from freeing graphs of others, which a capture would not survive."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def capture(run: Callable[[], Any], device: torch.device, memory: GraphMemory, known: bool) -> tuple[Graph, Any]:
    """CUDA graph of ``run``, and the result that replays write to.

    Noise that is drawn later is as if nothing had run. What is ``known`` has run with these shapes before, so that all
    of its kernels are compiled; anything else runs once before.

    Raises
    ------
    CaptureError
        If ``run`` does what a graph cannot hold.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    noise = generator.get_state()
    for again in (True, False):
        # A capture that breaks off leaves the generator's state waiting for its end.
        spare = generator.clone_state()
        graph = _CudaGraph(torch.device("cuda", index), memory)
        try:
            with memory.capturing, _no_collection():
                result = graph.capture(run, known)
            break
        except CaptureError as error:
            generator.graphsafe_set_state(spare)
            if not (again and isinstance(error.__cause__, torch.OutOfMemoryError)):
                raise
        # A capture takes none of the memory that PyTorch keeps for others.
        torch.cuda.empty_cache()
    generator.set_state(noise)
    return graph, result


def can_capture(x: Tensor) -> bool:
    """Whether what is done with ``x`` can be captured: on a GPU, where nobody captures it already."""
    return x.is_cuda and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()


def can_replay(blocks: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether a graph can stand for each of ``blocks``: on a GPU, no hooks, and no bias that the host decides about."""
    if not can_capture(x):
        return False
    configs = {}
    for block in blocks:
        for module in block.modules():
            if intervened(module):
                return False
            if isinstance(module, PairBiasAttention):
                if module.learned or module.followed:
                    return False
                configs[id(module.config)] = module.config
    return all(config.graphs and keeps_dense(config, x) for config in configs.values())


def intervened(module: nn.Module) -> bool:
    """Whether a call of a module, its parts aside, does more than the forward of its class."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


@dataclass(frozen=True)
class Call:
    """One pass through a stack of blocks ``(*states, **masks, **flags) -> states``.

    Attributes
    ----------
    masks : mapping of str to Tensor
        Arguments that are the same for all blocks.
    flags : mapping of str
        Arguments that are no tensors.
    """

    masks: Mapping[str, Tensor]
    flags: Mapping[str, Any]

    def __call__(self, block: nn.Module, parameters: Sequence[Tensor], states: States) -> States:
        """What a block gives with ``parameters`` in place of its own."""
        names = (name for name, _ in block.named_parameters())
        arguments = {**self.masks, **self.flags}
        return functional_call(block, dict(zip(names, parameters, strict=True)), states, arguments)

    def copy(self) -> Call:
        """The same with masks that nobody else writes to."""
        return Call({name: mask.clone() for name, mask in self.masks.items()}, self.flags)

    def key(self, states: States) -> tuple[Any, ...]:
        """What a graph depends on beside the values of tensors."""
        tensors = [(x.shape, x.dtype) for x in (*states, *self.masks.values())]
        device = states[0].device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        modes = (torch.get_float32_matmul_precision(), torch.is_inference_mode_enabled(), *_autocast(device))
        return (*tensors, tuple(self.flags.items()), device, stream, *modes)


def _autocast(device: torch.device) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def same_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast as it is, without the cache of casted weights: a graph has to cast them each time."""
    enabled, dtype = _autocast(device)
    return torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=False)


class _Forward:
    """Graph of a block without gradients, whose result takes the place of its states."""

    def __init__(self, block: nn.Module, call: Call, states: States, memory: GraphMemory, known: bool) -> None:
        self.call, self.states = call.copy(), tuple(x.clone() for x in states)
        self.parameters = [x.detach().clone() for x in block.parameters()]
        self._cores = _cores(block)
        self.graph, self._reports = capture(lambda: self._run(block), states[0].device, memory, known)

    @torch.no_grad()
    def _run(self, block: nn.Module) -> list[list[BiasReport]]:
        before = [len(core.report) for core in self._cores]
        with same_autocast(self.states[0].device):
            new = self.call(block, self.parameters, self.states)
        for state, value in zip(self.states, new, strict=True):
            if value.dtype != state.dtype:
                raise CaptureError(f"a block makes {value.dtype} of {state.dtype}")
            if value.data_ptr() != state.data_ptr():
                state.copy_(value)
        reports = [core.report[count:] for core, count in zip(self._cores, before, strict=True)]
        for core, count in zip(self._cores, before, strict=True):
            del core.report[count:]
        return reports

    @torch.no_grad()
    def fill(self, call: Call, states: States) -> None:
        """Take the inputs of a pass, or of a block."""
        _copy([*self.states, *self.call.masks.values()], [*states, *call.masks.values()])

    @torch.no_grad()
    def __call__(self, block: nn.Module) -> None:
        """Update the states by a block, whose reports are as if it had run."""
        _copy(self.parameters, list(block.parameters()))
        self.graph.replay()
        for core, reports in zip(_cores(block), self._reports, strict=True):
            core.report.extend(reports)


class _Backward:
    """Gradients of a block, which runs forward again, as a graph."""

    def __init__(
        self,
        block: nn.Module,
        call: Call,
        states: States,
        dstates: States,
        autocast: Any,
        memory: GraphMemory,
        known: bool,
    ) -> None:
        self.call = call.copy()
        self.states, self.dstates = tuple(x.clone() for x in states), tuple(x.clone() for x in dstates)
        self.parameters = [x.detach().clone() for x in block.parameters()]

        def run() -> list[Tensor | None]:
            return _gradients(block, self.call, self.states, self.dstates, self.parameters, autocast)

        self.graph, self.gradients = capture(run, states[0].device, memory, known)

    def __call__(
        self, call: Call, states: States, dstates: States, parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Gradients of the states and of the parameters."""
        _copy([*self.states, *self.call.masks.values(), *self.dstates], [*states, *call.masks.values(), *dstates])
        _copy(self.parameters, parameters)
        self.graph.replay()
        return [None if x is None else x.clone() for x in self.gradients]


def _gradients(
    block: nn.Module, call: Call, states: States, dstates: States, parameters: Sequence[Tensor], autocast: Any
) -> list[Tensor | None]:
    states = tuple(x.detach().requires_grad_() for x in states)
    parameters = [x.detach().requires_grad_() for x in parameters]
    with torch.enable_grad(), autocast:
        new = call(block, parameters, states)
    return list(torch.autograd.grad(new, (*states, *parameters), dstates, allow_unused=True))


def _copy(held: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    torch._foreach_copy_([x.detach() for x in held], [x.detach() for x in given])


def _cores(block: nn.Module) -> list[PairBiasAttention]:
    return [module for module in block.modules() if isinstance(module, PairBiasAttention)]


class BlockReplay:
    """Passes through stacks of blocks alike, from graphs; used where :func:`can_replay` says so.

    One graph is held, that of the last size, unless its states are large. Several threads take turns.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memories: set[GraphMemory] = set()
        self._held: dict[Any, _Forward] = {}
        self._backward: dict[Any, _Backward | None] = {}
        self._known: set[Any] = set()

    def release(self) -> None:
        """Free what the graphs hold."""
        self._held.clear()
        self._backward.clear()

    def _memory(self, device: torch.device) -> GraphMemory:
        """Kept for the next graph."""
        memory = graph_memory(device)
        self._memories.add(memory)
        return memory

    def backward(
        self, block: nn.Module, call: Call, states: States, dstates: States, autocast: Any
    ) -> _Backward | None:
        """What gives the gradients of all blocks of this size; None where that cannot be captured."""
        key = ("backward", *call.key(states))
        if key not in self._backward:
            self.release()
            try:
                known, memory = key in self._known, self._memory(states[0].device)
                self._backward[key] = _Backward(block, call, states, dstates, autocast, memory, known)
                self._known.add(key)
            except CaptureError as error:
                _log.warning("gradients of %s are computed without a CUDA graph: %s", type(block).__name__, error)
                self._backward[key] = None
        return self._backward[key]

    @torch.no_grad()
    def infer(self, blocks: Sequence[nn.Module], call: Call, states: States, out: States | None = None) -> States:
        """States after all blocks.

        Parameters
        ----------
        blocks : sequence of nn.Module
            With the same parts and shapes of parameters.
        call : Call
            May let blocks write to the states they are given: they are copies.
        states : tuple of Tensor
        out : tuple of Tensor, optional
            Where the result goes, such as the states themselves.
        """
        with self._lock:
            forward = self._forward(blocks[0], call, states)
            forward.fill(call, states)
            for block in blocks:
                forward(block)
            found = tuple(x.clone() for x in forward.states) if out is None else out
            if out is not None:
                _copy(out, forward.states)
            if sum(x.nbytes for x in states) > KEPT_BYTES:
                self._held.clear()
            return found

    def train(self, blocks: Sequence[nn.Module], call: Call, states: States) -> States:
        """States after all blocks, with gradients: each block runs again in the backward pass, as under a checkpoint.

        Arguments as in :meth:`infer`.
        """
        self.release()
        for index, block in enumerate(blocks):
            step = _Step(self, block, call, len(states), last=index == 0)
            states = _Replayed.apply(step, *states, *call.masks.values(), *block.parameters())
        self._held.clear()
        return states

    def _forward(self, block: nn.Module, call: Call, states: States) -> _Forward:
        key = call.key(states)
        if key not in self._held:
            self._held.clear()
            self._held[key] = _Forward(block, call, states, self._memory(states[0].device), key in self._known)
            self._known.add(key)
        return self._held[key]


@dataclass(frozen=True, eq=False)
class _Step:
    """A block of a pass with gradients; ``last`` in its backward pass."""

    replay: BlockReplay
    block: nn.Module
    call: Call
    states: int
    last: bool

    def split(self, tensors: Sequence[Tensor]) -> tuple[States, Call, Sequence[Tensor]]:
        """States, call and parameters."""
        masks = len(self.call.masks)
        given = dict(zip(self.call.masks, tensors[self.states : self.states + masks], strict=True))
        return tuple(tensors[: self.states]), Call(given, self.call.flags), tensors[self.states + masks :]


class _Replayed(torch.autograd.Function):
    """A block whose forward and backward pass are replayed."""

    @staticmethod
    def forward(ctx: Any, step: _Step, *tensors: Tensor) -> States:
        states, call, _ = step.split(tensors)
        device = states[0].device
        forward = step.replay._forward(step.block, call, states)
        ctx.step, ctx.noise, ctx.autocast = step, _noise(device), same_autocast(device)
        ctx.save_for_backward(*tensors)
        forward.fill(call, states)
        forward(step.block)
        return tuple(x.clone() for x in forward.states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dstates: Tensor) -> tuple[Tensor | None, ...]:
        step: _Step = ctx.step
        states, call, parameters = step.split(ctx.saved_tensors)
        device = states[0].device
        backward = step.replay.backward(step.block, call, states, dstates, ctx.autocast)
        now = _noise(device)
        _set_noise(ctx.noise, device)
        if backward is None:
            gradients = _gradients(step.block, call, states, dstates, parameters, ctx.autocast)
        else:
            gradients = backward(call, states, dstates, parameters)
        _set_noise(now, device)
        if step.last:
            step.replay.release()
        of_states, of_parameters = gradients[: step.states], gradients[step.states :]
        return None, *of_states, *(None for _ in call.masks), *of_parameters


def _noise(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_noise(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
