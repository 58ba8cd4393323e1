import pytest

from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.fasta import read_fasta


@pytest.fixture
def read(tmp_path):
    def _read(text: str | bytes):
        path = tmp_path / "in.fasta"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_fasta(path)

    return _read


def test_one_record_is_one_job_and_colons_join_chains(read):
    single, complex_ = read(">vhh some description\nEVQ\nLVE\n\n>ab.1\nACD:EFG\nHI:K\n")
    assert (single.id, [c.sequence for c in single.chains], single.length) == ("vhh", ["EVQLVE"], 6)
    assert [(c.name, c.sequence) for c in complex_.chains] == [("A", "ACD"), ("B", "EFGHI"), ("C", "K")]
    assert {c.line for c in complex_.chains} == {5}


def test_heavy_and_light_records_are_paired_heavy_first(read):
    jobs = read(">x|L\nDIQ\n>y\nAAA\n>x|H\nevq\n>z|L\nDIV\n")
    assert [(j.id, [(c.name, c.sequence) for c in j.chains]) for j in jobs] == [
        ("x", [("H", "EVQ"), ("L", "DIQ")]),
        ("y", [("A", "AAA")]),
        ("z", [("L", "DIV")]),
    ]
    assert [(c.record, c.line) for c in jobs[0].chains] == [("x|H", 5), ("x|L", 1)]


def test_windows_and_old_mac_line_ends_and_byte_order_mark(read):
    assert read(b"\xef\xbb\xbf>a\r\nAC\r\nDE\r\n")[0].chains[0].sequence == "ACDE"
    assert read(b">a\rAC\rDE\r>b\rGG")[1].chains[0].line == 4


def test_more_than_26_chains_keep_their_order_and_get_distinct_names(read):
    (job,) = read(">a\n" + ":".join(["A"] * 28))
    assert [c.name for c in job.chains][24:] == ["Y", "Z", "AA", "AB"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("\n  \n", "empty"),
        ("ACDE\n>a\nACD\n", "line 1: text before the first record"),
        ("\n; comment\n>a\nACD\n", "line 2: text before the first record"),
        (">a\nACD\n>b\n>c\nAAA\n", "record 'b', line 3: the record has no sequence"),
        (">a\n   \n", "record 'a', line 1: the record has no sequence"),
        (">a\nACD\nACB\n", "record 'a', line 3: 'B' at residue 6"),
        (">a\nACX\n", "'X' at residue 3"),
        (">a\nACZ\n", "'Z'"),
        (">a\nACU\n", "'U'"),
        (">a\nACD*\n", "'\\*' at residue 4"),
        (">a\nA-D\n", "'-' at residue 2"),
        (">a\nAC:D1\n", "'1' at residue 4"),
        (">a\nAC\tD\n", "residue 3"),
        (">a\nACé\n", "'é'"),
        (">a\nAC::D\n", "record 'a', line 1: empty chain"),
        (">a\nAC:\n", "empty chain"),
        (">a\nAC\n>a\nAD\n", "record 'a', line 3: duplicate id; 'a' is already used on line 1"),
        (">a|H\nAC\n>a|H\nAD\n", "record 'a\\|H', line 3: duplicate"),
        (">a|H\nAC\n>a\nAD\n", "line 3: duplicate"),
        (">a\nAC\n>a|L\nAD\n", "line 3: duplicate"),
        (">ab\nAC\n>AB\nAD\n", "record 'AB', line 3: .*only in the case"),
        (">ab|H\nAC\n>AB|L\nAD\n", "only in the case"),
        (">a|H\nAC:DE\n", "holds one chain"),
        (">\nAC\n", "line 1: the record has no id"),
        (">run.json\nAC\n", "output file"),
        (b">a\nAC\x00D\n", "not a text file"),
        (b"\x1f\x8b\x08\x00\xff\xfe", "not a text file"),
    ],
)
def test_bad_files_are_explained(read, text, message):
    with pytest.raises(InputError, match=message) as info:
        read(text)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "bad", ["../../x", "a/b", "a\\b", "/etc/x", ".hidden", "..", "-rf", "a\x1b[31m", "sp|P1|X", "é", "a" * 101, "a:b"]
)
def test_unsafe_ids_are_refused_without_echoing_control_characters(read, bad):
    with pytest.raises(InputError, match="line 3: the id is not safe") as info:
        read(f">ok\nAC\n>{bad}\nAC\n")
    assert str(info.value).isprintable()


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_fasta(tmp_path / "nope.fasta")
    with pytest.raises(InputError, match="cannot be read"):
        read_fasta(tmp_path)
