"""What a user can mend is one line on stderr and status 2; nothing is written."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
import yaml

from pairformer_fast import user_errors
from pairformer_fast.config import ModelConfig
from pairformer_fast.training.settings import TrainConfig
from pairformer_fast.training.sources import read_crystals
from pairformer_fast.training.state import read_state, write_state

Run = Callable[..., tuple[int, str, str]]
COLUMNS = "id,vh,vl,cdrh3,source,cdr"
PAIR = "p,EVQL,DIQM,,derived,"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("do\n  this"), 2, "do this"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 2, "a/b: No such file or directory"),
        (typer.BadParameter("too few"), 2, "too few"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["value", "os", "option", "interruption"],
)
def test_one_line(monkeypatch, capsys, error: BaseException, status: int, message: str) -> None:
    def main() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["some/script.py"])
    with pytest.raises(SystemExit) as info:
        user_errors.run_script(main)
    out, err = capsys.readouterr()
    assert (info.value.code, out, err.count("\n")) == (status, "", 1)
    assert err.startswith("script.py: ")
    assert message in err


def test_faults_of_the_program_keep_their_traceback(monkeypatch) -> None:
    def main() -> None:
        raise RuntimeError

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(RuntimeError):
        user_errors.run_script(main)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"p\.yaml: not YAML"),
        ("", r"p\.yaml: must be a YAML mapping"),
        ("[1]", r"p\.yaml: must be a YAML mapping"),
        ("model: {recycles: -1}\nnonsense: 2", r"p\.yaml: model\.recycles: .* nonsense: Extra inputs"),
    ],
)
def test_presets(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_yaml(tmp_path / "p.yaml")


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    file, cpu = tmp_path / "state.pt", torch.device("cpu")
    write_state(file, {"step": 3})
    whole = file.read_bytes()
    assert read_state(file, cpu) == {"step": 3}
    for content in (whole[:300], b"", b"nothing of the kind"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"state\.pt cannot be read, remove it to start anew"):
            read_state(file, cpu)
    torch.save([1], file)
    with pytest.raises(ValueError, match="no state of a run"):
        read_state(file, cpu)


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "preset.yaml"
    path.write_text(yaml.safe_dump({"model": ModelConfig().model_dump()}))
    return path


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train", ["--config", "preset.yaml", "--data", "none"], "train.safetensors does not exist"),
        ("train", ["--config", "preset.yaml", "--bias", "learned", "--rank", "0"], "--rank: "),
        ("train", ["--minutes", "-1"], "--minutes"),
        ("distill_factors", ["--batch-size", "0"], "--batch-size: "),
        ("prepare_antibody_data", ["out"], "--data"),
        ("prepare_antibody_data", ["preset.yaml", "--data", "none"], "is no folder"),
        ("prepare_antibody_data", ["out", "--data", "none", "--no-pairs", "--derived", "1"], "--no-pairs leaves"),
        ("prepare_antibody_data", ["out", "--data", "none", "--table"], "give the data folder with --data"),
        ("predict_antibody_pairs", ["none", "none", "--device", "cpu"], "prepare_antibody_data.py --table"),
        ("template_baseline", ["none"], "train.safetensors does not exist"),
        ("make_antibody_profile", ["--data", "none", "--output", "x.json"], "give the data folder"),
        ("make_ideal_geometry", ["none", "--output", "x.json"], "does not exist"),
    ],
)
def test_scripts(run_script: Run, preset: Path, tmp_path: Path, monkeypatch, name, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run_script(name, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == [preset]


@pytest.mark.parametrize(
    ("name", "option"),
    [("plot_attention", "--rows"), ("plot_accuracy", "--rows"), ("plot_openfold3_training", "--losses")],
)
def test_plots(run_script: Run, tmp_path: Path, name: str, option: str) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "text").write_text("no json")
    for wrong, message in (("none", "does not exist; write it with"), ("text", "is no JSON")):
        status, _, err = run_script(name, option, tmp_path / wrong, "--output", tmp_path / "x.svg")
        assert (status, err.count("\n"), message in err) == (2, 1, True)
    assert not (tmp_path / "x.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fold", "none.fasta"], "none.fasta: no such file"),
        (["fold", "--repeats", "0"], "--repeats"),
        (["accuracy", "--data", "none"], "val.safetensors does not exist"),
        (["accuracy", "--checkpoint", "none"], "does not exist"),
        (["drift", "--output", "."], "is a folder"),
        (["nothing"], "nothing"),
    ],
)
def test_benchmarks(script, tmp_path: Path, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    module = script("benchmark")
    output = [] if "--output" in arguments or arguments == ["nothing"] else ["--output", "rows.json"]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments, *output])
    with pytest.raises(SystemExit) as info:
        module.main()
    out, err = capsys.readouterr()
    assert (info.value.code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_steps_that_a_stopped_run_logged_twice_count_once(script, tmp_path: Path) -> None:
    from pairformer_fast.training.study import read_run

    last = {"step": 3, "train": {"steps": 3, "seed": 0}, "attention": {"bias": "dense"}}
    rows = [{"step": step, "total": total} for step, total in ((1, 5.0), (2, 4.0), (2, 3.0), (3, 2.0))]
    (tmp_path / "log").write_text("".join(json.dumps(row) + "\n" for row in [*rows, last]))
    assert [row["total"] for row in read_run(tmp_path / "log").curve] == [5.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "damaged or another kind of file"),
        (gzip.compress(f"{COLUMNS}\n{PAIR}\n".encode())[:-12], "damaged or another kind of file"),
        (gzip.compress(b"id,vh\n"), "is no table of pairs"),
        (gzip.compress(f"{COLUMNS}\n{PAIR}\nq,EVQL\n".encode()), "line 3: vh and vl must be sequences"),
        (gzip.compress(f"{COLUMNS}\n{PAIR},more\n".encode()), "lacks a field, or has one of another kind"),
        (gzip.compress(f"{COLUMNS}\n{PAIR}0000\n".encode()), "line 2: cdr must have a digit"),
    ],
    ids=["no-gzip", "truncated", "columns", "missing", "superfluous", "cdr"],
)
def test_tables_of_pairs(run_script: Run, tmp_path: Path, content: bytes, message: str) -> None:
    table = tmp_path / "pairs.csv.gz"
    table.write_bytes(content)
    status, _, err = run_script("predict_antibody_pairs", table, tmp_path, "--device", "cpu")
    assert (status, err.count("\n"), message in err) == (2, 1, True), err


@pytest.mark.parametrize("name", ["predict_antibody_pairs", "prepare_antibody_data"])
def test_devices_of_the_teacher(run_script: Run, tmp_path: Path, name: str) -> None:
    arguments = [tmp_path / "table", tmp_path] if name.startswith("predict") else [tmp_path / "out", "--data", tmp_path]
    status, _, err = run_script(name, *arguments, "--device", "abacus")
    assert (status, "use auto, cpu, cuda" in err) == (2, True)


@pytest.mark.parametrize("records", [">a|H\nEVQL\n", ">a\nEVQL\n"])
def test_crystals_of_one_chain_are_named(tmp_path: Path, records: str) -> None:
    (tmp_path / "fv_crystal").mkdir()
    (tmp_path / "fv_crystal" / "fv.fasta").write_text(records)
    with pytest.raises(ValueError, match=r"a needs the records >a\|H and >a\|L"):
        read_crystals(tmp_path)


@pytest.mark.parametrize("content", ["no json", "{}"])
def test_rows_to_resume_from(script, tmp_path: Path, content: str) -> None:
    module = script("benchmark_rows")
    assert module.read_rows(tmp_path / "none.json") == []
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(module.InputError, match=r"rows\.json has no rows to resume from"):
        module.read_rows(tmp_path / "rows.json")
