"""Structures of VH/VL pairs predicted by flash-abb (BSD-3, PyPI), the teacher for sequences without a crystal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from pairformer_fast.model.residue import ATOM14, RESTYPES


@dataclass(frozen=True)
class TeacherStructure:
    """``atom14`` is ``[NH + NL, 14, 3]`` float32, Å, in our atom14 order; ``plddt`` ``[NH + NL]`` float32, 0 to 100."""

    atom14: np.ndarray
    plddt: np.ndarray


def predict_pairs(
    pairs: Sequence[tuple[str, str]],
    batch_size: int = 8,
    device: str = "cpu",
    on_progress: Callable[[int], None] | None = None,
) -> list[TeacherStructure]:
    """Predict Fv structures from VH and VL sequences, in the order given.

    Parameters
    ----------
    pairs : sequence of (str, str)
        VH and VL.
    batch_size : int
        Pairs of similar length predicted together.
    device : str
    on_progress : callable, optional
        Called with the number of pairs each batch had.

    Raises
    ------
    ImportError
        If flash-abb is not installed.
    RuntimeError
        If the teacher orders residue types or atoms in another way than we do.
    """
    try:
        from flash_abb import pretrained
        from flash_abb.model.openfold.np import residue_constants
    except ImportError:
        raise ImportError(
            "the teacher is not installed: pip install 'pairformer_fast[train]', or leave the pairs out with --no-pairs"
        ) from None
    _check_order(residue_constants)
    model = pretrained(device=device)
    order = sorted(range(len(pairs)), key=lambda i: (sum(map(len, pairs[i])), i))
    structures: dict[int, TeacherStructure] = {}
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        with torch.inference_mode():
            result = model(["|".join(pairs[i]) for i in batch])
        coords, logits = result.coords.float().cpu(), result.output["plddt"].float().cpu()
        centres = (torch.arange(logits.shape[-1]) + 0.5) * (100 / logits.shape[-1])
        plddt = logits.softmax(-1) @ centres
        for row, i in enumerate(batch):
            length = sum(map(len, pairs[i]))
            structures[i] = TeacherStructure(coords[row, :length].numpy().copy(), plddt[row, :length].numpy().copy())
        if on_progress is not None:
            on_progress(len(batch))
    return [structures[i] for i in range(len(pairs))]


def _check_order(constants: ModuleType) -> None:
    if "".join(constants.restypes) != RESTYPES:
        raise RuntimeError(f"the teacher orders residue types as {''.join(constants.restypes)}, expected {RESTYPES}")
    for letter, names in ATOM14.items():
        theirs = [name for name in constants.restype_name_to_atom14_names[constants.restype_1to3[letter]] if name]
        if theirs != list(names):
            raise RuntimeError(f"the teacher orders the atoms of {letter} as {theirs}, expected {list(names)}")
