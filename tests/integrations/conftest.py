import math
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def quick_initialisation():
    """Draw OpenFold3's initial weights with PyTorch, whose generator tests seed: SciPy takes seconds for each model."""
    host = sys.modules.get("openfold3.core.model.primitives.initialization")
    if host is None:
        yield
        return

    def draw(weights: torch.Tensor, scale: float = 1.0, fan: str = "fan_in") -> None:
        std = math.sqrt(scale / host._calculate_fan(weights.shape, fan)) / 0.8796  # of a normal cut at two deviations
        torch.nn.init.trunc_normal_(weights, std=std, a=-2 * std, b=2 * std)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "trunc_normal_init_", draw)
        yield


@pytest.fixture(scope="session", autouse=True)
def surfaces_of_lone_atoms():
    """Rank samples as if no atom covered another: random weights scatter atoms over thousands of Å.

    There the grid that finds neighbours takes a second for each chain of each sample.
    """
    host = sys.modules.get("openfold3.core.metrics.rasa")
    if host is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "_calculate_atom_sasa", lambda chain, **_: np.full(len(chain), 100.0))
        yield


@pytest.fixture(autouse=True)
def unchanged_matmul_precision():
    """Put back the precision of fp32 products, which OpenFold3's runner lowers for the whole process."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def run(*command: str | Path, cwd: Path, **variables: str) -> None:
    """Run a command, and skip the test if a package is not to be had."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(command, cwd=cwd, env=inherited | variables, capture_output=True, text=True)
    if "No matching distribution found" in done.stderr:
        pytest.skip(f"needs a package index with more: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def run_checks(tmp_path: Path, repository: Path) -> Callable[..., None]:
    """Run ``HOST*_checks.py`` in an environment that finds everything that this one finds, and more.

    Takes the host, the arguments of each ``pip install``, stand-ins for modules by their paths, which the installations
    find too, and environment variables of the checks.
    """

    def make_and_run(
        host: str, installations: Sequence[Sequence[str]], stand_ins: Mapping[str, str], **variables: str
    ) -> None:
        interpreter = tmp_path / "venv" / "bin" / "python"
        run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
        [packages] = (tmp_path / "venv").glob("lib/python*/site-packages")
        ours, others = sysconfig.get_paths()["purelib"], tmp_path / "stand_ins"
        (packages / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n{others}\n")
        for name, text in stand_ins.items():
            path = others / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            for folder in path.relative_to(others).parents[:-1]:
                (others / folder / "__init__.py").touch()
        install = (sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-compile", "--retries", "1")
        for arguments in installations:
            run(*install, *arguments, cwd=tmp_path, PYTHONPATH=str(others))
        options = ("-p", "no:cacheprovider", "--disable-warnings")
        modules = sorted(Path(__file__).parent.glob(f"{host}*_checks.py"))
        run(interpreter, "-m", "pytest", *options, *modules, cwd=repository, OMP_NUM_THREADS="1", **variables)

    return make_and_run
