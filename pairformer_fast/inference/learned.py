"""Which paths of a run take learned factors, and where their networks are."""

from __future__ import annotations

from pathlib import Path

from pairformer_fast.bias import FactorsError
from pairformer_fast.bias.learned import read_shapes, side_file
from pairformer_fast.config import AttentionConfig, Backend, BiasMethod
from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.settings import FoldSettings
from pairformer_fast.model.checkpoint import trained_with_factors

_KEPT = (BiasMethod.AUTO, BiasMethod.LEARNED)


def attention_paths(settings: FoldSettings, checkpoint: Path) -> tuple[AttentionConfig | None, AttentionConfig | None]:
    """Attention of the accelerated path and of the reference; None for one that does not run.

    They are as the settings say, but for weights that were trained with learned factors, which have no dense bias:
    ``auto`` then takes the factors, and so does the reference, in plain PyTorch.

    Raises
    ------
    InputError
        If such weights are asked for any other bias.
    """
    accelerated, reference = settings.accelerated, settings.reference
    if not trained_with_factors(checkpoint):
        return accelerated, reference
    given = [name for name in ("rank", "tolerance") if getattr(settings, name) is not None]
    if settings.bias not in _KEPT or given:
        asked = f"bias {settings.bias}" if settings.bias not in _KEPT else given[0]
        raise InputError(
            f"checkpoint {checkpoint} was trained with learned factors and has no dense bias: drop {asked}"
        )
    if accelerated is not None:
        accelerated = AttentionConfig(bias=BiasMethod.LEARNED)
    if reference is not None:
        reference = AttentionConfig(backend=Backend.REFERENCE, bias=BiasMethod.LEARNED)
    return accelerated, reference


def networks_file(settings: FoldSettings, checkpoint: Path) -> Path | None:
    """Side file that the paths need, found and of these weights; None if they need none.

    Raises
    ------
    InputError
        If it is missing, unreadable or of other weights, or given and not needed.
    """
    paths = attention_paths(settings, checkpoint)
    if not any(path is not None and path.bias is BiasMethod.LEARNED for path in paths):
        if settings.factors is not None:
            raise InputError(f"--factors {settings.factors}: only --bias learned takes factor networks")
        return None
    file = side_file(checkpoint) if settings.factors is None else settings.factors
    if not file.is_file():
        raise InputError(
            f"--bias learned: the checkpoint carries no factor networks ({file} does not exist); give them by --factors"
            f"{'' if trained_with_factors(checkpoint) else ', or choose --bias svd, auto or dense'}"
        )
    try:
        read_shapes(file, checkpoint)
    except FactorsError as error:
        raise InputError(str(error)) from error
    return file
