"""The order is a permutation in every epoch, another one each time, mixed well, and never changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.data.order import ORDER_VERSION, random_words, shuffled

SEEDS = st.integers(-(2**63), 2**64)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5000), SEEDS, st.integers(0, 10**9))
def test_every_epoch_is_a_permutation(n, seed, epoch):
    ids = shuffled(np.arange(epoch * n, (epoch + 1) * n), n, seed)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(np.sort(ids), np.arange(n))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**7), SEEDS, st.lists(st.integers(0, 10**15), max_size=20))
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


def test_an_epoch_of_web_size_needs_no_memory():
    n = 10**12
    ids = shuffled(np.arange(n - 5, n + 5), n, 0)
    assert len(set(ids.tolist())) == 10
    assert ids.max() > n // 10


def test_order_is_frozen():
    """A run resumed by later code must see the same images: a change here needs another ORDER_VERSION."""
    assert ORDER_VERSION == 1
    assert shuffled(np.arange(12), 10, 0).tolist() == [9, 7, 3, 6, 1, 5, 8, 4, 0, 2, 0, 7]
    assert shuffled(np.arange(10**6, 10**6 + 4), 50_000, 1234).tolist() == [37773, 25940, 34560, 30159]


def test_random_words_depend_on_all_that_is_named():
    counters = np.arange(1000)
    base = random_words(1, 2, counters)
    assert (base.dtype, len(set(base.tolist()))) == (np.uint64, 1000)
    for other in (random_words(2, 2, counters), random_words(1, 3, counters), random_words(1, 2, counters + 1000)):
        assert not set(other.tolist()) & set(base.tolist())
    np.testing.assert_array_equal(random_words(1, 2, counters[5:9]), base[5:9])
    bits = np.unpackbits(base.view(np.uint8)).reshape(1000, 64).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / np.sqrt(1000)
