"""What every test may use: the checkout, public structures outside it, and guards against uninitialised memory."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pairformer_fast import user_errors

if not torch.cuda.is_available():
    # Read when Triton is first imported, which any test's imports may do.
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parents[1]
EMPTY_CONSTRUCTORS = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA GPU; files with slow tests go first, so that none is last."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA GPU here: run `make gpu-test` on a machine that has one")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of scripts/."""
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module


@pytest.fixture
def run_script(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a script of scripts/ in this process: exit status, stdout and stderr."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as info:
            user_errors.run_script(script(name).main)
        return info.value.code, *capsys.readouterr()

    return run


class Meter:
    """Stands in for the stopwatch of the benchmarks, which needs a GPU."""

    def __init__(self, timing: tuple[float, float, float]) -> None:
        self.timing = timing

    def graph(self, call, fault):
        assert not fault(call())
        return self.timing

    def eager(self, call):
        call()
        return type(self.timing)(*(10 * ms for ms in self.timing))

    def peak_bytes(self, call):
        return 0


@pytest.fixture
def meter(script) -> Meter:
    """Every replay of a graph takes 1 ms, every eager call 10."""
    return Meter(script("benchmark_gpu").Timing(1.0, 0.9, 1.1))


@pytest.fixture(scope="session")
def tracked_files() -> list[Path]:
    """Files under version control that exist, relative to the root of the checkout."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout: run this in a clone of the repository")
    return [Path(name) for name in listing.stdout.split("\0") if name and (REPOSITORY / name).is_file()]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of public structures that are not part of the repository."""
    folder = Path(os.environ.get("PAIRFORMER_FAST_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no structures at {folder}: set PAIRFORMER_FAST_DATA to the folder that holds them")
    return folder


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill memory that code asks for uninitialised with NaN, so that reading it shows in every result."""

    def poison(allocate):
        def poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            floating = tensor.is_floating_point() or tensor.is_complex()
            return tensor.detach().fill_(torch.nan).requires_grad_(tensor.requires_grad) if floating else tensor

        return poisoned

    for owner, name in EMPTY_CONSTRUCTORS:
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
