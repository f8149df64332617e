"""The order of the training images: a pure function from a position in the endless stream to an image.

In: stream positions, the number of images, a seed. Out: image ids. `data/loader.py` calls. Nothing is stored: epoch e is the
permutation that (seed, e) select, computed for just the positions asked, so that resuming at any position costs nothing.
"""

from __future__ import annotations

import numpy as np

ORDER_VERSION = 1  # a change of any number below is another order: raise this

_ROUNDS = 8  # four make a Feistel network hard to tell from random; the rest is for halves of only a few bits
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the step of the splitmix64 generator
_MASK64 = (1 << 64) - 1


def random_words(seed: int, purpose: int, *counters: np.ndarray) -> np.ndarray:
    """Uniform 64-bit words that depend on (seed, purpose, counters) alone: integers [N] each -> uint64 [N].

    A counter-based generator: what is drawn for a position never depends on which rank draws it, or on what was drawn before.
    """
    words = np.full(1, (seed ^ (purpose * _GOLDEN)) & _MASK64, dtype=np.uint64)
    for counter in counters:
        words = _mix(_mix(words) ^ counter.astype(np.uint64))
    return words


def _mix(words: np.ndarray) -> np.ndarray:
    """One step of splitmix64: uint64 [N] -> uint64 [N], a bijection in which each input bit moves half of the output bits."""
    words = words + np.uint64(_GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def shuffled(positions: np.ndarray, n_images: int, seed: int) -> np.ndarray:
    """The image at each position of the stream: int64 [B] -> int64 [B] in 0 .. n_images - 1.

    Position p is place p % n_images of epoch p // n_images; in each epoch every image comes exactly once, in another order.
    """
    assert n_images > 0
    assert (positions >= 0).all()
    epoch, place = np.divmod(positions.astype(np.int64), n_images)
    keys = random_words(seed, 0, epoch)
    bits = max(1, (n_images - 1).bit_length())
    ids = place.astype(np.uint64)
    outside: np.ndarray = np.ones(len(ids), dtype=bool)
    while outside.any():  # cycle walking: permute 0 .. 2^bits - 1 until inside; fewer than two turns on average
        ids[outside] = _permute(ids[outside], keys[outside], bits)
        outside = ids >= n_images
    return ids.astype(np.int64)


def _permute(values: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """A keyed permutation of 0 .. 2^bits - 1, element by element: a Feistel network on an upper and a lower half."""
    lower_bits = np.uint64((bits + 1) // 2)
    upper_mask, lower_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << (bits + 1) // 2) - 1)
    upper, lower = values >> lower_bits, values & lower_mask
    for number in range(0, _ROUNDS, 2):  # each line can be undone by doing it again
        upper = upper ^ (_mix((keys + np.uint64(number)) ^ _mix(lower)) & upper_mask)
        lower = lower ^ (_mix((keys + np.uint64(number + 1)) ^ _mix(upper)) & lower_mask)
    return (upper << lower_bits) | lower
