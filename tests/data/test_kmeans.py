"""k-means finds what Lloyd's algorithm finds, weighs points, leaves no centre empty, and repeats itself to the bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.data import kmeans as module
from igpt_ds.data.kmeans import kmeans


def inertia(points, weights, centres):
    parts = np.array_split(np.arange(len(points)), 1 + len(points) // 2000)
    squares = [((points[part, None] - centres[None]) ** 2).sum(-1).min(1) for part in parts]
    return float(np.concatenate(squares) @ weights)


def clouds(n, seed=0):
    """Different points in clouds of unlike size, as the colours of photographs lie."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-0.8, 0.8, (30, 3))
    points = centres[rng.integers(30, size=n) ** 2 // 30] + rng.normal(0, 0.1, (n, 3))
    return np.unique(points.clip(-1, 1), axis=0), rng


def test_as_good_as_scikit_learn_from_the_same_start():
    from sklearn.cluster import KMeans

    points, rng = clouds(30_000)
    weights = rng.integers(1, 50, len(points)).astype(float)
    init = points[rng.permutation(len(points))[:32]]
    assert len(module._grid(points, weights, 32)[0]) < 0.7 * len(points)
    peer = KMeans(32, init=init, n_init=1, algorithm="lloyd").fit(points, sample_weight=weights).cluster_centers_
    assert inertia(points, weights, kmeans(points, weights, 32, init=init)) < 1.02 * inertia(points, weights, peer)


def test_one_centre_is_the_weighted_mean():
    points, rng = clouds(20_000)
    weights = rng.integers(1, 9, len(points)).astype(float)
    np.testing.assert_allclose(kmeans(points, weights, 1)[0], np.average(points, axis=0, weights=weights), atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 400), st.integers(0, 1000), st.data())
def test_each_centre_is_finite_and_the_nearest_of_some_point(n, seed, data):
    points, rng = clouds(n, seed)
    k = data.draw(st.integers(1, len(points)))
    weights = rng.integers(1, 9, len(points)).astype(float)
    centres = kmeans(points, weights, k, seed)
    assert centres.shape == (k, 3)
    assert np.isfinite(centres).all()
    assert np.abs(centres).max() <= 1
    np.testing.assert_array_equal(centres, kmeans(points, weights, k, seed))


def test_centres_far_from_all_points_move_to_them():
    points, _ = clouds(500)
    weights = np.ones(len(points))
    init = np.concatenate([points[:1], np.full((7, 3), 5.0) + np.arange(7)[:, None]])
    centres = kmeans(points, weights, 8, init=init)
    assert np.abs(centres).max() <= 1
    members = ((points[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert len(np.unique(members)) == 8


@pytest.mark.parametrize("k", [300, 2000])
def test_large_k_is_drawn_at_once_and_serves(k, monkeypatch):
    monkeypatch.setattr(module, "MAX_PLUS_PLUS", 100)
    points, _ = clouds(12_000)
    weights = np.ones(len(points))
    centres = kmeans(points, weights, k)
    assert len(np.unique(centres, axis=0)) == k
    chance = points[np.random.default_rng(0).permutation(len(points))[:k]]
    assert inertia(points, weights, centres) < 0.8 * inertia(points, weights, chance)


def test_grids_keep_the_mass_and_the_mean():
    points, rng = clouds(50_000)
    weights = rng.integers(1, 9, len(points)).astype(float)
    grid, mass = module._grid(points, weights, 8)
    assert len(grid) < 0.7 * len(points)
    assert mass.sum() == weights.sum()
    np.testing.assert_allclose(mass @ grid, weights @ points, atol=1e-8)
    assert module._grid(points, weights, 40_000)[0] is points
