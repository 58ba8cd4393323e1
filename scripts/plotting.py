"""matplotlib for the scripts that draw: SVG files that are the same on every run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


def pyplot(salt: str) -> ModuleType:
    """``matplotlib.pyplot`` that writes SVG with text as text; ``salt`` makes the ids in a file repeatable."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit(f"{Path(sys.argv[0]).name}: matplotlib is missing: pip install 'pairformer_fast[plot]'")
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9})
    import matplotlib.pyplot

    return matplotlib.pyplot


def running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """Means of ``width`` (at most all) values that follow one another; the first is that of the leading ones."""
    width = min(width, len(values))
    return np.convolve(values, np.full(width, 1 / width), "valid")


def read_json(path: Path, made_by: str) -> Any:
    """Content of a file.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is missing or no JSON; the message names the command that makes it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; write it with: {made_by}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); write it with: {made_by}") from None
