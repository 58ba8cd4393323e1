"""Derived antibody pairs: natural parts in new combinations, never near an evaluation domain."""

import gzip
from itertools import pairwise
from pathlib import Path

import pytest

from pairformer_fast.inference.antibody import check_variable_domain
from pairformer_fast.training.derive import Derivation, derive_pairs, parse_domain
from pairformer_fast.training.leakage import HeavyChain, HeldOut
from pairformer_fast.training.sources import Pair, read_pairs, write_pairs

HEAVY = [
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS",
    "QVQLQQPGAELVKPGASVKMSCKASGYTFTSYNMHWVKQTPGRGLEWIGAIYPGNGDTSYNQKFKGKATLTADKSSSTAYMQLSSLTSEDSAVYYCARSTYYGGDWYFNVWGAGTTVTVSA",
    "QVQLVQSGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNFNEKFKNRVTLTTDSSTTTAYMELKSLQFDDTAVYYCARRDYRFDMGFDYWGQGTTVTVSS",
]
LIGHT = [
    "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK",
    "EIVLTQSPATLSLSPGERATLSCRASKGVSTSGYSYLHWYQQKPGQAPRLLIYLASYLESGVPARFSGSGSGTDFTLTISSLEPEDFAVYYCQHSRDLPLTFGGGTKVEIK",
]


def regions(sequence: str) -> tuple[str, ...]:
    domain = parse_domain(sequence)
    assert domain is not None
    return domain.regions


@pytest.mark.parametrize("sequence", HEAVY + LIGHT)
def test_regions_make_up_the_domain(sequence: str) -> None:
    domain = parse_domain(sequence)
    assert domain is not None
    assert domain.kind == ("heavy" if sequence in HEAVY else "kappa")
    assert domain.sequence == sequence
    assert domain.cdr == check_variable_domain(sequence).cdr


def test_what_is_no_domain_has_no_regions() -> None:
    assert parse_domain("ACDEFGHIKL" * 12) is None


def test_grafts_take_whole_cdrs_of_the_same_kind_and_place() -> None:
    pairs, dropped = derive_pairs(HEAVY, LIGHT, [], Derivation(count=40, graft=0.5, mutations=0))
    assert len(pairs) == 40
    assert set(dropped) == {"duplicate", "not_variable_domains", "leak_by_cdr3", "leak_by_domain"}
    for sequences, parents in (([p.vh for p in pairs], HEAVY), ([p.vl for p in pairs], LIGHT)):
        known = [set(column) for column in zip(*map(regions, parents), strict=True)]
        drawn = [regions(sequence) for sequence in sequences]
        assert all(part in column for made in drawn for part, column in zip(made, known, strict=True))
        frameworks = {tuple(regions(parent)[place] for place in (0, 2, 4, 6)) for parent in parents}
        assert {tuple(made[place] for place in (0, 2, 4, 6)) for made in drawn} == frameworks
        assert len({made[5] for made in drawn}) == len(parents)
        # new combinations, not only the parents
        assert set(sequences) - set(parents)
    assert len({(p.vh, p.vl) for p in pairs}) == 40
    assert {len(regions(vl)[1]) for p in pairs if regions(vl := p.vl)[0] == regions(LIGHT[0])[0]} == {
        len(regions(LIGHT[0])[1])
    }


def test_mutations_fall_more_on_cdrs_and_never_on_cysteine_or_tryptophan() -> None:
    pairs, _ = derive_pairs(HEAVY[:1], LIGHT[:1], [], Derivation(count=60, graft=0, mutations=3))
    (parent,) = HEAVY[:1]
    changed = [(a, b, digit) for p in pairs for a, b, digit in zip(parent, p.vh, p.cdr, strict=False) if a != b]
    assert not {letter for a, b, _ in changed for letter in (a, b)} & set("CW")
    assert 2 < len(changed) / len(pairs) < 4
    in_cdr = sum(digit != "0" for *_, digit in changed) / len(changed)
    share = sum(digit != "0" for digit in pairs[0].cdr[: len(parent)]) / len(parent)
    assert in_cdr > 1.5 * share


def test_a_seed_gives_the_same_pairs_and_another_seed_others() -> None:
    one, again, other = (derive_pairs(HEAVY, LIGHT, [], Derivation(count=5, seed=seed))[0] for seed in (1, 1, 2))
    assert one == again
    assert not {(p.vh, p.vl) for p in one} & {(p.vh, p.vl) for p in other}


def test_no_derived_domain_shares_a_cluster_with_evaluation_data() -> None:
    """Two mutations turn many a domain into a relative of the held-out one; whole grafts of its CDR-H3, too."""
    cdr3 = regions(HEAVY[0])[5]
    held_out = [
        HeavyChain("val", HEAVY[0].replace(cdr3, cdr3[:4] + "PPPPPPP" + cdr3[11:]), frozenset({"SRWGGDPPPPPPP"}))
    ]
    assert HeldOut(held_out).leak(HeavyChain("parent", HEAVY[0], frozenset({cdr3}))) is None
    settings = Derivation(count=30, mutations=6, cdr_mutations=30)
    pairs, dropped = derive_pairs(HEAVY[:1], LIGHT, held_out, settings)
    assert HeldOut(held_out).leak(HeavyChain("none", "A", frozenset())) is None
    assert all(HeldOut(held_out).leak(HeavyChain(p.id, p.vh, frozenset({p.cdrh3}))) is None for p in pairs)

    leaking = [HeavyChain("val", HEAVY[0], frozenset({cdr3}))]
    pairs, dropped = derive_pairs(HEAVY, LIGHT, leaking, Derivation(count=10))
    assert dropped["leak_by_cdr3"] > 0
    assert all(HeldOut(leaking).leak(HeavyChain(p.id, p.vh, frozenset({p.cdrh3}))) is None for p in pairs)


def test_too_few_to_derive_from_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"only 1 of 3 derived pairs passed .* ask for fewer"):
        derive_pairs(HEAVY[:1], LIGHT[:1], [], Derivation(count=3, graft=0, mutations=0))
    with pytest.raises(ValueError, match="no variable domain"):
        derive_pairs(HEAVY, ["ACDEFGHIKL" * 12], [], Derivation(count=1))


def test_a_table_is_the_same_on_every_run_and_read_back(tmp_path: Path) -> None:
    pairs = [Pair("a", "QVQ", "DIQ", "AR"), Pair("b", "EVQ", "EIV", "", "derived", "001112")]
    files = [tmp_path / name for name in ("one.csv.gz", "two.csv.gz")]
    for file in files:
        write_pairs(file, pairs)
        assert read_pairs(file) == pairs
    assert all(a.read_bytes() == b.read_bytes() for a, b in pairwise(files))
    with gzip.open(files[0], "wt") as file:
        file.write("name,vh\n")
    with pytest.raises(ValueError, match="is no table of pairs: columns"):
        read_pairs(files[0])
    files[0].write_text("not packed")
    with pytest.raises(ValueError, match="is damaged or another kind of file"):
        read_pairs(files[0])
