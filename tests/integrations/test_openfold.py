"""An OpenFold (for AlphaFold 2) whose attention runs through this package, in an environment of its own.

PyPI's 0.0.1 declares no dependencies, its source distribution lacks the ``scripts`` that its ``setup.py`` imports, and
its softmax is a CUDA extension without which it cannot be imported: all three are made up for here.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

OPENFOLD = "openfold==0.0.1"
NEEDS = ("dm-tree", "ml_collections", "scipy")
CHECKS = Path(__file__).with_name("openfold_checks.py")
BUILD_SCRIPTS = """
from setuptools import Distribution

Distribution.has_ext_modules = lambda distribution: False  # without a GPU the extension would raise when called


def get_nvidia_cc():
    return None, None
"""
SOFTMAX = """
def forward_(logits, rows, columns):
    logits.copy_(logits.softmax(-1))


def backward_(weights, grad_output, values, rows, columns, width):
    grad_weights = grad_output @ values.transpose(-1, -2)
    weights.mul_(grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(command, cwd=cwd, env=inherited | variables, capture_output=True, text=True)


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Interpreter that finds OpenFold, and everything that this one finds."""
    interpreter = tmp_path / "venv" / "bin" / "python"
    made = run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    [packages] = (tmp_path / "venv").glob("lib/python*/site-packages")
    ours = sysconfig.get_paths()["purelib"]
    (packages / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    (packages / "attn_core_inplace_cuda.py").write_text(SOFTMAX)
    scripts = tmp_path / "shim" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "__init__.py").touch()
    (scripts / "utils.py").write_text(BUILD_SCRIPTS)

    install = (sys.executable, "-m", "pip", "--python", interpreter, "install", "--retries", "1")
    for arguments in (NEEDS, ("--no-deps", "--no-build-isolation", "--no-cache-dir", OPENFOLD)):
        done = run(*install, *arguments, cwd=tmp_path, PYTHONPATH=str(scripts.parent))
        if "No matching distribution found" in done.stderr:
            pytest.skip(f"needs a package index with {', '.join(NEEDS)} and {OPENFOLD}: {done.stderr.splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
    return interpreter


@pytest.mark.slow
def test_accelerated_openfold_computes_and_learns_what_openfold_does(python: Path, repository: Path) -> None:
    pytest_run = (python, "-m", "pytest", "-p", "no:cacheprovider", "--disable-warnings", CHECKS)
    done = run(*pytest_run, cwd=repository, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
