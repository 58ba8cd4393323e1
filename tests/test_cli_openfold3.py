"""``fold --model openfold3`` answers bad input before OpenFold3 is needed; these tests run without it."""

import subprocess
import sys

import pytest

from pairformer_fast import cli
from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.fasta import read_complexes
from pairformer_fast.inference.openfold3_input import read_a3m, read_input
from pairformer_fast.inference.settings import FoldSettings, Model

ONE, TWO = "GSHMKVLAAGIVALCAAQ", "MKTAYIAK"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Working folder with something that looks like a checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "in.fasta").write_text(f">a\n{ONE}\n>b\n{ONE}:{TWO}:{ONE}\n")
    return tmp_path


@pytest.fixture
def fold(job, monkeypatch, capsys):
    """Run ``fold in.fasta out --model openfold3``; the last line of stderr of a run that has to fail."""

    def _fold(*options, checkpoint="w.pt"):
        monkeypatch.setitem(sys.modules, "openfold3", None)
        given = ["--checkpoint", checkpoint] if checkpoint else []
        arguments = ["fold", "in.fasta", "out", "--model", "openfold3", *given, *options]
        monkeypatch.setattr(sys, "argv", ["pairformer-fast", *arguments])
        with pytest.raises(SystemExit) as info:
            cli.main()
        out, err = capsys.readouterr()
        assert (info.value.code, out, err.count("\n")) == (2, "", 1)
        assert not (job / "out").exists()
        assert not list(job.glob(".unfinished*"))
        return err

    return _fold


def test_missing_extra(fold):
    assert "pip install 'pairformer_fast[openfold]'" in fold()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:1"], "CUDA_VISIBLE_DEVICES"),
        (["--seed", str(2**32)], "--seed"),
        (["--msa-dir", "nowhere"], "--msa-dir nowhere: no such folder"),
        (["--runner-yaml", "nope.yml"], "--runner-yaml nope.yml: cannot be read"),
        (["--bias", "dense", "--rank", "4"], "bias is dense"),
        (["--model", "boltz"], "--model"),
    ],
)
def test_options(fold, options, message):
    assert message in fold(*options)


@pytest.mark.parametrize(("text", "message"), [("a: [1", "not YAML"), ("[1, 2]", "must be a mapping")])
def test_runner_yaml(fold, job, text, message):
    (job / "r.yml").write_text(text)
    assert message in fold("--runner-yaml", "r.yml")


def test_checkpoint(fold, job):
    assert "needs --checkpoint" in fold(checkpoint=None)
    assert "no such file" in fold(checkpoint="nope.pt")
    (job / "own.safetensors").write_bytes(b"\x88\x01\x00\x00{}")
    assert "not a checkpoint of OpenFold3" in fold(checkpoint="own.safetensors")
    (job / "folder").mkdir()
    assert "is a folder" in fold(checkpoint="folder")


@pytest.mark.parametrize("option", ["--msa-dir", "--runner-yaml"])
def test_options_of_openfold3_are_refused_by_the_own_model(job, monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["pairformer-fast", "fold", "in.fasta", "out", option, "."])
    with pytest.raises(SystemExit) as info:
        cli.main()
    assert info.value.code == 2
    assert f"{option} is for --model openfold3" in capsys.readouterr().err
    assert not (job / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f">a\n{ONE}X\n", "'X' at residue 19"),
        (f">A|protein\n{ONE}\n>b\n{ONE}\n", "record 'b', line 3: other records are"),
        (f">A|protein\n{ONE}\n>B|dna\nACGT\n", "line 3: dna is not supported"),
        (f">A|protein\n{ONE}\n>A|protein\n{ONE}\n", "chain A is there twice"),
        (f">A/B|protein\n{ONE}\n", "'A/B' is no chain name"),
        (f">A|protein\n{ONE}:{TWO}\n", "holds one chain"),
        (f">A|protein|nope.a3m\n{ONE}\n", "no alignment nope.a3m"),
    ],
)
def test_fasta(fold, job, text, message):
    (job / "in.fasta").write_text(text)
    assert message in fold()


def test_a_missing_alignment_names_the_files_that_would_do(fold, job):
    (job / "msas").mkdir()
    (job / "msas" / "a.a3m").write_text(f">q\n{ONE}\n")
    error = fold("--msa-dir", "msas")
    assert "record 'b', line 3" in error
    assert "msas/b_A.a3m or msas/b_C.a3m" in error


def test_bad_input_does_not_import_torch(job):
    (job / "in.fasta").write_text(f">A|protein|nope.a3m\n{ONE}\n")
    code = (
        "import sys\nfrom pairformer_fast.cli import main\ntry:\n main()\nexcept SystemExit as e:\n"
        " print(e.code, 'torch' in sys.modules)"
    )
    arguments = ["fold", "in.fasta", "out", "--model", "openfold3", "--checkpoint", "w.pt"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=job)
    assert done.stdout.split() == ["2", "False"]


@pytest.fixture
def read(job, monkeypatch):
    monkeypatch.setattr("pairformer_fast.inference.openfold3_input.find_spec", lambda _: object())

    def _read(**settings):
        return read_input("in.fasta", FoldSettings(model=Model.OPENFOLD3, checkpoint="w.pt", **settings))

    return _read


def test_alignments_of_a_folder(read, job):
    (job / "msas").mkdir()
    for name, sequence in {"a": ONE, "b_A": ONE, "b_B": TWO}.items():
        (job / "msas" / f"{name}.a3m").write_text(f">q\n{sequence}\n")
    found = read(msa_dir="msas")
    assert {key: path.name for key, path in found.msas.items()} == {
        ("a", "A"): "a.a3m",
        ("b", "A"): "b_A.a3m",
        ("b", "B"): "b_B.a3m",
        ("b", "C"): "b_A.a3m",
    }
    assert found.without_msa == []
    assert read().without_msa == ["a:A", "b:A", "b:B", "b:C"]


def test_records_in_the_style_of_boltz_are_one_complex(read, job):
    (job / "x.a3m").write_text(f">q\n{ONE}\n")
    (job / "in.fasta").write_text(f">H1|protein|./x.a3m\n{ONE}\n>L|PROTEIN|empty\n{TWO}\n>C|protein\n{TWO}\n")
    found = read()
    [complex_] = found.jobs
    assert complex_.id == "in"
    assert [(chain.name, chain.sequence) for chain in complex_.chains] == [("H1", ONE), ("L", TWO), ("C", TWO)]
    assert list(found.msas) == [("in", "H1")]
    assert found.without_msa == ["in:L", "in:C"]


def test_other_files_are_read_as_ever(job):
    (job / "in.fasta").write_text(f">x|H\n{ONE}\n>x|L\n{TWO}\n>y\n{ONE}:{TWO}\n")
    jobs = read_complexes(job / "in.fasta")
    assert [[chain.name for chain in found.chains] for found in jobs] == [["H", "L"], ["A", "B"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no sequence"),
        (f">q\n{TWO}\n", "first sequence must be that of chain A"),
        (f">q\n{ONE}\n>r\n{ONE[1:]}\n", "row 2 .'r'. has 17 columns, not 18"),
        (f">q\n{ONE}\n>r\n{ONE[1:]}*\n", "row 2 .'r'. holds other characters"),
    ],
)
def test_bad_alignments(job, text, message):
    (job / "x.a3m").write_text(text)
    chain = read_complexes(job / "in.fasta")[0].chains[0]
    with pytest.raises(InputError, match=message):
        read_a3m(job / "x.a3m", chain)


def test_alignments_of_colabfold_and_hhblits(job):
    (job / "x.a3m").write_text(f"#18\t1\n>q\n{ONE[:9]}\n{ONE[9:]}\n>r x\n-{ONE[1:5]}..gs{ONE[5:]}\n\0")
    chain = read_complexes(job / "in.fasta")[0].chains[0]
    assert read_a3m(job / "x.a3m", chain) == f">q\n{ONE}\n>r x\n-{ONE[1:5]}gs{ONE[5:]}\n"
