# ruff: noqa: F401, F811 (fixtures are imported by name)
import json
import os
import re
import subprocess
import sys
from functools import partial

import pytest
from rich.console import Console

from pairformer_fast import cli
from pairformer_fast.features import TokenFeatures
from pairformer_fast.inference import regress
from pairformer_fast.inference.writer import write_mmcif
from pairformer_fast.model.checkpoint import default_checkpoint

from .inference.conftest import fake_model, fasta
from .inference.fakes import helix, make_job
from .inference.test_end_to_end import weights

ONE = "MKTAYIAKQRQISFVKSHFSRQDEERLGLIEVQ"


def run_process(*args, cwd):
    command = [sys.executable, "-c", "from pairformer_fast.cli import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | {"NO_COLOR": "1"})


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: exit status, stdout and stderr."""

    def _run(*args):
        monkeypatch.setattr(sys, "argv", ["pairformer-fast", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as info:
            cli.main()
        return info.value.code, *capsys.readouterr()

    return _run


def test_version_and_help(run):
    status, out, _ = run("--version")
    assert status == 0
    assert out.startswith("pairformer-fast 0.")
    status, out, _ = run("fold", "--help")
    assert status == 0
    for option in ("attention", "bias", "rank", "tolerance", "device", "precision", "seed", "recycles", "checkpoint"):
        assert f"--{option}" in out
    assert "--no-compare" in out


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (">a\nACD\nEXG\n", "record 'a', line 3"),
        ("ACD\n", "line 1"),
        ("", "empty"),
        (">a\nACD\n>../../x\nACD\n", "line 3"),
        (">a\nACD\n>a\nACD\n", "record 'a', line 3"),
    ],
    ids=["letter", "no-record", "empty", "path", "duplicate"],
)
def test_bad_fasta_is_one_line_status_2_and_nothing_is_written(tmp_path, text, where):
    (tmp_path / "in.fasta").write_text(text)
    done = run_process("fold", "in.fasta", "out", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert where in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["in.fasta"]


def test_help_and_bad_fasta_do_not_import_torch(tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nAC1\n")
    code = (
        "import sys\nfrom pairformer_fast.cli import main\ntry:\n main()\nexcept SystemExit as e:\n"
        " print(e.code, 'torch' in sys.modules)"
    )
    for args, status in ([["--help"], 0], [["fold", "in.fasta", "out"], 2], [["inspect", "in.fasta", "out"], 2]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.splitlines()[-1] == f"{status} False"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "4", "--tolerance", "0.1"], "exclude each other"),
        (["--bias", "dense", "--rank", "4"], "bias is dense"),
        (["--attention", "reference", "--bias", "svd"], "dense bias"),
        (["--attention", "reference", "--compare"], "nothing to compare"),
        (["--tolerance", "2"], "--tolerance: Input should be less than or equal to 1"),
        (["--device", "tpu"], "--device"),
        (["--bias", "magic"], "magic"),
        (["--rank", "x"], "--rank"),
        (["--nonsense"], "--nonsense"),
        (["--checkpoint", "nope.safetensors"], "no such file"),
    ],
)
def test_bad_options_are_one_line_and_status_2(fake_model, run, fasta, tmp_path, options, message):
    status, out, err = run("fold", fasta(f">a\n{ONE}\n"), tmp_path / "out", *options)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_command_shows_the_help_and_nothing_else(run):
    status, out, err = run()
    assert (status, err) == (2, "")
    assert "regress" in out


def test_table_keeps_ids_and_numbers_within_80_columns(fake_model, run, fasta, tmp_path, monkeypatch):
    name = "a_rather_long_identifier.v2"
    monkeypatch.setattr(cli, "Console", partial(Console, width=80))
    _, out, _ = run("fold", fasta(f">{name}\n{ONE}\n"), tmp_path / "out")
    assert "…" not in out
    for column in ("RMSD", "lDDT", "TM", "pLDDT", "factors", "fast", "ref.", "speed-up"):
        assert column in out
    assert name in "".join(line.split()[0] for line in out.splitlines() if line.split() and line.split()[0] in name)


def test_missing_arguments_and_unknown_commands(run):
    for args in (["fold"], ["fold", "x"], ["unfold"], ["compare", "a.pdb"]):
        status, _, err = run(*args)
        assert (status, err.count("\n")) == (2, 1)


def test_fold_prints_a_table_and_writes_files(fake_model, run, fasta, tmp_path):
    status, out, _ = run("fold", fasta(f">fv|H\n{ONE}\n>fv|L\nACDE\n>x\n{ONE}\n"), tmp_path / "out")
    assert status == 0
    rows = [line for line in out.splitlines() if "fv" in line or " x " in line]
    assert [" 37 " in rows[0], " 33 " in rows[1]] == [True, True]
    assert "speed-up" in out
    assert (tmp_path / "out" / "fv" / "fv_comparison.json").is_file()


def test_partial_failure_is_status_1_and_names_the_job(fake_model, run, fasta, tmp_path):
    status, out, err = run("fold", fasta(f">bad\nWWWAC\n>good\n{ONE}\n"), tmp_path / "out")
    assert status == 1
    assert "job bad failed: the fake model broke" in err
    assert "failed" in out
    assert sorted(os.listdir(tmp_path / "out")) == ["good", "run.json"]


@pytest.fixture
def two_files(tmp_path):
    for name, shift in [("a", 0.0), ("b", 1.0)]:
        prediction = helix(TokenFeatures.from_chains([ONE]))
        prediction.atom14[0, :5] += shift
        write_mmcif(tmp_path / f"{name}.cif", make_job(ONE), prediction, "")
    return tmp_path / "a.cif", tmp_path / "b.cif"


def test_compare_prints_a_table_or_json(run, two_files):
    status, out, _ = run("compare", *two_files)
    assert status == 0
    assert "GDT-HA" in out
    status, out, _ = run("compare", *two_files, "--json")
    content = json.loads(out)
    assert status == 0
    assert 0.3 < content["ca_rmsd"] < 1.7
    assert len(content["per_residue"]) == len(ONE)


def test_compare_explains_unreadable_files(run, tmp_path, two_files):
    status, _, err = run("compare", tmp_path / "nope.pdb", two_files[0])
    assert (status, err.count("\n")) == (2, 1)
    assert "nope.pdb: no such file" in err


def test_regress_updates_passes_and_fails(fake_model, run, tmp_path, monkeypatch):
    golden = tmp_path / "golden"
    golden.mkdir()
    status, _, err = run("regress", "--golden", golden)
    assert (status, "golden.fasta: no such file" in err) == (2, True)
    (golden / "golden.fasta").write_text(f">g\n{ONE}\n")
    status, out, _ = run("regress", "--golden", golden, "--update", "--json", tmp_path / "r.json")
    assert status == 0
    assert "pass" in out
    assert "skipped" in out
    assert json.loads((tmp_path / "r.json").read_text())["passed"] is True
    monkeypatch.setattr(regress, "ACCELERATED_CA_RMSD", 1e-6)
    status, out, _ = run("regress", "--golden", golden)
    assert (status, "FAIL" in out) == (1, True)


def test_learned_factors_are_refused_before_the_model_is_loaded(tmp_path):
    source = tmp_path / "in.fasta"
    source.write_text(f">a\n{ONE}\n")
    options = ["--bias", "learned", "--checkpoint", default_checkpoint()]
    result = run_process("fold", source, tmp_path / "out", *options, cwd=tmp_path)
    assert result.returncode == 2
    assert "no factor networks" in result.stderr
    assert not (tmp_path / "out").exists()


def test_inspect_prints_a_table_and_says_what_plots_need(weights, run, fasta, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "pairformer_fast.inference.inspection_plots", raising=False)
    monkeypatch.setattr(cli, "Console", partial(Console, width=80))
    options = ["--checkpoint", weights, "--rank", 3, "--bias", "svd", "--recycles", 0, "--device", "cpu"]
    status, out, err = run("inspect", fasta(f">fv\n{ONE}\n"), tmp_path / "out", *options, "--method", "landmark")
    assert status == 0
    assert "…" not in out
    rows = [line.split() for line in out.splitlines() if "pair_" in line]
    said = " ".join(out.split())
    assert re.search(r"by benchmark, relative to the dense bias: with the factors \d\.\d\d", said)
    assert "dense:" not in said
    assert [row[:2] for row in rows[:3]] == [
        ["0.pair_stack.tri_att_start", "3"],
        ["0.pair_stack.tri_att_end", "3"],
        ["0.attn_pair_bias", "3"],
    ]
    content = json.loads((tmp_path / "out" / "fv" / "inspect.json").read_text())
    assert {rung["method"] for attention in content["attentions"] for rung in attention["ladder"]} == {"landmark"}
    assert os.listdir(tmp_path / "out" / "fv") == ["inspect.json"]
    assert "only inspect.json was written" in err
    assert "pip install 'pairformer_fast[plot]'" in err
    assert err.count("\n") == 1


def test_inspect_says_why_auto_kept_the_dense_bias(weights, run, fasta, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "Console", partial(Console, width=120))
    options = ["--checkpoint", weights, "--recycles", 0, "--device", "cpu"]
    status, out, _ = run("inspect", fasta(f">fv\n{ONE}\n"), tmp_path / "out", *options)
    assert status == 0
    said = " ".join(out.split())
    for form in ("triangle", "single"):
        assert re.search(
            rf"dense: {form} attention of \d+ tokens with factors of rank \d+ would take \d+\.\d\d of", said
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "4", "--tolerance", "0.1"], "exclude each other"),
        (["--bias", "dense", "--rank", "4"], "bias is dense"),
        (["--tolerance", "0"], "--tolerance: Input should be greater than 0"),
        (["--method", "auto"], "choose svd, randomised, structured, landmark"),
        (["--method", "magic"], "magic"),
        (["--compare"], "--compare"),
        (["--checkpoint", "nope.safetensors"], "no such file"),
    ],
)
def test_bad_options_of_inspect_are_one_line_and_status_2(fake_model, run, fasta, tmp_path, options, message):
    status, out, err = run("inspect", fasta(f">a\n{ONE}\n"), tmp_path / "out", *options)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_inspect_names_jobs_that_failed(fake_model, run, fasta, tmp_path):
    status, _, err = run("inspect", fasta(f">a\n{ONE}\n"), tmp_path / "out")  # the fake has no attention
    assert status == 1
    assert "job a failed: FakeModel has no PairBiasAttention" in err
    assert not (tmp_path / "out").exists()
