"""Problems for both transitions, what fp64 makes of them, and how results are compared."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, silu

from pairformer_fast.config import Backend
from pairformer_fast.kernels.layer_norm import NormParameters
from pairformer_fast.kernels.relu_transition import relu_transition
from pairformer_fast.kernels.transition import transition
from tests.kernels.cases import DEVICE, assert_as_exact

NARROW = torch.bfloat16 if DEVICE == "cuda" else torch.float16

MULTIPLES = {"max": 5.0, "mean": 2.5}
"""Errors allowed, in units of what plain PyTorch loses in the same dtypes."""

SLACK = {torch.float32: 3e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Error allowed beside that, relative to the results, by dtype of the products."""

Inputs = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    """Sizes, dtypes and features of one problem."""

    shape: tuple[int, ...]
    c: int = 16
    hidden: int = 64
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype = torch.float32
    compute: torch.dtype | None = None
    bias: bool = True
    mask: bool = True
    transposed: bool = False

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        dtypes = [str(x).removeprefix("torch.") for x in (self.dtype, self.compute) if x is not None]
        flags = [name for name in ("bias", "mask", "transposed") if getattr(self, name)]
        return "-".join([sizes, f"C{self.c}", f"H{self.hidden}", *dtypes, *flags])


@dataclass(frozen=True)
class Transition:
    """An operation, its parameters after the layer norm as dimensions and scale, and its update by definition.

    ``operator`` begins the names of its operators, which take ``settings`` between eps and the dtype of the products.
    """

    name: str
    function: Callable[..., Tensor]
    parameters: dict[str, tuple[str, Callable[[int, int], float]]]
    update: Callable[[Tensor, dict[str, Tensor]], Tensor]
    residual: bool
    operator: str
    settings: tuple[bool, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def leaves(self) -> tuple[str, ...]:
        """Arguments that may have gradients."""
        return "x", "norm_weight", "norm_bias", *self.parameters

    def make(self, case: Case) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = case.parameters) -> Tensor:
            x = torch.randn(*size, generator=generator, dtype=torch.float64) * scale
            return x.to(DEVICE, dtype).requires_grad_()

        def tokens() -> Tensor:
            if not case.transposed:
                return draw(*case.shape, case.c, dtype=case.dtype)
            b, i, j = case.shape
            wide = draw(b, j, i + 3, case.c, dtype=case.dtype).detach()
            return wide[:, :, 1 : i + 1].transpose(1, 2).requires_grad_()

        x, dout = tokens(), tokens()
        keep = torch.rand(*case.shape, generator=generator) < 0.7
        keep[..., -1] = False
        inputs = {"x": x, "norm_weight": draw(case.c), "norm_bias": draw(case.c) if case.bias else None}
        sizes = {"C": case.c, "H": case.hidden}
        for name, (dimensions, scale) in self.parameters.items():
            inputs[name] = draw(*map(sizes.get, dimensions), scale=scale(case.c, case.hidden))
        return inputs | {"mask": keep.to(DEVICE) if case.mask else None, "dout": dout.detach()}

    def call(self, inputs: Inputs, backend: Backend = Backend.TRITON, **options: Tensor) -> Tensor:
        norm = NormParameters(inputs["norm_weight"], inputs["norm_bias"])
        parameters = (inputs[name] for name in self.parameters)
        return self.function(inputs["x"], norm, *parameters, inputs["mask"], backend=backend, **options)

    def results(
        self, inputs: Inputs, backend: Backend = Backend.TRITON, compute: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Output and all gradients."""
        leaves = {name: inputs[name] for name in self.leaves if inputs[name] is not None}
        with torch.autocast(DEVICE, compute, enabled=compute is not None):
            out = self.call(inputs, backend)
        return _with_gradients(out, leaves, inputs["dout"])

    def exact(self, inputs: Inputs) -> dict[str, Tensor]:
        """The same in fp64, from its definition."""
        given = {name: inputs[name] for name in self.leaves if inputs[name] is not None}
        leaves = {name: x.detach().double().requires_grad_() for name, x in given.items()}
        x = leaves["x"]
        update = self.update(layer_norm(x, x.shape[-1:], leaves["norm_weight"], leaves.get("norm_bias"), 1e-5), leaves)
        update = update if inputs["mask"] is None else update * inputs["mask"][..., None]
        return _with_gradients(x + update if self.residual else update, leaves, inputs["dout"].double())

    def check(self, case: Case) -> None:
        inputs = self.make(case)
        plain = self.results(inputs, Backend.REFERENCE, case.compute)
        slack = SLACK[case.compute or case.dtype]
        assert_as_exact(self.results(inputs, compute=case.compute), plain, self.exact(inputs), slack, MULTIPLES)

    def operator_arguments(self, inputs: Inputs, *, detached: bool = False) -> tuple:
        """Arguments of the operators that begin with x."""
        tensors = [inputs[name] for name in (*self.leaves, "mask")]
        if detached:
            tensors = [None if x is None else x.detach() for x in tensors]
        return *tensors, 1e-5, *self.settings, torch.float32


def _with_gradients(out: Tensor, leaves: dict[str, Tensor], dout: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(out, leaves.values(), dout)
    return {"out": out.detach()} | {f"gradient of {k}": x for k, x in zip(leaves, gradients, strict=True)}


SWIGLU = Transition(
    "transition",
    transition,
    {
        "a_weight": ("HC", lambda c, hidden: (2 / c) ** 0.5),
        "b_weight": ("HC", lambda c, hidden: c**-0.5),
        "out_weight": ("CH", lambda c, hidden: hidden**-0.5),
    },
    lambda y, of: (silu(y @ of["a_weight"].T) * (y @ of["b_weight"].T)) @ of["out_weight"].T,
    residual=True,
    operator="transition",
    settings=(True,),
)
UPDATE = replace(
    SWIGLU,
    name="transition_update",
    function=partial(transition, residual=False),
    residual=False,
    settings=(False,),
)
RELU = Transition(
    "relu_transition",
    relu_transition,
    {
        "weight_1": ("HC", lambda c, hidden: (2 / c) ** 0.5),
        "offset_1": ("H", lambda c, hidden: 1.0),
        "weight_2": ("CH", lambda c, hidden: hidden**-0.5),
        "offset_2": ("C", lambda c, hidden: 1.0),
    },
    lambda y, of: (y @ of["weight_1"].T + of["offset_1"]).clamp(min=0) @ of["weight_2"].T + of["offset_2"],
    residual=False,
    operator="relu_transition",
)
