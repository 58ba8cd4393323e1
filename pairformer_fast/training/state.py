"""What a run keeps on disk to go on after a kill at any moment: its state, whole or as it was, and its log."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state whole or not at all."""
    partial = path.with_suffix(".tmp")
    torch.save(state, partial)
    os.replace(partial, path)


def read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read what :func:`write_state` wrote.

    Raises
    ------
    ValueError
        If it is something else, or damaged.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else "it ends too early"
        raise ValueError(
            f"{path} cannot be read, remove it to start anew or choose another output folder: {reason}"
        ) from None
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError(f"{path} is no state of a run: choose another output folder")
    return state


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a log of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
