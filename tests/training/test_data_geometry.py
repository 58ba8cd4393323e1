"""Predicted backbones are repaired, and what cannot be repaired is masked or rejected."""

from dataclasses import replace

import numpy as np

from pairformer_fast.training.idealize import idealize_backbones
from pairformer_fast.training.quality import keep_sound, repaired_too_far
from pairformer_fast.training.shards import Structure

from .structures import structure


def peptide_bonds(made: Structure) -> np.ndarray:
    bonded = made.chain_index[1:] == made.chain_index[:-1]
    return np.linalg.norm(made.atom14[:-1, 2] - made.atom14[1:, 0], axis=-1)[bonded]


def with_shift(made: Structure, residue: int, shift: list[float] | np.ndarray) -> Structure:
    atom14 = made.atom14.copy()
    atom14[residue] += np.array(shift, dtype=np.float32) * made.atom14_mask[residue][:, None]
    return replace(made, atom14=atom14)


def test_an_ideal_backbone_stays() -> None:
    ideal = structure("helix", ["ACDEFGHIKLMNPQRSTVWY", "ACDEFGHIK"], all_atoms=True)
    (moved,) = idealize_backbones([ideal])
    np.testing.assert_allclose(moved.atom14, ideal.atom14, atol=0.15)
    assert keep_sound(ideal)[0] is not None


def test_broken_bonds_are_closed_near_where_they_were() -> None:
    ideal = structure("helix", ["ACDEFGHIKLMNPQRSTVWY"], all_atoms=True)
    bent = with_shift(ideal, 10, [0.7, -0.5, 0.4])
    assert np.abs(peptide_bonds(bent) - 1.33).max() > 0.3
    (moved,) = idealize_backbones([bent])
    assert np.abs(peptide_bonds(moved) - 1.33).max() < 0.03
    assert np.linalg.norm(moved.atom14[:, 1] - bent.atom14[:, 1], axis=-1).max() < 0.8
    assert not repaired_too_far(bent, moved)
    for atoms in ((0, 1), (1, 2), (1, 4)):
        before, after = (np.linalg.norm(s.atom14[:, atoms[0]] - s.atom14[:, atoms[1]], axis=-1) for s in (bent, moved))
        exists = bent.atom14_mask[:, atoms[1]]
        np.testing.assert_allclose(after[exists], before[exists], atol=1e-3)
    carbonyl = np.linalg.norm(moved.atom14[:, 2] - moved.atom14[:, 3], axis=-1)
    np.testing.assert_allclose(carbonyl, 1.231, atol=0.01)


def test_padding_does_not_change_the_result() -> None:
    short = with_shift(structure("a", ["ACDEFGHIK"]), 4, [0.5, 0, 0])
    long = structure("b", ["ACDEFGHIKLMNPQRSTVWY"])
    alone, together = idealize_backbones([short])[0], idealize_backbones([short, long])[0]
    np.testing.assert_allclose(alone.atom14, together.atom14, atol=1e-3)


def test_residues_at_a_broken_bond_lose_their_target() -> None:
    ideal = structure("helix", ["ACDEFGHIKL" * 4])
    made = with_shift(ideal, 39, 0.3 * (ideal.atom14[39, 0] - ideal.atom14[38, 2]))
    sound, problem = keep_sound(made)
    assert sound is not None
    assert problem == ""
    assert np.flatnonzero(~sound.atom14_mask[:, 1]).tolist() == [38, 39]


def test_torn_chains_and_clashes_are_rejected() -> None:
    made = structure("helix", ["ACDEFGHIKL" * 4, "ACDEFGHIKL" * 4])
    assert keep_sound(with_shift(made, 39, [3.0, 0, 0])) == (None, "torn_chain")
    together = replace(made, atom14=np.concatenate([made.atom14[:40], made.atom14[:40] + 1]))
    assert keep_sound(together) == (None, "ca_clash")
    assert keep_sound(replace(made, atom14=made.atom14 * 1.25)) == (None, "broken_bonds")


def test_a_residue_flung_away_is_not_repaired_into_a_target() -> None:
    flung = with_shift(structure("helix", ["ACDEFGHIKL" * 4]), 20, [25.0, 0, 0])
    assert repaired_too_far(flung, idealize_backbones([flung])[0])
