"""Problems for the kernels of flash_bias, what PyTorch makes of them, and how results are compared."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pairformer_fast.kernels.flash_bias.terms import TILE, BiasTerms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TERMS = ("dense", "phi_q", "phi_k", "table")
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Error allowed where plain PyTorch happens to make none, relative to the largest entry."""


@dataclass(frozen=True)
class Case:
    """Sizes and features of one problem."""

    n: int
    form: str = "factors"
    dtype: torch.dtype = torch.float32
    b: int = 1
    i: int = 3
    m: int | None = None
    h: int = 2
    d: int = 8
    r: int = 5
    w: int = 3
    masks: str = ""
    gate: bool = False
    lse: bool = True

    def __str__(self) -> str:
        m = "" if self.m is None else f"-M{self.m}"
        features = "".join(f"-{part}" for part in (self.form, self.masks, "gate" * self.gate) if part)
        name = str(self.dtype).removeprefix("torch.")
        return f"B{self.b}-I{self.i}-N{self.n}{m}-H{self.h}-D{self.d}-R{self.r}-W{self.w}{features}-{name}"


@dataclass
class Inputs:
    """Tensors that may have gradients, the other inputs, and the gradients that arrive."""

    leaves: dict[str, Tensor]
    dense_tiles: Tensor | None
    mask: Tensor | None
    pair_mask: Tensor | None
    dout: Tensor
    dlse: Tensor | None

    def arguments(self) -> tuple:
        terms = BiasTerms(**{name: self.leaves.get(name) for name in TERMS}, dense_tiles=self.dense_tiles)
        return *(self.leaves[name] for name in "qkv"), terms, self.mask, self.pair_mask, self.leaves.get("gate")


def make(case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    b, i, n, h, d = case.b, case.i, case.n, case.h, case.d
    m = case.m or n

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE, case.dtype)

    def flags(share: float, *size: int) -> Tensor:
        return (torch.rand(*size, generator=generator) < share).to(DEVICE)

    leaves = {"q": draw(b, i, n, h, d), "k": draw(b, i, m, h, d), "v": draw(b, i, m, h, d)}
    if case.form in ("factors", "table", "mixed", "mixed_table"):
        size = case.r**-0.25
        leaves |= {"phi_q": draw(b, h, n, case.r) * size, "phi_k": draw(b, h, m, case.r) * size}
    if case.form in ("table", "mixed_table"):
        leaves["table"] = draw(h, 2 * case.w + 1)
    if case.form in ("dense", "mixed", "mixed_table"):
        leaves["dense"] = draw(b, h, n, m)
    if case.gate:
        leaves["gate"] = draw(b, i, n, h, d)
    dense_tiles = flags(0.5, b, h, -(-n // TILE), -(-m // TILE)) if "mixed" in case.form else None
    mask = flags(0.6, b, i, m) if "rows" in case.masks else None
    pair_mask = flags(0.6, b, n, m) if "pairs" in case.masks else None
    if mask is not None and "padded" in case.masks:
        mask[..., m - m // 4 :] = False
    if "empty" in case.masks:
        for x in (mask, pair_mask):
            if x is not None:
                x[:, -1] = False
    dlse = torch.randn(b, i, h, n, generator=generator).to(DEVICE) if case.lse else None
    return Inputs(leaves, dense_tiles, mask, pair_mask, draw(b, i, n, h, d), dlse)


def torch_results(inputs: Inputs, dtype: torch.dtype, wide: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output, log-sum-exp and all gradients from plain PyTorch, with a table of logits for every row.

    Everything is in ``dtype``, or all but inputs, weights and results is in ``wide``.
    """
    wide = wide or dtype
    narrow = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.leaves.items()}
    leaves = {name: x.to(wide) for name, x in narrow.items()}
    q, k, v = (leaves[name] for name in "qkv")
    n, m = q.shape[2], k.shape[2]
    logits = torch.einsum("binhd,bimhd->bihnm", q, k) * q.shape[-1] ** -0.5
    bias = logits.new_zeros(q.shape[0], q.shape[3], n, m)
    if "phi_q" in leaves:
        bias = leaves["phi_q"] @ leaves["phi_k"].mT
    if "table" in leaves:
        reach = leaves["table"].shape[1] // 2
        gap = torch.arange(n, device=DEVICE)[:, None] - torch.arange(m, device=DEVICE)
        bias = bias + leaves["table"][:, gap.clamp(-reach, reach) + reach]
    if inputs.dense_tiles is not None:
        flags = inputs.dense_tiles.repeat_interleave(TILE, -2).repeat_interleave(TILE, -1)[..., :n, :m]
        bias = torch.where(flags, leaves["dense"], bias)
    elif "dense" in leaves:
        bias = leaves["dense"]
    keep = torch.ones_like(logits, dtype=torch.bool)
    if inputs.mask is not None:
        keep = keep & inputs.mask[:, :, None, None, :]
    if inputs.pair_mask is not None:
        keep = keep & inputs.pair_mask[:, None, None]
    logits = (logits + bias[:, None]).masked_fill(~keep, torch.finfo(wide).min)
    lse = logits.logsumexp(-1)
    weights = logits.softmax(-1).masked_fill(~keep, 0).to(dtype)
    out = torch.einsum("bihnm,bimhd->binhd", weights.to(wide), v)
    if "gate" in leaves:
        out = out * leaves["gate"].sigmoid()
    some = keep.any(-1)
    loss = (out * inputs.dout.to(wide)).sum()
    if inputs.dlse is not None:
        loss = loss + (lse * inputs.dlse.to(wide)).masked_fill(~some, 0).sum()
    gradients = torch.autograd.grad(loss, narrow.values())
    results = {"out": out.detach().to(dtype), "lse": lse.detach().masked_fill(~some, -torch.inf)}
    return results | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}


def assert_as_exact(
    got: dict[str, Tensor],
    plain: dict[str, Tensor],
    truth: dict[str, Tensor],
    floor: float,
    multiples: dict[str, float],
) -> None:
    """Dtypes as of plain PyTorch, and largest and mean errors in multiples of its errors."""
    assert got.keys() == truth.keys()
    for name, want in truth.items():
        assert got[name].dtype == plain[name].dtype, name
        assert got[name].shape == want.shape, name
        assert got[name].isfinite().all(), name
        error, loss = ((x[name].double() - want).abs() for x in (got, plain))
        for kind, measure in (("max", torch.max), ("mean", torch.mean)):
            allowed = multiples[kind] * measure(loss) + floor * measure(want.abs())
            assert measure(error) <= allowed, f"{name}: {kind} {measure(error):.1e}, allowed {allowed:.1e}"


def assert_identical(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, x in want.items():
        assert torch.equal(got[name], x), name


def with_strides(x: Tensor, order: list[int]) -> Tensor:
    """The same values with dimensions laid out in ``order`` and gaps after every entry."""
    spread = x.permute(order).contiguous().repeat_interleave(2, -1)[..., ::2]
    return spread.permute([order.index(axis) for axis in range(x.ndim)])
