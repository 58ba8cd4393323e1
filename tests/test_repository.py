"""The layout and the documentation stay true to what is there."""

import configparser
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import pairformer_fast
from pairformer_fast.config import ModelConfig
from pairformer_fast.inference.fasta import read_fasta
from pairformer_fast.inference.validate import check_domain
from pairformer_fast.training.settings import TrainConfig

TOP_LEVEL = {
    *("pairformer_fast", "kernels", "configs", "data", "scripts", "tests"),
    *(".ci", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE"),
    *("MANIFEST.in", "Makefile", "README.md", "pyproject.toml", "ruff.toml", "setup.cfg"),
}
DATA_FOLDERS = {"weights": ".safetensors", "golden": ".cif", "examples": ".fasta", "benchmarks": ".json"}
MAX_LINES = 500
MAX_BYTES = 16 * 2**20
ABSOLUTE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|home|Users)/")


@pytest.fixture(scope="module")
def setup_cfg(repository: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(repository / "setup.cfg", encoding="utf-8")
    return parser


def test_top_level_is_fixed(tracked_files: list[Path]) -> None:
    assert {file.parts[0] for file in tracked_files} <= TOP_LEVEL


def test_every_code_folder_is_packaged(setup_cfg: configparser.ConfigParser, tracked_files: list[Path]) -> None:
    inside = {
        "kernels": "pairformer_fast.kernels",
        "configs": "pairformer_fast.configs",
        "data": "pairformer_fast.data",
    }
    folders = {
        ".".join([inside.get(file.parts[0], file.parts[0]), *file.parts[1:-1]])
        for file in tracked_files
        if file.suffix == ".py" and file.parts[0] in {"pairformer_fast", *inside}
    }
    assert set(setup_cfg["options"]["packages"].split()) == folders


def test_files_stay_small(repository: Path, tracked_files: list[Path]) -> None:
    long = {
        str(file): lines
        for file in tracked_files
        if file.suffix == ".py" and file.parts[0] in ("pairformer_fast", "kernels", "scripts")
        if (lines := len((repository / file).read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"over {MAX_LINES} lines: split them"
    assert not [str(file) for file in tracked_files if (repository / file).stat().st_size > MAX_BYTES]


def test_no_path_of_one_machine(repository: Path, tracked_files: list[Path]) -> None:
    found = []
    for file in tracked_files:
        content = (repository / file).read_bytes()
        if b"\0" not in content:
            found += [f"{file}: {hit}" for hit in ABSOLUTE_PATH.findall(content.decode("utf-8"))]
    assert not found


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_documents_name_files_that_exist(document: str, repository: Path) -> None:
    text = (repository / document).read_text(encoding="utf-8")
    quoted = re.findall(r"`([\w./-]+)`", text) + re.findall(r"\]\(([^):#]+)\)", text)
    paths = [path for path in quoted if path.split("/")[0] in TOP_LEVEL - {"pairformer_fast"} and "/" in path]
    missing = [path for path in paths if not (repository / path).exists()]
    assert not missing, f"{document} names files that are not there"


def test_data_is_not_ignored(repository: Path) -> None:
    names = [f"data/{folder}/x{suffix}" for folder, suffix in DATA_FOLDERS.items()]
    ignored = subprocess.run(["git", "check-ignore", *names], cwd=repository, capture_output=True, text=True)
    assert ignored.returncode == 1, f".gitignore hides {ignored.stdout}"


def test_data_folders_are_fixed(tracked_files: list[Path]) -> None:
    folders = {file.parts[1] for file in tracked_files if file.parts[0] == "data" and len(file.parts) > 2}
    assert folders <= DATA_FOLDERS.keys()


def test_bundled_sequences_can_be_folded(repository: Path, tracked_files: list[Path]) -> None:
    files = [file for file in tracked_files if file.parts[0] == "data" and file.suffix == ".fasta"]
    assert {file.parts[1] for file in files} == {"examples", "golden"}
    for file in files:
        check_domain(read_fasta(repository / file), ModelConfig(domain="antibody"))


def test_every_golden_sequence_has_a_structure(repository: Path, tracked_files: list[Path]) -> None:
    jobs = {job.id for job in read_fasta(repository / "data" / "golden" / "golden.fasta")}
    assert jobs == {
        file.stem for file in tracked_files if file.parts[:2] == ("data", "golden") and file.suffix == ".cif"
    }


def test_citation_has_the_version(repository: Path) -> None:
    citation = yaml.safe_load((repository / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == pairformer_fast.__version__


def test_every_preset_is_valid(tracked_files: list[Path]) -> None:
    presets = [file.stem for file in tracked_files if file.parts[0] == "configs" and file.suffix == ".yaml"]
    assert presets
    for preset in presets:
        TrainConfig.from_yaml(preset)
