"""Antibody variable domains are recognised, annotated and told from everything else."""

import random

import pytest

from pairformer_fast.inference.antibody import check_variable_domain
from pairformer_fast.training.sources import read_covabdab, read_crystals, read_sabdab

TRASTUZUMAB_H = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWG"
    "GDGFYAMDYWGQGTLVTVSS"
)
TRASTUZUMAB_L = (
    "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK"
)
LAMBDA = (
    "QSALTQPASVSGSPGQSITISCTGTSSDVGGYNYVSWYQQHPGKAPKLMIYEVSNRPSGVSNRFSGSKSGNTASLTISGLQAEDEADYYCSSYTSSSTYVFGTGTKVTVL"
)
NANOBODY_80 = (
    "QVQLQESGGGLVQAGGSLRLSCAASGSIFSINTMGWYRQAPGKQRELVAAIHSGGSTNYANSVKGRFTISRDNAANTVYLQMNSLKPEDTAVYYCNVKDY"
    "GAVLYEYDYWGQGTQVTVSS"
)
CABLYS3 = (
    "DVQLQASGGGSVQAGGSLRLSCAASGYTIGPYCMGWFRQAPGKEREGVAAINMGGGITYYADSVKGRFTISQDNAKNTVYLLMNSLEPEDTAIYYCAADS"
    "TIYASYYECGHGLSTGGYGYDSWGQGTQVTVSS"
)
CH1 = "ASTKGPSVFPLAPSSKSTSGGTAALGCLVKDYFPEPVTVSWNSGALTSGVHTFPAVLQSSGLYSLSSVVTVPSSSLGTQTYICNVNHKPSNTKVDKKV"
FC = (
    "EPKSCDKTHTCPPCPAPELLGGPSVFLFPPKPKDTLMISRTPEVTCVVVDVSHEDPEVKFNWYVDGVEVHNAKTKPREEQYNSTYRVVSV"
    "LTVLHQDWLNGKEYKCKVSNKALPAPIEK"
    "TISKAKGQPREPQVYTLPPSRDELTKNQVSLTCLVKGFYPSDIAVEWESNGQPENNYKTTPPVLDSDGSFFLYSKLTVDKSRWQQGNVFSCSVMHEALHNHYTQKSLSLSPGK"
)
C_KAPPA = "RTVAAPSVFIFPPSDEQLKSGTASVVCLLNNFYPREAKVQWKVDNALQSGNSQESVTEQDSKDSTYSLSSTLTLSKADYEKHKVYACEVTHQGLSSPVTKSFNRGEC"
NOT_ANTIBODIES = {
    "ubiquitin": "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",
    "crambin": "TTCCPSIVARSNFNVCRLPGTPEALCATYTGCIIIPGATCPGDYAN",
    "lysozyme": "KVFGRCELAAAMKRHGLDNYRGYSLGNWVCAAKFESNFNTQATNRNTDGSTDYGILQINSRWWCNDGRTPGSRNLCNIPCSALLSSDITASVNCAKKIVSD"
    "GNGMNAWVAWRNRCKGTDVQAWIRGCRL",
    "beta-2 microglobulin": "IQRTPKIQVYSRHPAENGKSNFLNCYVSGFHPSDIEVDLLKNGERIEKVEHSDLSFSKDWSFYLLYYTEFTPTEKDEYACRVNHVTLSQP"
    "KIVKWDRDM",
    "T cell receptor alpha": "KEVEQNSGPLSVPEGAIASLNCTYSDRGSQSFFWYRQYSGKSPELIMSIYSNGDKEDGRFTAQLNKASQYVSLLIRDSQPSD"
    "SATYLCAVTTDSWGKLQFGAGTQVVVTP",
    "PD-1": "PGWFLDSPDRPWNPPTFSPALLVVTEGDNATFTCSFSNTSESFVLNWYRMSPSNQTDKLAAFPEDRSQPGQDCRFRVTQLPNGRDFHMSV"
    "VRARRNDSGTYLCGAISL"
    "APKAQIKESLRAELRVTERRAE",
    "constant domain": C_KAPPA,
    "nothing": "",
}


def loops(sequence: str) -> list[str]:
    cdr = check_variable_domain(sequence).cdr
    assert len(cdr) == len(sequence)
    return ["".join(aa for aa, digit in zip(sequence, cdr, strict=True) if digit == number) for number in "123"]


@pytest.mark.parametrize(
    ("sequence", "chain_type", "expected"),
    [
        (TRASTUZUMAB_H, "H", ["GFNIKDTY", "IYPTNGYT", "SRWGGDGFYAMDY"]),
        (TRASTUZUMAB_L, "L", ["QDVNTA", "SAS", "QQHYTTPPT"]),
        (LAMBDA, "L", ["SSDVGGYNY", "EVS", "SSYTSSSTYV"]),
        (NANOBODY_80, "H", ["GSIFSINT", "IHSGGST", "NVKDYGAVLYEYDY"]),
        (CABLYS3, "H", ["GYTIGPYC", "INMGGGIT", "AADSTIYASYYECGHGLSTGGYGYDS"]),
    ],
    ids=["VH", "VL kappa", "VL lambda", "VHH", "VHH with a long CDR3"],
)
def test_imgt_loops_of_known_domains(sequence: str, chain_type: str, expected: list[str]) -> None:
    check = check_variable_domain(sequence)
    assert (check.is_variable, check.chain_type) == (True, chain_type)
    assert loops(sequence) == expected


@pytest.mark.parametrize("name", NOT_ANTIBODIES)
def test_other_proteins_are_rejected(name: str) -> None:
    check = check_variable_domain(NOT_ANTIBODIES[name])
    assert not check.is_variable
    assert check.chain_type is None
    assert check.cdr == ""
    assert check.reason


@pytest.mark.parametrize(
    ("sequence", "kept"),
    [
        (TRASTUZUMAB_H + CH1, "residues 1-120"),
        (TRASTUZUMAB_H + CH1 + FC, "residues 1-120"),
        (TRASTUZUMAB_L + C_KAPPA, "residues 1-107"),
        ("MEFGLSWLFLVAILKGVQC" + TRASTUZUMAB_H, "residues 20-139"),
    ],
    ids=["Fab heavy", "IgG heavy", "Fab light", "signal peptide"],
)
def test_the_reason_says_what_to_keep(sequence: str, kept: str) -> None:
    check = check_variable_domain(sequence)
    assert not check.is_variable
    assert kept in check.reason
    assert "trim the rest" in check.reason


def test_two_domains_in_one_chain_are_to_be_split() -> None:
    check = check_variable_domain(TRASTUZUMAB_L + "GGGGS" * 3 + TRASTUZUMAB_H)
    assert not check.is_variable
    assert "residues 1-107 (light) and residues 123-242 (heavy)" in check.reason
    assert "':'" in check.reason


@pytest.mark.parametrize("part", [slice(0, 90), slice(40, None), slice(25, None)])
def test_fragments_are_rejected(part: slice) -> None:
    assert not check_variable_domain(TRASTUZUMAB_H[part]).is_variable


def test_a_short_tag_and_missing_ends_are_tolerated() -> None:
    whole = check_variable_domain(TRASTUZUMAB_H).cdr
    assert check_variable_domain(TRASTUZUMAB_H + "HHHHHH").cdr == whole + "000000"
    assert check_variable_domain(TRASTUZUMAB_H[8:-5]).cdr == whole[8:-5]


def test_unknown_residues_do_not_shift_the_annotation() -> None:
    masked = TRASTUZUMAB_H[:10] + "XXX" + TRASTUZUMAB_H[13:]
    assert check_variable_domain(masked).cdr == check_variable_domain(TRASTUZUMAB_H).cdr


def test_shuffled_and_random_sequences_are_rejected() -> None:
    rng = random.Random(0)
    for template in (TRASTUZUMAB_H, TRASTUZUMAB_L, LAMBDA):
        for _ in range(50):
            assert not check_variable_domain("".join(rng.sample(template, len(template)))).is_variable
    for _ in range(50):
        assert not check_variable_domain("".join(rng.choices("ARNDCQEGHILKMFPSTWYV", k=120))).is_variable


def test_sabdab_domains_are_accepted_and_annotated_alike(shared_data) -> None:
    entries = read_sabdab(shared_data)
    checks = [check_variable_domain(entry.sequence) for entry in entries]
    assert all(check.is_variable for check in checks)
    heavy = [(check.cdr, entry.cdr) for check, entry in zip(checks, entries, strict=True) if check.chain_type == "H"]
    # six entries of the file are light chains that SAbDab lists as heavy
    assert len(heavy) == len(entries) - 6
    agree = [a == b for ours, theirs in heavy for a, b in zip(ours, theirs, strict=True)]
    assert sum(agree) / len(agree) > 0.9995


def test_pairs_and_crystals_are_accepted(shared_data) -> None:
    pairs = [*read_covabdab(shared_data)[0], *read_crystals(shared_data)]
    rejected = [
        pair.id
        for pair in pairs
        for sequence, chain_type in ((pair.vh, "H"), (pair.vl, "L"))
        if check_variable_domain(sequence).chain_type != chain_type or not check_variable_domain(sequence).is_variable
    ]
    # this entry still has its signal peptide
    assert rejected == ["F26G3"]
