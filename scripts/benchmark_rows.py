"""What every suite of the benchmark writes: rows of JSON that say on what machine they were measured."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from pairformer_fast.inference.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "benchmarks"


def machine(commit: str | None = None) -> dict[str, Any]:
    """Keys that end every row: device, versions and the commit, read from git if it is not given."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{_processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit or _head(),
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write ``rows`` as JSON; a run that is cut off leaves the file as it was before this call."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run, none if there is no file.

    Raises
    ------
    InputError
        If the file is something else.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise InputError(f"{path} has no rows to resume from: {error}") from None
    if not isinstance(rows, list):
        raise InputError(f"{path} has no rows to resume from")
    return rows


def _head() -> str | None:
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return git.stdout.strip() or None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
