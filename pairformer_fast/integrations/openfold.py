"""OpenFold for AlphaFold 2: attention with a pair bias, triangle multiplication and transitions.

For the package imported as ``openfold``: PyPI's 0.0.1 and GitHub's 2.x, told apart by the parts of a module, not by a
version. In attention only what lies between q, k, v and the gate is replaced. Layer norms, projections, the pair bias,
the gate and the output stay OpenFold's own, and with them the orientation of the bias around the ending node: b[k, i]
as in AlphaFold 2, not b[i, k] as in AlphaFold 3, since it is projected from the transposed pair representation. Nothing
here transposes it. Triangle multiplication runs here as a whole, with OpenFold's weights and offsets, and so do
transitions where Triton runs. All other attention is not touched.

Two things differ from OpenFold on purpose. A row whose keys are all masked gives zeros, where OpenFold averages over
masked values; this concerns padding alone if a residue that the sequence masks is masked in every row of the MSA, rows
of template angles included. And the host's flags for chunks, checkpoints of chunks, in-place work and kernels do not
reach attention, which never holds a table of all its weights, and without gradients works on large inputs in slabs.
"""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

from typing import Any

from openfold.model.msa import MSARowAttentionWithPairBias
from openfold.model.primitives import Attention
from openfold.model.triangular_attention import TriangleAttention, TriangleAttentionEndingNode
from torch import Tensor, cat, nn

from pairformer_fast.bias import PairBiasAttention
from pairformer_fast.integrations import openfold_updates as updates
from pairformer_fast.integrations.acceleration import (
    NewClass,
    Plan,
    Skipped,
    Target,
    attention_owners,
    instance_obstacle,
    sort_out,
)
from pairformer_fast.model.attention import SAMPLED_ROWS
from pairformer_fast.model.slabs import rows_at_a_time

ROWS_AT_ONCE = 256
"""Rows of the pair representation that are normalised for its bias at once, as in OpenFold."""

LARGEST_TEMPORARIES = 5
"""Of attention, each with the width of all heads: q, k, v, what they make, gate."""


class FastAttention(Attention):
    """Multi-head attention whose core is a :class:`~pairformer_fast.bias.PairBiasAttention`."""

    core: PairBiasAttention

    def forward(
        self, q_x: Tensor, kv_x: Tensor, biases: list[Tensor] | None = None, *limits: Any, **kernel_flags: Any
    ) -> Tensor:
        """Attend; without a pair bias this is the host's code, flags included.

        Parameters
        ----------
        q_x, kv_x : Tensor
            ``[*, I, N, C]``.
        biases : list of Tensor
            Mask bias ``[*, I, 1, 1, N]``, 0 for keys to keep, and the pair bias ``[*, 1, H, N, N]`` of all I rows.

        Returns
        -------
        Tensor
            ``[*, I, N, C]``.
        """
        if biases is None or len(biases) != 2:
            return super().forward(q_x, kv_x, biases, *limits, **kernel_flags)
        mask_bias, pair_bias = biases
        *batch, rows, tokens, _ = q_x.shape
        keep = (mask_bias == 0)[..., 0, 0, :].expand(*batch, rows, tokens).reshape(-1, rows, tokens)
        bias = pair_bias.squeeze(-4).expand(*batch, self.no_heads, tokens, tokens)
        bias = bias.reshape(-1, self.no_heads, tokens, tokens)
        slab = rows_at_a_time(q_x.reshape(-1, *q_x.shape[-3:]), LARGEST_TEMPORARIES * len(self.linear_q.weight))
        if slab is None:
            q, k, v = self._heads(q_x, kv_x)
            return self._output(self.core(q, k, v, bias.to(q.dtype), keep), q_x)
        some = slice(None, None, -(-rows // SAMPLED_ROWS))
        q, k, _ = self._heads(q_x[..., some, :, :], kv_x[..., some, :, :])
        decided = self.core.decide(q, k, bias.to(q.dtype), keep[:, some])
        out = q.new_empty(q_x.shape)
        for start in range(0, rows, slab):
            part = slice(start, start + slab)
            q, k, v = self._heads(q_x[..., part, :, :], kv_x[..., part, :, :])
            attended = self.core.attend(q, k, v, decided, keep[:, part])
            out[..., part, :, :] = self._output(attended, q_x[..., part, :, :])
        return out

    def _heads(self, q_x: Tensor, kv_x: Tensor) -> list[Tensor]:
        """q, k and v ``[B, I, N, H, D]``, whatever the leading dimensions of ``[*, I, N, C]``."""
        layers = (self.linear_q, q_x), (self.linear_k, kv_x), (self.linear_v, kv_x)
        split = (linear(x).unflatten(-1, (self.no_heads, -1)) for linear, x in layers)
        return [x.reshape(-1, *x.shape[-4:]) for x in split]

    def _output(self, attended: Tensor, q_x: Tensor) -> Tensor:
        """Gated and projected, ``[*, I, N, C]``."""
        return self._wrap_up(attended.view(*q_x.shape[:-1], *attended.shape[-2:]), q_x)


class FastTriangleAttention(TriangleAttention):
    """Triangle attention that OpenFold does not cut into chunks of rows: one factorisation serves all of them."""

    def _chunk(self, x: Tensor, biases: list[Tensor], *_limits: Any, **_flags: Any) -> Tensor:
        return self.mha(q_x=x, kv_x=x, biases=biases)


class FastTriangleAttentionEndingNode(FastTriangleAttention, TriangleAttentionEndingNode):
    """The same for the class that transposes by itself."""


class FastMSARowAttentionWithPairBias(MSARowAttentionWithPairBias):
    """Row attention that cuts neither the MSA into chunks nor the softmax."""

    def forward(
        self, m: Tensor, z: Tensor | None = None, mask: Tensor | None = None, *limits: Any, **flags: Any
    ) -> Tensor:
        """Attend within each sequence of the MSA; without ``z`` this is the host's code, flags included.

        Parameters
        ----------
        m : Tensor
            ``[*, S, N, C_m]``.
        z : Tensor
            ``[*, N, N, C_z]``.
        mask : Tensor, optional
            ``[*, S, N]``, 1 = keep.

        Returns
        -------
        Tensor
            ``[*, S, N, C_m]``.
        """
        if z is None:
            return super().forward(m, z, mask, *limits, **flags)
        mask = m.new_ones(m.shape[:-1]) if mask is None else mask
        bias = cat([self.linear_z(self.layer_norm_z(rows)) for rows in z.split(ROWS_AT_ONCE, dim=-3)], dim=-3)
        m = self.layer_norm_m(m)
        biases = [self.inf * (mask - 1)[..., None, None, :], bias.movedim(-1, -3).unsqueeze(-4)]
        return self.mha(q_x=m, kv_x=m, biases=biases)


_NEW_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    TriangleAttention: FastTriangleAttention,
    TriangleAttentionEndingNode: FastTriangleAttentionEndingNode,
    MSARowAttentionWithPairBias: FastMSARowAttentionWithPairBias,
}
"""By exact class: a subclass may compute something else."""

_PARTS: dict[type[nn.Module], tuple[str, ...]] = {
    TriangleAttention: ("layer_norm", "linear", "starting", "_chunk"),
    MSARowAttentionWithPairBias: ("layer_norm_m", "layer_norm_z", "linear_z", "inf"),
    Attention: ("linear_q", "linear_k", "linear_v", "linear_o", "linear_g", "no_heads", "_wrap_up"),
}
"""What has to be there, whatever the release."""

_OTHER: dict[str, str] = {
    "MSAAttention": "has no pair bias: it attends along the columns of an MSA",
    "GlobalAttention": "global attention has no pair bias",
    "TemplatePointwiseAttention": "attends over templates, without a pair bias",
    "InvariantPointAttention": "its logits depend on frames and points beside the pair bias",
    "InvariantPointAttentionMultimer": "its logits depend on frames and points beside the pair bias",
}
"""By name, since releases differ in which they have."""


def plan(model: nn.Module) -> Plan:
    """What to swap in ``model``; nothing is changed yet.

    Raises
    ------
    ValueError
        If there is nothing to swap.
    """
    targets, skipped = sort_out(model, attention_owners(model, Attention), _obstacle, _target, _NEW_CLASS)
    around = {}
    for path, module in model.named_modules():
        if not updates.is_known(module):
            continue
        if (reason := updates.obstacle(module)) is None:
            around[path] = NewClass(module, updates.NEW_CLASS[type(module)])
        else:
            skipped.append(Skipped.of(path, module, reason))
    return Plan(targets, skipped, around)


def _target(path: str, module: nn.Module) -> Target:
    mha = module.get_submodule("mha")
    return Target(path, (NewClass(module, _NEW_CLASS[type(module)]), NewClass(mha, FastAttention)), mha)


def _obstacle(module: nn.Module) -> str | None:
    """Why ``module`` cannot be swapped; None if it can."""
    if isinstance(getattr(module, "mha", None), FastAttention):
        return "accelerated already; restore it first, or set another config with set_attention"
    if type(module) not in _NEW_CLASS:
        if isinstance(module, tuple(_NEW_CLASS)):
            return "a subclass, which may compute something else"
        return _OTHER.get(type(module).__name__, "not an attention that is known here")
    if type(module.mha) is not Attention:
        return f"its mha is not OpenFold's Attention but {type(module.mha).__qualname__}"
    for part in (module, module.mha):
        names = [name for cls, names in _PARTS.items() if isinstance(part, cls) for name in names]
        if missing := [name for name in names if not hasattr(part, name)]:
            return f"of a release of OpenFold that is not supported: it has no {', '.join(missing)}"
    return instance_obstacle(module)
