"""The order is a permutation in every epoch, another one each time, mixed well, and never changes; so is that of a mixture."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.data.order import BLOCK, MAX_IMAGES, ORDER_VERSION, mixed, shares_of, shuffled

SEEDS = st.integers(-(2**63), 2**64)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5000), SEEDS, st.integers(0, 10**9))
def test_every_epoch_is_a_permutation(n, seed, epoch):
    ids = shuffled(np.arange(epoch * n, (epoch + 1) * n), n, seed)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(np.sort(ids), np.arange(n))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**7) | st.integers(2**31, MAX_IMAGES), SEEDS, st.lists(st.integers(0, 10**15), max_size=20))
def test_each_position_stands_alone(n, seed, positions):
    together = shuffled(np.array(positions, dtype=np.int64), n, seed)
    assert ((together >= 0) & (together < n)).all()
    alone = [shuffled(np.array([position]), n, seed)[0] for position in positions]
    np.testing.assert_array_equal(together, alone)


def test_a_batch_may_span_epochs():
    n = 10
    stream = shuffled(np.arange(5 * n), n, 3)
    np.testing.assert_array_equal(shuffled(np.arange(7, 33), n, 3), stream[7:33])
    for epoch in stream.reshape(5, n):
        assert sorted(epoch) == list(range(n))


def test_epochs_and_seeds_differ():
    n = 1000
    orders = [shuffled(np.arange(n) + epoch * n, n, seed) for seed in (0, 1, -1, 2**40) for epoch in range(4)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.02  # two random orders agree in one place on average


@pytest.mark.parametrize("n", [37, 1000, 1024, 1025, 50_000])
def test_order_looks_random(n):
    """Displacement, neighbours and halves behave as in a random permutation, over ten epochs each, to five sigma."""
    epochs = 10
    ids = shuffled(np.arange(n * epochs), n, 11).reshape(epochs, n)
    places = np.arange(n)
    sigma = n / np.sqrt(n * epochs)
    assert abs(np.abs(ids - places).mean() - n / 3) < 5 * 0.24 * sigma
    assert abs(np.abs(np.diff(ids, axis=1)).mean() - n / 3) < 5 * 0.3 * sigma
    assert abs(np.corrcoef(np.tile(places, epochs), ids.ravel())[0, 1]) < 5 / np.sqrt(n * epochs)
    parity = (ids % 2 == places % 2).mean()
    assert abs(parity - 0.5) < 5 * 0.5 / np.sqrt(n * epochs) + 1 / n
    early = (ids[:, : n // 2] < n // 2).mean()
    assert abs(early - (n // 2) / n) < 5 * 0.5 / np.sqrt(n * epochs / 2)


def test_every_image_visits_every_place_equally():
    n, epochs = 12, 6000
    ids = shuffled(np.arange(n * epochs), n, 5).reshape(epochs, n)
    counts = np.stack([np.bincount(ids[:, place], minlength=n) for place in range(n)])
    expected = epochs / n
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_images_come_in_every_order_equally_often(n):
    epochs = 12_000
    ids = shuffled(np.arange(n * epochs), n, 7).reshape(epochs, n)
    _, counts = np.unique(ids, axis=0, return_counts=True)
    orders = math.factorial(n)
    assert len(counts) == orders
    expected, freedom = epochs / orders, orders - 1
    assert ((counts - expected) ** 2 / expected).sum() <= freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [5, 100, 1024, 1025, 40_000])
def test_an_image_says_nothing_about_its_neighbours_or_the_next_epoch(n):
    """Ids of neighbouring places, and of one place in neighbouring epochs and seeds, do not correlate, to five sigma."""
    epochs = max(2, 200_000 // n)
    orders = [shuffled(np.arange(n * epochs), n, seed).reshape(epochs, n) for seed in (0, 1)]
    one, other = orders
    pairs = [(one[:-1], one[1:], 0.0), (one, other, 0.0), (one[:, :-1], one[:, 1:], -1 / (n - 1))]
    for first, second, expected in pairs:
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1] - expected) < 5 / np.sqrt(first.size)
    repeats = (one[:-1] == one[1:]).sum(axis=1)  # two random orders agree in one place on average, with variance one
    assert abs(repeats.mean() - 1) < 5 / np.sqrt(len(repeats))


def test_an_epoch_of_web_size_needs_no_memory():
    n = MAX_IMAGES
    ids = shuffled(np.arange(n - 5, n + 5), n, 0)
    assert len(set(ids.tolist())) == 10
    assert ids.max() > n // 10
    assert ids.max() < n


def test_order_is_frozen():
    """A run resumed by later code must see the same images: a change here needs another ORDER_VERSION."""
    assert ORDER_VERSION == 2
    assert shuffled(np.arange(12), 10, 0).tolist() == [8, 2, 6, 3, 4, 0, 9, 1, 7, 5, 2, 3]
    assert shuffled(np.arange(10**6, 10**6 + 4), 50_000, 1234).tolist() == [11780, 31638, 22971, 17538]
    assert [part.tolist() for part in mixed(np.arange(5000, 5006), [1024, 3072], [7, 10**8], 3)] == [
        [1, 1, 1, 1, 1, 1],
        [64573960, 39307209, 14521432, 36921702, 85955586, 12354104],
    ]


# --------------------------------------------------------------------------------------------------- several datasets


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.05, 20), min_size=4, max_size=4),
    seed=SEEDS,
)
def test_each_dataset_goes_through_its_own_epochs(sizes, weights, seed):
    shares = shares_of(weights[: len(sizes)])
    blocks = 2
    which, ids = mixed(np.arange(blocks * BLOCK), shares, sizes, seed)
    for k, (share, size) in enumerate(zip(shares, sizes, strict=True)):
        assert (which.reshape(blocks, BLOCK) == k).sum(axis=1).tolist() == [share] * blocks
        own = ids[which == k]
        counts = np.bincount(own, minlength=size)
        assert len(counts) == size
        assert counts.max() - counts.min() <= 1


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, positions=st.lists(st.integers(0, 10**14), min_size=1, max_size=30))
def test_each_position_of_a_mixture_stands_alone(seed, positions):
    shares, sizes = shares_of([1.0, 2.5, 0.01]), [10, 10**6, 3]
    which, ids = mixed(np.array(positions), shares, sizes, seed)
    for place, position in enumerate(positions):
        alone = mixed(np.array([position]), shares, sizes, seed)
        assert (alone[0][0], alone[1][0]) == (which[place], ids[place])


def test_a_mixture_begins_no_dataset_in_step_with_another():
    which, ids = mixed(np.arange(64 * BLOCK), [BLOCK // 2, BLOCK // 2], [1000, 1000], 0)
    first, second = (ids[which == k] for k in (0, 1))
    assert (first == second).mean() < 0.01
    assert abs(np.diff(np.flatnonzero(which == 0)).mean() - 2) < 0.01
    blocks = which.reshape(64, BLOCK)
    assert abs((blocks[:-1] == blocks[1:]).mean() - 0.5) < 5 * 0.5 / np.sqrt(63 * BLOCK)


def test_a_dataset_alone_keeps_its_order():
    which, ids = mixed(np.arange(100), shares_of([3.0]), [37], 5)
    np.testing.assert_array_equal(ids, shuffled(np.arange(100), 37, 5))
    assert not which.any()


@given(st.lists(st.floats(0.5, 100), min_size=1, max_size=12))
def test_shares_are_the_rounded_weights(weights):
    shares = shares_of(weights)
    assert sum(shares) == BLOCK
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - weight / sum(weights) * BLOCK) < 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 0], r"--data_weights 0 must be a number above 0; leave that dataset out instead"),
        ([-2, 1], r"--data_weights -2 must be a number above 0"),
        ([1, math.nan], r"--data_weights nan must be a number above 0"),
        ([1, 100_000], r"weight 1 of dataset 1 is less than one image in 4096: at least 24.4 of 1e\+05 is needed"),
    ],
)
def test_weights_that_cannot_be_kept(weights, message):
    with pytest.raises(ValueError, match=message):
        shares_of(weights)
