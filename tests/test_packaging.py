"""What a user installs: a wheel in an empty environment, run from another folder."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from importlib import metadata
from pathlib import Path

import gemmi
import pytest

import pairformer_fast

INSTALLED_AS = {
    "pairformer_fast": "pairformer_fast",
    "kernels": "pairformer_fast/kernels",
    "configs": "pairformer_fast/configs",
    "data": "pairformer_fast/data",
}
WEIGHTS = "data/weights/antibody.safetensors"
VH = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRY"
    "ADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
)
HASH_RESOURCES = """
import json
from hashlib import sha256
from importlib import resources

def walk(folder, prefix):
    for entry in folder.iterdir():
        name = f"{prefix}/{entry.name}"
        if entry.is_dir():
            yield from walk(entry, name)
        else:
            yield name, sha256(entry.read_bytes()).hexdigest()

print(json.dumps({name: digest for folder in ("configs", "data")
                  for name, digest in walk(resources.files(f"pairformer_fast.{folder}"), folder)}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed; nothing of this environment leaks into it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(command, cwd=cwd, env=environment | {"COLUMNS": "120"}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_wheel(source: Path, output: Path) -> Path:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", output, source, cwd=output.parent)
    [wheel] = output.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, int]:
    """Checksum by name of what a wheel installs."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist() if not entry.filename.endswith("/RECORD")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, repository: Path, tracked_files: list[Path]) -> Path:
    """Copy of the tracked files: neither stray files nor earlier builds can end up in what is built from it."""
    folder = tmp_path_factory.mktemp("checkout")
    for file in tracked_files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repository / file, folder / file)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel") / "dist")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``bin`` of an environment that holds the wheel, its dependencies and nothing else."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment.parent)
    python = environment / "bin" / "python"
    torch = f"torch=={metadata.version('torch').partition('+')[0]}"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-compile", torch, wheel, cwd=environment.parent
    )
    yield environment / "bin"
    shutil.rmtree(environment)


def test_wheel_holds_every_tracked_file(wheel: Path, tracked_files: list[Path]) -> None:
    expected = {
        "/".join([INSTALLED_AS[file.parts[0]], *file.parts[1:]])
        for file in tracked_files
        if file.parts[0] in INSTALLED_AS
    }
    installs = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert installs == expected, "setup.cfg: packages or package_data is incomplete"


def test_sdist_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, checkout, cwd=tmp_path)
    [sdist] = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        # Python before 3.11.4 has no filters.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = sdist.with_name(sdist.name.removesuffix(".tar.gz"))
    assert contents(build_wheel(unpacked, tmp_path / "dist")) == contents(wheel)


def test_import_and_help_are_quick(tmp_path: Path) -> None:
    heavy = {"torch", "triton", "biotite", "Bio", "matplotlib"}
    for module in ("pairformer_fast", "pairformer_fast.cli"):
        loaded = run(sys.executable, "-c", f"import sys, {module}; print(*sys.modules)", cwd=tmp_path).split()
        assert not heavy & set(loaded), f"import {module} loads {heavy & set(loaded)}"


def test_public_names_resolve() -> None:
    for name in pairformer_fast.__all__:
        assert getattr(pairformer_fast, name) is not None
    assert set(pairformer_fast.__all__) <= set(dir(pairformer_fast))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = pairformer_fast.no_such_name


@pytest.mark.slow
def test_command_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    assert pairformer_fast.__version__ in run(installed / "pairformer-fast", "--version", cwd=tmp_path)
    help_text = run(installed / "pairformer-fast", "--help", cwd=tmp_path)
    assert "fold" in help_text
    assert "compare" in help_text


@pytest.mark.slow
def test_installed_resources_are_complete(
    installed: Path, repository: Path, tracked_files: list[Path], tmp_path: Path
) -> None:
    expected = {
        str(file): sha256((repository / file).read_bytes()).hexdigest()
        for file in tracked_files
        if file.parts[0] in ("configs", "data")
    }
    for python in (installed / "python", Path(sys.executable)):
        found = json.loads(run(python, "-c", HASH_RESOURCES, cwd=tmp_path))
        assert found.items() >= expected.items(), f"{python} does not find them all"


@pytest.mark.slow
def test_installed_command_folds(installed: Path, repository: Path, tmp_path: Path) -> None:
    assert (repository / WEIGHTS).is_file(), f"{WEIGHTS} is missing: without it an installation cannot fold"
    (tmp_path / "in.fasta").write_text(f">vh\n{VH}\n")
    run(installed / "pairformer-fast", "fold", "in.fasta", "out", "--no-compare", cwd=tmp_path)
    [chain] = gemmi.read_structure(str(tmp_path / "out" / "vh" / "vh_flashbias.cif"))[0]
    assert gemmi.one_letter_code([residue.name for residue in chain]) == VH
    steps = [a["CA"][0].pos.dist(b["CA"][0].pos) for a, b in zip(chain, list(chain)[1:], strict=False)]
    assert 3.6 < sum(steps) / len(steps) < 4.0, "CA atoms in sequence are 3.8 Å apart in a folded chain"
