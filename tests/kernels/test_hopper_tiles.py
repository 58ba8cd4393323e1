"""Which tiles the Hopper kernels get, and which problems: no GPU is needed to know."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'pairformer_fast[gpu]'")

from pairformer_fast.kernels.flash_bias import hopper_tiles, launch
from pairformer_fast.kernels.flash_bias.hopper_tiles import KINDS, HopperTiles, Widths, choose
from pairformer_fast.kernels.flash_bias.terms import BiasTerms

SHARED_BYTES = 227 * 1024
"""What an H100 gives one block."""

COMPILED = {
    ("forward", HopperTiles(3, 2, 64, 2), Widths(32, 32, False)): 78332,
    ("forward", HopperTiles(4, 2, 32, 2), Widths(32, 32, False)): 119360,
    ("forward", HopperTiles(3, 1, 32, 2), Widths(32, 16, True)): 53804,
    ("forward", HopperTiles(2, 1, 64, 2), Widths(32, 128, True)): 123400,
    ("backward_dq", HopperTiles(2, 2, 64, 2), Widths(32, 32, False)): 115272,
    ("backward_dq", HopperTiles(2, 1, 32, 2), Widths(64, 128, True)): 148088,
    ("backward_dkv", HopperTiles(2, 1, 64, 2), Widths(64, 128, True)): 198408,
    ("backward_dkv", HopperTiles(2, 2, 32, 2), Widths(16, 16, False)): 48760,
    ("backward_pairs", HopperTiles(3, 1, 64, 2), Widths(32, 0, True)): 93708,
    ("backward_pairs", HopperTiles(3, 1, 64, 2), Widths(16, 0, True)): 60940,
}
"""Bytes of shared memory that Triton 3.6 reports for kernels compiled for compute capability 9.0."""


def shared_bytes(kind: str, tiles: HopperTiles, widths: Widths) -> int:
    """Shared memory of a kernel, counted buffer by buffer, less barriers."""
    consumers, group, block, stages = tiles
    token, factor = 2 * widths.head, 2 * widths.rank
    table = consumers * 64 * block * 2 * widths.dense
    statistics = 2 * 4 * group * block * (kind == "backward_dkv")
    if kind == "backward_pairs":
        rows = 2 * 64 * token + 2 * consumers * 64 * token + 2 * consumers * 64 * 4
        return consumers * 64 * 64 * 2 + stages * rows
    own = consumers * 64 * (group * token + factor) * (2 if consumers == 4 else 1)
    if kind != "forward":
        own = consumers * 64 * (2 * 2 * group * token + factor)
    return own + stages * (block * (2 * group * token + factor) + table + statistics)


@pytest.mark.parametrize(("kind", "tiles", "widths"), COMPILED)
def test_count_of_shared_memory_is_the_compilers(kind: str, tiles: HopperTiles, widths: Widths) -> None:
    barriers = COMPILED[kind, tiles, widths] - shared_bytes(kind, tiles, widths)
    assert 0 < barriers < 1024


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_tiles_fit(kind: str) -> None:
    for head, rank, dense in product((16, 32, 64), (0, 16, 32, 64, 128), (False, True)):
        for length, rows in product((1, 64, 191, 768, 4096), (1, 2, 768)):
            widths = Widths(head, rank, dense)
            tiles = choose(kind, length, rows, widths)
            wanted = widths._replace(rank=0, dense=True) if kind == "backward_pairs" else widths
            assert shared_bytes(kind, tiles, wanted) + 1024 < SHARED_BYTES, widths
            assert tiles.stages >= 2, widths
            assert rows > 1 or tiles.group == 1, widths


def test_cost_and_waste_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three consumers divide 768 tokens and waste an eighth of 1024, which four divide."""
    three, four = [3, 2, 64, 4], [4, 2, 32, 5]
    entries = [
        {"dim": 32, "rank": 32, "tiles": three, "cost": 1.0},
        {"dim": 32, "rank": 32, "tiles": four, "cost": 1.04},
    ]
    monkeypatch.setattr(hopper_tiles, "_table", lambda: {"kernels": {"forward": entries}})
    choose.cache_clear()
    widths = Widths(32, 32, False)
    try:
        assert choose("forward", 768, 768, widths) == HopperTiles(*three)
        assert choose("forward", 1024, 1024, widths) == HopperTiles(*four)
        entries[1]["cost"] = 1.2
        choose.cache_clear()
        assert choose("forward", 1024, 1024, widths) == HopperTiles(*three)
    finally:
        choose.cache_clear()


def test_wide_factors_have_their_own_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        {"dim": 32, "rank": 128, "tiles": [2, 1, 64, 4], "cost": 1.0},
        {"dim": 32, "rank": 32, "tiles": [3, 2, 64, 4], "cost": 1.0},
    ]
    monkeypatch.setattr(hopper_tiles, "_table", lambda: {"kernels": {"forward": entries}})
    choose.cache_clear()
    try:
        for rank, consumers in ((0, 3), (16, 3), (32, 3), (64, 2), (128, 2)):
            assert choose("forward", 768, 768, Widths(32, rank, False)).consumers == consumers
    finally:
        choose.cache_clear()


def test_fewer_stages_or_rows_where_memory_is_short() -> None:
    tiles = HopperTiles(3, 2, 64, 8)
    assert hopper_tiles.fit("forward", tiles, Widths(32, 32, False)) == tiles
    assert hopper_tiles.fit("forward", tiles, Widths(32, 32, True)) == tiles._replace(stages=4)
    assert hopper_tiles.fit("forward", tiles, Widths(64, 128, True)) is None
    assert hopper_tiles.fit("backward_pairs", HopperTiles(2, 1, 64, 3), Widths(32, 0, True)) is None


@pytest.mark.parametrize(
    ("kind", "widths"),
    [("forward", Widths(128, 32, False)), ("backward_dq", Widths(32, 256, False))],
    ids=["D128", "R256"],
)
def test_nothing_fits(kind: str, widths: Widths) -> None:
    with pytest.raises(LookupError, match=kind):
        choose(kind, 768, 768, widths)


def test_table() -> None:
    kernels = hopper_tiles._table()["kernels"]
    assert set(kernels) == set(KINDS)
    for kind, entries in kernels.items():
        places = [(entry["dim"], entry["rank"], *entry["tiles"]) for entry in entries]
        assert len(set(places)) == len(places), kind
        for dim in (32, 64):
            assert any(entry["dim"] == dim and entry["rank"] >= 128 for entry in entries), kind
        for entry in entries:
            tiles = HopperTiles(*entry["tiles"])
            assert entry["dim"] in (32, 64)
            assert tiles.consumers in (2, 3, 4)
            assert tiles.consumers < 4 or kind == "forward", "the backward kernels have two or three consumers"
            assert tiles.consumers == 3 or kind != "backward_pairs"
            assert tiles.block in (32, 64)
            assert tiles.group in (1, 2)
            assert 1.0 <= entry["cost"] <= 1.15
        classes = {(entry["dim"], entry["rank"]) for entry in entries}
        for each in classes:
            assert min(entry["cost"] for entry in entries if (entry["dim"], entry["rank"]) == each) == 1.0


def cuda_like(dim: int = 32, dtype: torch.dtype = torch.bfloat16, stride: int | None = None) -> SimpleNamespace:
    """What ``hopper_takes`` asks of a tensor on a GPU."""
    real = torch.empty_strided((1, 3, 64, 2, dim), (384 * dim, 128 * dim, stride or 2 * dim, dim, 1), dtype=dtype)
    return SimpleNamespace(
        is_cuda=True,
        dtype=dtype,
        device=real.device,
        shape=real.shape,
        stride=real.stride,
        data_ptr=lambda: 0,
    )


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "_gluon_known", lambda: True)


@pytest.mark.usefixtures("hopper")
def test_what_the_hopper_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    x, terms = cuda_like(), BiasTerms()
    assert launch.hopper_takes(x, x, x, terms, None)
    assert not launch.hopper_takes(x, x, x, BiasTerms(table=torch.zeros(2, 3)), None)
    assert not launch.hopper_takes(x, x, x, terms, torch.ones(1, 64, 64, dtype=torch.bool))
    for other in (cuda_like(dtype=torch.float16), cuda_like(dim=128), cuda_like(dim=12)):
        assert not launch.hopper_takes(other, other, other, terms, None)
    assert not launch.hopper_takes(x, cuda_like(stride=67), x, terms, None), "rows of odd length"
    on_cpu = torch.zeros(1, 3, 64, 2, 32, dtype=torch.bfloat16)
    assert not launch.hopper_takes(on_cpu, on_cpu, on_cpu, terms, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert not launch.hopper_takes(x, x, x, terms, None)


@pytest.mark.parametrize(("version", "known"), [("3.6.0", True), ("3.6.1+git", True), ("3.5.1", False), ("4.0", False)])
def test_only_known_versions_of_gluon(version: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.triton, "__version__", version)
    assert launch._gluon_known() is known
