"""No training domain may share a cluster with evaluation data."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from biotite.structure import Atom, array
from biotite.structure.io.pdb import PDBFile

from pairformer_fast.model.residue import ATOM14, RESTYPES, THREE_LETTER
from pairformer_fast.training import prepare as module
from pairformer_fast.training.dataset import AntibodyDataset
from pairformer_fast.training.derive import Derivation
from pairformer_fast.training.leakage import HeavyChain, LeakageError, check_leakage, find_leaks
from pairformer_fast.training.prepare import (
    TABLE,
    add_pairs,
    predict_with_teacher,
    prepare,
    sound_structures,
    write_table,
)
from pairformer_fast.training.shards import Shard, Structure, shard_path
from pairformer_fast.training.sources import Pair, read_pairs
from pairformer_fast.training.teacher import TeacherStructure

from .structures import helix, structure

FRAMEWORK = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYC{}WGQGTLVTVSS"
)
CDR = "0" * 25 + "1" * 8 + "0" * 17 + "2" * 8 + "0" * 38 + "{}" + "0" * 11
OTHER = "QVQLQQPGAELVKPGASVKMSCKASGYTFTSYNMHWVKQTPGRGLEWIGAIYPGNGDTSYNQKFKGKATLTADKSSSTAYMQLSSLTSEDSAVYYC{}WGAGTTVTVSA"
VL = "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK"


def heavy(id: str, sequence: str, *cdr3: str) -> HeavyChain:
    return HeavyChain(id, sequence, frozenset(cdr3))


def test_cdr3_identity_counts_at_equal_length_only() -> None:
    held_out = [heavy("val", "A" * 100, "ARDGYSSGWF")]
    train = [
        heavy("six of ten", "C" * 100, "ARDGYSPPPP"),
        heavy("five of ten", "D" * 100, "ARDGYPPPPP"),
        heavy("longer", "E" * 100, "ARDGYSSGWFA"),
        heavy("second annotation", "F" * 100, "PPP", "ARDGYSSGWY"),
        heavy("unannotated", "G" * 100),
    ]
    leaks = find_leaks(train, held_out)
    assert [(leak.train, leak.held_out, leak.by) for leak in leaks] == [
        ("six of ten", "val", "cdr3"),
        ("second annotation", "val", "cdr3"),
    ]


def test_domain_identity_survives_a_missing_start() -> None:
    domain = FRAMEWORK.format("ARDGYSSGWFDY")
    held_out = [heavy("val", domain)]
    substituted = "W" * 5 + domain[5:]
    different = "W" * 10 + domain[10:]
    leaks = find_leaks([heavy("short", domain[3:]), heavy("5", substituted), heavy("10", different)], held_out)
    assert [(leak.train, leak.by) for leak in leaks] == [("short", "domain"), ("5", "domain")]


def test_check_names_what_leaks() -> None:
    held_out = [heavy("1abc", "A" * 100, "ARDGYSSGWF")]
    check_leakage([heavy("clean", "C" * 100, "PPPPPPPPPP")], held_out)
    with pytest.raises(LeakageError, match=r"1 training domains .* bad with 1abc \(cdr3\)"):
        check_leakage([heavy("bad", "C" * 100, "ARDGYSSGWF")], held_out)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Raw data in which one SAbDab domain and one pair leak, and one pair is no antibody."""
    folder = tmp_path / "raw"
    (folder / "fv_crystal").mkdir(parents=True)
    with gzip.open(folder / "sabdab_vh.jsonl.gz", "wt") as file:
        for pdb, cdr3, split in [
            ("1val", "ARDGYSSGWFDY", "val"),
            ("1trn", "VKPPLLMMNNQQ", "train"),
            ("1lek", "ARDGYSSGWYDV", "train"),
        ]:
            sequence = (FRAMEWORK if split == "val" else OTHER).format(cdr3)
            record = {"pdb": pdb, "seq": sequence, "cdr": CDR.format("3" * len(cdr3)), "split": split}
            file.write(json.dumps(record | {"coords": helix(len(sequence)).tolist()}) + "\n")
    with gzip.open(folder / "covabdab_pairs.csv.gz", "wt") as file:
        file.write("name,vh,vl,cdrh3\n")
        for name, cdr3 in [("clean", "TTHHVVPPEEKK"), ("leak", "CCDDFFGGHHII"), ("again", "TTHHVVPPEEKK")]:
            file.write(f"{name},{OTHER.format(cdr3)},{VL},{cdr3}\n")
        file.write(f"light twice,{VL},{VL},QQHYTTPPT\nunknown,{OTHER.format('AXA')},{VL},AXA\n")
    vh = FRAMEWORK.format("CCDDFFGGHHIY")
    (folder / "fv_crystal" / "fv.fasta").write_text(f">1XTL|H\n{vh}\n>1XTL|L\n{VL}\n")
    atoms = [
        Atom(xyz, chain_id=chain, res_id=i + 1, res_name=THREE_LETTER[aa], atom_name=name, element=name[0])
        for chain, sequence in (("H", vh), ("L", VL))
        for i, (aa, residue) in enumerate(zip(sequence, helix(len(sequence)), strict=True))
        for name, xyz in zip(ATOM14[aa], residue, strict=False)
    ]
    pdb = PDBFile()
    pdb.set_structure(array(atoms))
    pdb.write(str(folder / "fv_crystal" / "1XTL.pdb"))
    return folder


def predicted(pairs: Sequence[Pair]) -> list[Structure]:
    made = [structure(pair.id, [pair.vh, pair.vl], pair.source, all_atoms=True) for pair in pairs]
    return [replace(one, weight=0.9) for one in made]


def test_prepare_drops_and_counts(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = prepare(data, out, predicted)
    assert Shard(shard_path(out, "train")).ids == ["1trn", "clean"]
    assert Shard(shard_path(out, "val")).ids == ["1val"]
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["dropped"]["sabdab"]["leak_by_cdr3"] == 1
    counted = {name: count for name, count in summary["dropped"]["covabdab"].items() if count}
    assert counted == {"non_standard_letters": 1, "duplicate": 1, "not_variable_domains": 1, "leak_by_cdr3": 1}
    crystal = Shard(shard_path(out, "crystal"))[0]
    assert crystal.cdr[96:108].tolist() == [3] * 12
    assert crystal.chain_index.tolist() == [0] * 119 + [1] * 107
    assert crystal.atom14_mask.sum() == 4 * 226


def test_nothing_is_written_if_a_leak_remains(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_leaks", lambda train, held_out: [])
    with pytest.raises(LeakageError, match="1lek with 1val"):
        prepare(data, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_teacher_predictions_are_kept_for_the_same_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def teacher(pairs, batch_size, device, on_progress):
        calls.append(len(pairs))
        atom14 = structure("any", [*pairs[0]], all_atoms=True).atom14
        return [TeacherStructure(atom14, np.full(len(atom14), 80.0, dtype=np.float32)) for _ in pairs]

    monkeypatch.setattr(module, "predict_pairs", teacher)
    pairs = [Pair("a", OTHER.format("AKK"), VL, ""), Pair("b", OTHER.format("ARR"), VL, "")]
    cache = tmp_path / "teacher.safetensors"
    first = predict_with_teacher(pairs, cache, "cpu")
    again = predict_with_teacher(pairs, cache, "cpu")
    assert calls == [2]
    assert [s.id for s in again] == ["a", "b"]
    np.testing.assert_array_equal(again[1].atom14, first[1].atom14)
    assert first[0].weight == pytest.approx(0.8)
    predict_with_teacher([pairs[0], Pair("b", OTHER.format("AKR"), VL, "")], cache, "cpu")
    assert calls == [2, 2]


def teacher_of_helices(pairs, batch_size, device, on_progress):
    made = [structure("any", [*pair], all_atoms=True).atom14 for pair in pairs]
    return [TeacherStructure(atom14, np.full(len(atom14), 90.0, dtype=np.float32)) for atom14 in made]


def test_a_table_of_pairs_becomes_a_shard_beside_the_others(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prepare(data, out, None)
    written = write_table(data, out, Derivation(count=4))
    assert written["pairs"] == {"covabdab": 1, "derived": 4}
    pairs = read_pairs(out / TABLE)
    assert [pair.source for pair in pairs] == ["covabdab"] + ["derived"] * 4

    monkeypatch.setattr(module, "predict_pairs", teacher_of_helices)
    summary = add_pairs(pairs, out, "cpu", 2)
    assert summary["structures"] == written["pairs"]
    dataset = AntibodyDataset(out, "train")
    assert dataset.ids == ["1trn", "clean", *(pair.id for pair in pairs[1:])]
    assert dataset.sources == ["sabdab", *(pair.source for pair in pairs)]
    assert [dataset.chain_count(index) for index in range(6)] == [1, 2, 2, 2, 2, 2]
    last = dataset[5]
    assert "".join(RESTYPES[aa] for aa in last["aatype"]) == pairs[-1].vh + pairs[-1].vl
    assert "".join(str(int(digit)) for digit in last["cdr"]) == pairs[-1].cdr
    assert float(last["weight"]) == pytest.approx(0.9)


def test_a_table_with_a_leak_is_not_predicted(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    prepare(data, out, None)
    monkeypatch.setattr(module, "predict_pairs", lambda *_: pytest.fail("predicted"))
    crystal = Pair("bad", FRAMEWORK.format("CCDDFFGGHHIY"), VL, "")
    with pytest.raises(LeakageError, match="bad with 1XTL"):
        add_pairs([crystal], out, "cpu", 2)
    assert not shard_path(out, "train-pairs").exists()


def test_unsure_predictions_are_dropped_and_counted() -> None:
    pairs = [Pair(name, OTHER.format("AKK"), VL, "") for name in "ab"]
    sure, unsure = predicted(pairs)
    kept, structures, dropped = sound_structures(pairs, [sure, replace(unsure, weight=0.8)])
    assert [pair.id for pair in kept] == [one.id for one in structures] == ["a"]
    assert dropped == {"covabdab": {"unsure": 1}}
