"""Shards keep structures, the dataset and its sampler give the batches that training relies on."""

from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pairformer_fast.model.residue import UNKNOWN
from pairformer_fast.training.dataset import AntibodyDataset, Augmentation, Draw, MixtureSampler, collate
from pairformer_fast.training.shards import Shard, shard_path, write_shard

from .structures import structure

MIXTURE = {"single": 0.3, "pair": 0.7}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    singles = [structure(f"s{i}", ["ACDEFG" * 3], "single", seed=i) for i in range(40)]
    pairs = [structure(f"p{i}", ["WYTRNL", "GHIKMPQ"], "pair", all_atoms=True, seed=i) for i in range(60)]
    write_shard(shard_path(tmp_path, "train"), singles + pairs)
    return tmp_path


@pytest.fixture
def dataset(folder: Path) -> AntibodyDataset:
    return AntibodyDataset(folder, "train")


def test_structures_survive_to_half_a_step(tmp_path: Path) -> None:
    written = [structure("a", ["ACDEFGHIK"]), structure("b", ["LMNPQ", "RSTVWY"], "other", all_atoms=True)]
    partial_mask = written[1].atom14_mask.copy()
    partial_mask[3, 5:] = False
    written[1] = replace(written[1], atom14_mask=partial_mask, atom14=written[1].atom14 * partial_mask[..., None])
    write_shard(tmp_path / "x.safetensors", written)
    for before, after in zip(written, Shard(tmp_path / "x.safetensors"), strict=True):
        assert (after.id, after.source, after.weight) == (before.id, before.source, before.weight)
        for name in ("aatype", "chain_index", "residue_index", "cdr", "atom14_mask"):
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
        mask = before.atom14_mask
        centred = before.atom14[mask] - before.atom14[mask].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(after.atom14[mask], centred, atol=0.0051)
        assert not after.atom14[~mask].any()


def test_same_structures_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / name, [structure("x", ["ACD", "EFG"]), structure("y", ["ACD"], "other")])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_structures_that_do_not_fit_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    far = structure("far", ["ACD", "EFG"])
    far.atom14[3:] += 1000 * far.atom14_mask[3:, :, None]
    with pytest.raises(ValueError, match="far: atoms lie"):
        write_shard(tmp_path / "x", [far])
    broken = structure("nan", ["ACD"])
    broken.atom14[0, 0] = np.nan
    with pytest.raises(ValueError, match="nan: no atoms, or coordinates that are not finite"):
        write_shard(tmp_path / "x", [broken])
    assert not list(tmp_path.iterdir())


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="prepare_antibody_data"):
        AntibodyDataset(tmp_path, "train")
    shard_path(tmp_path, "train").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        AntibodyDataset(tmp_path, "train")


def test_one_chain_or_swapped_chains(dataset: AntibodyDataset) -> None:
    index = dataset.sources.index("pair")
    whole, light, swapped = (dataset[Draw(index, chains)] for chains in ((0, 1), (1,), (1, 0)))
    assert torch.equal(whole["atom14"], dataset[index]["atom14"])
    assert torch.equal(light["aatype"], whole["aatype"][6:])
    assert light["chain_index"].tolist() == [0] * 7
    assert light["residue_index"].tolist() == list(range(7))
    assert torch.equal(swapped["atom14"], torch.cat([whole["atom14"][6:], whole["atom14"][:6]]))
    assert swapped["chain_index"].tolist() == [0] * 7 + [1] * 6
    assert swapped["residue_index"].tolist() == [*range(7), *range(6)]


def test_padding_is_masked(dataset: AntibodyDataset) -> None:
    items = [dataset[0], dataset[dataset.sources.index("pair")]]
    batch = collate(items, lengths=[48, 16, 32])
    assert batch.features.aatype.shape == (2, 32)
    assert batch.features.mask.sum(1).tolist() == [18, 13]
    assert (batch.features.aatype[~batch.features.mask] == UNKNOWN).all()
    assert not batch.atom14_mask[~batch.features.mask].any()
    assert torch.equal(batch.atom14[1, :13], items[1]["atom14"])
    for lengths in ((), (16,)):
        assert collate(items, lengths).atom14.shape[1] == 18
    assert batch.to("meta").features.mask.device.type == "meta"


def test_batches_are_a_function_of_seed_rank_and_step(dataset: AntibodyDataset) -> None:
    def batches(count: int = 20, **options) -> list[list[Draw]]:
        return list(islice(MixtureSampler(dataset, MIXTURE, batch_size=4, **options), count))

    first = batches(seed=3)
    assert first == batches(seed=3)
    assert first != batches(seed=4)
    assert first[7:] == batches(13, seed=3, start=7)
    ranks = [batches(seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    assert ranks[0] != ranks[1]
    for zero, one in zip(*ranks, strict=True):
        assert {len(draw.chains) for draw in zero} == {len(draw.chains) for draw in one}


@pytest.mark.parametrize(("batch_size", "structures_of"), [(4, {1: 4, 2: 2}), (5, {1: 5, 2: 2}), (1, {1: 1, 2: 1})])
def test_mixture_and_forms_have_the_wanted_shares(
    dataset: AntibodyDataset, batch_size: int, structures_of: dict[int, int]
) -> None:
    augmentation = Augmentation(first_only=0.2, second_only=0.1, swapped=0.3)
    sampler = MixtureSampler(dataset, MIXTURE, batch_size, augmentation=augmentation)
    batches = list(islice(sampler, 6000))
    for batch in batches:
        (chains,) = {len(draw.chains) for draw in batch}
        assert len(batch) == structures_of[chains]
    draws = [draw for batch in batches for draw in batch]
    pairs = [draw.chains for draw in draws if dataset.sources[draw.index] == "pair"]
    assert len(pairs) / len(draws) == pytest.approx(0.7, abs=0.02)
    for chains, share in augmentation.forms().items():
        assert pairs.count(chains) / len(pairs) == pytest.approx(share, abs=0.03)
    assert len({draw.index for draw in draws}) == len(dataset)


def test_sources_without_weight_are_not_drawn(dataset: AntibodyDataset) -> None:
    sampler = MixtureSampler(dataset, {"pair": 1.0}, batch_size=8)
    assert {dataset.sources[draw.index] for batch in islice(sampler, 50) for draw in batch} == {"pair"}


def test_a_loader_takes_sampler_and_collate(dataset: AntibodyDataset) -> None:
    loader = DataLoader(
        dataset,
        batch_sampler=MixtureSampler(dataset, MIXTURE, batch_size=3),
        collate_fn=partial(collate, lengths=(16, 24)),
    )
    # three single chains of 18 residues, or one pair of 13
    assert {batch.atom14.shape[:2] for batch in islice(loader, 20)} == {(3, 24), (1, 16)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_weights": {"pdb": 1}}, "unknown sources"),
        ({"source_weights": {"pair": -1}}, "at least 0"),
        ({"source_weights": {}}, "not all 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
    ],
)
def test_bad_sampler_arguments(dataset: AntibodyDataset, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureSampler(dataset, **({"source_weights": MIXTURE, "batch_size": 4} | options))


def test_augmentation_probabilities_are_checked() -> None:
    with pytest.raises(ValueError, match="sum to at most 1"):
        Augmentation(first_only=0.6, swapped=0.6)
