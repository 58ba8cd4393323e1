"""Our attention and its peers behind one interface.

Every implementation is given q, k, v in the layout it is at its best with, copied before the clock starts, and the bias
in the dtype its kernel reads. What it derives from them on every call (concatenated factors, say) is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

import torch
from benchmark_problem import Kind, Problem
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pairformer_fast.config import Backend
from pairformer_fast.kernels.flash_bias import Factors, flash_bias_attention

BACKEND = Backend.TRITON


class Unsupported(Exception):
    """The implementation cannot compute this case."""


def _same(x: Tensor) -> Tensor:
    return x


@dataclass
class Prepared:
    """Inputs of one implementation, named as in :class:`benchmark_problem.Expected`, and its forward on them.

    ``unpack`` takes tensors in q's layout back to ``[I, N, H, D]``, ``unpack_out`` those in the output's.
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    unpack: Callable[[Tensor], Tensor]
    unpack_out: Callable[[Tensor], Tensor]
    dout: Tensor | None

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Output and, where there is ``dout``, the gradients of the leaves."""
        if self.dout is None:
            with torch.no_grad():
                return self.forward(), {}
        out = self.forward()
        gradients = torch.autograd.grad(out, list(self.leaves.values()), self.dout)
        return out, dict(zip(self.leaves, gradients, strict=True))


@dataclass(frozen=True)
class Implementation:
    """Name in the rows, form of the bias, distribution that says its version."""

    name: str
    kind: Kind
    prepare: Callable[[Problem], Prepared]
    distribution: str | None = None

    @property
    def ours(self) -> bool:
        return self.name.startswith("pairformer_fast")

    def version(self) -> str | None:
        """Version of the peer's package, None for our own or if it is not installed."""
        try:
            return self.distribution and metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None


@dataclass(frozen=True)
class _Layout:
    """How q-like tensors ``[I, N, H, D]`` are handed over, and back."""

    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]

    def leaves(self, problem: Problem) -> dict[str, Tensor]:
        return {name: _leaf(problem, self.pack(getattr(problem, name))) for name in "qkv"}

    def prepared(self, problem: Problem, leaves: dict[str, Tensor], forward: Callable[[], Tensor]) -> Prepared:
        dout = None if problem.dout is None else self.pack(problem.dout)
        return Prepared(forward, leaves, self.unpack, self.unpack, dout)


TOKENS = _Layout(_same, _same)  # [I, N, H, D]
TRIANGLE = _Layout(lambda x: x[None], lambda x: x[0])  # [1, I, N, H, D]
HEADS = _Layout(lambda x: x.transpose(1, 2).contiguous(), lambda x: x.transpose(1, 2))  # [I, H, N, D]
CUEQUIVARIANCE = _Layout(lambda x: HEADS.pack(x)[None], lambda x: HEADS.unpack(x[0]))  # [1, I, H, N, D]
TRIFAST = _Layout(lambda x: x.permute(2, 0, 1, 3).contiguous()[None], lambda x: x[0].permute(1, 2, 0, 3))


def _leaf(problem: Problem, x: Tensor) -> Tensor:
    return x.detach().requires_grad_(problem.case.backward)


def _ours(kind: Kind) -> Callable[[Problem], Prepared]:
    def prepare(problem: Problem) -> Prepared:
        single = problem.case.rows is None
        layout = TOKENS if single else TRIANGLE
        tensors = {name: _leaf(problem, x) for name, x in _bias_tensors(problem, kind).items()}
        leaves = layout.leaves(problem) | tensors
        bias: Tensor | Factors | None = tensors.get("bias")
        if "phi_q" in tensors:
            bias = Factors(**tensors, dense_tiles=problem.dense_tiles[None] if kind is Kind.MIXED else None)
        mask = None
        if problem.mask is not None:
            mask = problem.mask.expand(1, -1) if single else problem.mask.expand(1, problem.q.shape[0], -1)
        q, k, v = (leaves[name] for name in "qkv")
        return layout.prepared(problem, leaves, lambda: flash_bias_attention(q, k, v, bias, mask, BACKEND))

    return prepare


def _bias_tensors(problem: Problem, kind: Kind) -> dict[str, Tensor]:
    factors = {"phi_q": problem.phi_q[None], "phi_k": problem.phi_k[None]}
    match kind:
        case Kind.NONE:
            return {}
        case Kind.DENSE:
            return {"bias": problem.dense[None]}
        case Kind.FACTORS:
            return factors
        case Kind.STRUCTURED:
            return factors | {"table": problem.table}
        case Kind.MIXED:
            return factors | {"dense": problem.mixed[None]}


def _masked(bias: Tensor, mask: Tensor | None) -> Tensor:
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


def sdpa_no_bias(problem: Problem) -> Prepared:
    """PyTorch's flash attention, which takes no bias and no mask."""
    if problem.mask is not None:
        raise Unsupported("flash attention of PyTorch takes no mask")
    leaves = HEADS.leaves(problem)

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(leaves["q"], leaves["k"], leaves["v"])

    return HEADS.prepared(problem, leaves, forward)


def sdpa_concatenated(problem: Problem) -> Prepared:
    """PyTorch's flash attention on q and k that the factors are concatenated to; v is padded to that width."""
    if problem.mask is not None:
        raise Unsupported("flash attention of PyTorch takes no mask")
    case = problem.case
    leaves = HEADS.leaves(problem) | {name: _leaf(problem, getattr(problem, name)) for name in ("phi_q", "phi_k")}

    def forward() -> Tensor:
        rows = problem.q.shape[0]
        q = torch.cat([leaves["q"] * case.dim**-0.5, leaves["phi_q"].expand(rows, -1, -1, -1)], -1)
        k = torch.cat([leaves["k"], leaves["phi_k"].expand(rows, -1, -1, -1)], -1)
        v = torch.nn.functional.pad(leaves["v"], (0, case.rank))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, scale=1.0)[..., : case.dim]

    return HEADS.prepared(problem, leaves, forward)


def _sdpa_mask(backend: SDPBackend) -> Callable[[Problem], Prepared]:
    def prepare(problem: Problem) -> Prepared:
        leaves = HEADS.leaves(problem) | {"bias": _leaf(problem, problem.dense)}

        def forward() -> Tensor:
            bias = _masked(leaves["bias"], problem.mask).expand(problem.q.shape[0], -1, -1, -1)
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(leaves["q"], leaves["k"], leaves["v"], attn_mask=bias)

        return HEADS.prepared(problem, leaves, forward)

    return prepare


def flex_attention(problem: Problem) -> Prepared:
    """FlexAttention, compiled for this very shape, with the bias captured in its score_mod."""
    from torch.nn.attention.flex_attention import flex_attention

    leaves, mask = HEADS.leaves(problem) | {"bias": _leaf(problem, problem.dense)}, problem.mask

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            biased = score + bias[h, i, j]
            return biased if mask is None else torch.where(mask[j], biased, -float("inf"))

        return flex_attention(q, k, v, score_mod=add_bias)

    torch._dynamo.reset()
    compiled = torch.compile(attend, dynamic=False, fullgraph=True)
    return HEADS.prepared(problem, leaves, lambda: compiled(*leaves.values()))


def trifast(problem: Problem) -> Prepared:
    """Triton kernels of trifast, which tune themselves at the first call of a size; its mask is True where keys go."""
    if problem.q.shape[0] != problem.case.n:
        raise Unsupported("trifast computes I = N only")
    attend = import_module("trifast").triangle_attention
    leaves = TRIFAST.leaves(problem) | {"bias": _leaf(problem, problem.dense[None])}
    n = problem.case.n
    dropped = torch.zeros(1, n, n, dtype=torch.bool, device=problem.device)
    if problem.mask is not None:
        dropped |= ~problem.mask
    return TRIFAST.prepared(problem, leaves, lambda: attend(*leaves.values(), dropped))


def cuequivariance(problem: Problem) -> Prepared:
    """Kernel of cuEquivariance; on this chip it reads the bias in fp32."""
    attend = import_module("cuequivariance_ops_torch").triangle_attention
    leaves = CUEQUIVARIANCE.leaves(problem) | {"bias": _leaf(problem, problem.dense.float()[None, None])}
    mask = None if problem.mask is None else problem.mask.expand(1, problem.q.shape[0], 1, 1, -1).contiguous()
    return CUEQUIVARIANCE.prepared(problem, leaves, lambda: attend(*leaves.values(), mask=mask))


def turbopairformer(problem: Problem) -> Prepared:
    """Kernels of TurboPairFormer, which pack the projections' layout themselves."""
    attend = import_module("turbopairformer").turbo_attention
    layout = _Layout(lambda x: x[None].transpose(2, 3), lambda x: x[0].transpose(1, 2))  # [1, I, H, N, D], strided
    leaves = layout.leaves(problem) | {"bias": _leaf(problem, problem.dense[None, None])}
    mask = None
    if problem.mask is not None:
        dropped = torch.zeros(problem.case.n, device=problem.device).masked_fill(~problem.mask, -torch.inf)
        mask = dropped.expand(1, problem.q.shape[0], 1, 1, -1).contiguous()
    q, k, v, bias = leaves.values()
    prepared = layout.prepared(problem, leaves, lambda: attend(q, k, v, mask, bias))
    prepared.dout = None if problem.dout is None else TRIANGLE.pack(problem.dout)
    prepared.unpack_out = TRIANGLE.unpack
    return prepared


def claude_kit(problem: Problem) -> Prepared:
    """The FlashPairformer CUDA kernel as BioIR ships it (ClaudeKit): forward, bf16, D = 32, prefix masks."""
    case = problem.case
    if case.backward or case.dtype is not torch.bfloat16 or case.dim != 32:
        raise Unsupported("ClaudeKit computes the forward in bf16 at D = 32 only")
    library = import_module("bionemo_ir.libs._cutedsl_kernels")
    launcher = library.claude_kit_triangle_attention_sm90_D32
    q, k, v = problem.q, problem.k, problem.v
    bias = problem.dense[None]
    rows = q.shape[0]
    kept = case.n if problem.mask is None else int(problem.mask.sum())
    lengths = torch.full((rows,), kept, dtype=torch.int32, device=problem.device)
    no_lse = torch.empty(0, case.n, case.heads, 1, device=problem.device)

    def forward() -> Tensor:
        out = torch.empty_like(q)
        params = launcher.LaunchParams()
        params.q, params.k, params.v = (_view(library, 4, 3, x) for x in (q, k, v))
        params.actual_s_kv = _view(library, 1, 0, lengths)
        params.bias = _view(library, 4, 3, bias)
        params.output = _view(library, 4, 3, out)
        params.lse = _view(library, 3, 2, no_lse)
        params.softmax_scale = case.dim**-0.5
        params.i_dim = rows
        params.stream = torch.cuda.current_stream().cuda_stream
        launcher.launch(params)
        return out

    return TOKENS.prepared(problem, {"q": q, "k": k, "v": v}, forward)


def _view(library: ModuleType, sizes: int, strides: int, x: Tensor) -> Any:
    """BioIR's host view of ``x``: its first ``sizes`` extents and ``strides`` strides."""
    view = getattr(library, f"Tensor{sizes}View")
    return view(x.data_ptr(), tuple(x.shape[:sizes]), tuple(x.stride()[:strides]), x.get_device())


IMPLEMENTATIONS = (
    *(Implementation(f"pairformer_fast {kind}", kind, _ours(kind)) for kind in Kind),
    Implementation("SDPA flash, no bias", Kind.NONE, sdpa_no_bias),
    Implementation("SDPA flash, factors concatenated", Kind.FACTORS, sdpa_concatenated),
    Implementation("SDPA memory-efficient, bias as mask", Kind.DENSE, _sdpa_mask(SDPBackend.EFFICIENT_ATTENTION)),
    Implementation("SDPA cuDNN, bias as mask", Kind.DENSE, _sdpa_mask(SDPBackend.CUDNN_ATTENTION)),
    Implementation("FlexAttention, bias captured", Kind.DENSE, flex_attention),
    Implementation("BioIR ClaudeKit", Kind.DENSE, claude_kit, "bionemo-ir"),
    Implementation("TurboPairFormer", Kind.DENSE, turbopairformer, "turbopairformer"),
    Implementation("cuEquivariance", Kind.DENSE, cuequivariance, "cuequivariance-ops-torch-cu13"),
    Implementation("trifast", Kind.DENSE, trifast, "trifast"),
)
