"""Counter-based random numbers: what they depend on, how they are spread, and that they stay what they are."""

import numpy as np

from igpt_ds.counter_random import random_words


def test_random_words_depend_on_all_that_is_named():
    counters = np.arange(1000)
    base = random_words(1, 2, counters)
    assert (base.dtype, len(set(base.tolist()))) == (np.uint64, 1000)
    for other in (random_words(2, 2, counters), random_words(1, 3, counters), random_words(1, 2, counters + 1000)):
        assert not set(other.tolist()) & set(base.tolist())
    np.testing.assert_array_equal(random_words(1, 2, counters[5:9]), base[5:9])
    bits = np.unpackbits(base.view(np.uint8)).reshape(1000, 64).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / np.sqrt(1000)


def test_shapes_broadcast():
    rows, columns = np.array([3, 10**12]), np.arange(5)
    grid = random_words(7, 1, rows[:, None], columns)
    np.testing.assert_array_equal(grid.ravel(), random_words(7, 1, rows.repeat(5), np.tile(columns, 2)))
    assert len(set(grid.ravel().tolist())) == 10


def slow_word(seed, purpose, counters):
    """The same in Python's whole numbers: splitmix64 over the counters in turn."""

    def mix(word):
        word = (word + 0x9E3779B97F4A7C15) % 2**64
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
        return word ^ (word >> 31)

    word = (seed ^ (purpose * 0x9E3779B97F4A7C15)) % 2**64
    for counter in counters:
        word = mix(mix(word) ^ counter)
    return word


def test_words_are_those_of_splitmix64():
    for seed, purpose, counters in ((0, 0, (0,)), (5, 7, (10**15, 4095)), (2**64 - 1, 8, (1, 2))):
        found = random_words(seed, purpose, *(np.array([counter]) for counter in counters))
        assert found.tolist() == [slow_word(seed, purpose, counters)]
