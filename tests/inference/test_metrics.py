import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from pairformer_fast.inference import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def random_walk(rng, n: int) -> np.ndarray:
    return np.cumsum(rng.normal(scale=2.2, size=(n, 3)), axis=0)


@pytest.mark.parametrize("n", [3, 4, 50])
def test_superposition_undoes_a_rigid_motion_and_never_mirrors(rng, n):
    fixed = random_walk(rng, n)
    mobile = Rotation.random(rng=rng).apply(fixed) + np.array([10, -20, 30])
    rotation, translation = metrics.superposition(mobile, fixed)
    np.testing.assert_allclose(metrics.transform(mobile, rotation, translation), fixed, atol=1e-9)
    mirrored, _ = metrics.superposition(mobile * [1, 1, -1], fixed)
    assert np.linalg.det(mirrored) == pytest.approx(1)


def test_superposition_on_a_weighted_subset_ignores_the_rest(rng):
    fixed = random_walk(rng, 20)
    mobile = Rotation.random(rng=rng).apply(fixed)
    mobile[10:] += rng.normal(scale=20, size=(10, 3))
    weights = np.stack([np.arange(20) < 10, np.ones(20)])
    moved = metrics.transform(mobile, *metrics.superposition(mobile, fixed, weights))
    np.testing.assert_allclose(moved[0, :10], fixed[:10], atol=1e-9)
    assert metrics.rmsd(moved[1], fixed) > 5


def test_gdt_finds_a_rigid_domain_that_one_global_superposition_misses(rng):
    reference = random_walk(rng, 100)
    model = reference.copy()
    model[60:] = Rotation.from_rotvec([0, 0, 2.0]).apply(model[60:]) + 40
    at_once = metrics.transform(model, *metrics.superposition(model, reference))
    assert (np.linalg.norm(at_once - reference, axis=-1) <= 1).mean() < 0.2
    assert metrics.gdt(model, reference, (1.0,), 100) == pytest.approx(0.6, abs=0.02)


def test_gdt_is_the_mean_share_over_cutoffs_and_counts_missing_residues(rng):
    reference = random_walk(rng, 200)
    model = reference.copy()
    model[::4, 2] += 3.9
    assert metrics.gdt(model, reference, (1.0, 4.0), 200) == pytest.approx((0.75 + 1) / 2, abs=0.01)
    assert metrics.gdt(model, reference, (1.0, 4.0), 400) == pytest.approx((0.75 + 1) / 4, abs=0.01)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
def test_gdt_of_tiny_and_identical_structures_is_one(rng, n):
    walk = random_walk(rng, n)
    assert metrics.gdt(walk + 5, walk, metrics.GDT_HA_CUTOFFS, n) == 1
