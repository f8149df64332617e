"""The order of the training images: a pure function from a position in the endless stream to an image.

In: stream positions, the number of images, a seed. Out: image ids. Called by `data/mixture.py` and `data/streaming.py`.
Nothing is stored. (seed, epoch) selects a permutation, which is computed for the requested positions only, so resuming at any
position costs nothing.
"""

from __future__ import annotations

import math

import numpy as np

from igpt_ds.counter_random import random_words
from igpt_ds.errors import InputError

ORDER_VERSION = 2  # raise this if any number below changes, because the order changes too
ONE_VIEW_ORDER = 3  # of `one_view`

MAX_IMAGES = 2**32 - 1
BLOCK = 4096  # positions in which several datasets have exactly their shares

_ROUNDS = 6  # four rounds make a Feistel network hard to distinguish from random
_SMALL, _SMALL_ROUNDS = 1024, 16  # halves of only a few bits need more rounds
_ORDER, _SLOTS, _DATASET, _VIEW = 0, 4, 5, 10  # purposes of random words


def shuffled(positions: np.ndarray, n_images: int, seed: int) -> np.ndarray:
    """The image at each position of the stream: int64 [B] -> int64 [B] in 0 .. n_images - 1; n_images at most MAX_IMAGES.

    Position p is place p % n_images of epoch p // n_images. Each epoch has every image exactly once, in a different order.
    """
    return _permuted(positions, n_images, seed, _ORDER)


def one_view(positions: np.ndarray, first_views: np.ndarray, n_views: int, seed: int) -> np.ndarray:
    """The stored view at each position of a stream that has each image once an epoch: int64 [B] -> int64 [B] in 0 .. n_views - 1.

    The images have the order of `shuffled`. Each epoch takes the next view of an image, from a random one on, so that as many
    epochs as an image has views use all of them.

    Args:
        first_views: the first view of each image, as `ShardSet.first_views` gives it.
        n_views: of all images together.
    """
    images = shuffled(positions, len(first_views), seed)
    views = np.append(first_views[1:], n_views)[images] - first_views[images]
    start = (random_words(seed, _VIEW, images) % views.astype(np.uint64)).astype(np.int64)
    return first_views[images] + (start + positions // len(first_views)) % views


def mixed(positions: np.ndarray, shares: list[int], sizes: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The images at some positions of a stream of several datasets: int64 [B] -> which dataset [B], image ids in it [B].

    The stream is divided into blocks of sum(shares) positions. Each block has dataset k in exactly shares[k] of its places,
    chosen by a permutation per block. The images at these places continue that dataset's own stream of `shuffled` images, so each
    dataset's images come exactly once in each of its epochs. A single dataset has the order of `shuffled`.
    """
    if len(shares) == 1:
        return np.zeros(len(positions), dtype=np.int64), shuffled(positions, sizes[0], seed)
    block = sum(shares)
    slots = _permuted(positions, block, seed, _SLOTS)
    blocks = positions // block
    first = np.cumsum([0, *shares])
    which = np.searchsorted(first, slots, side="right") - 1
    seeds = random_words(seed, _DATASET, np.arange(len(shares)))
    ids = np.empty(len(positions), dtype=np.int64)
    for k, share in enumerate(shares):
        places = np.flatnonzero(which == k)
        own = blocks[places] * share + slots[places] - first[k]
        ids[places] = shuffled(own, sizes[k], int(seeds[k]))
    return which, ids


def shares_of(weights: list[float]) -> list[int]:
    """How many positions of each BLOCK every dataset gets, in proportion to the weights: largest remainders, at least one.

    Raises:
        ValueError: a weight is not a positive number, or too small for one position of a block.
    """
    if len(weights) == 1:
        return [BLOCK]
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(f"--data_weights {weight:g} must be a number above 0; leave that dataset out instead")
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    shares = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (shares[k] - exact[k], k))
    for k in by_remainder[: BLOCK - sum(shares)]:
        shares[k] += 1
    if 0 in shares:
        k = shares.index(0)
        least = f"at least {sum(weights) / BLOCK:.3g} of {sum(weights):.3g} is needed"
        raise InputError(f"weight {weights[k]:g} of dataset {k + 1} is less than one image in {BLOCK}: {least} (--data_weights)")
    return shares


def _permuted(positions: np.ndarray, n: int, seed: int, purpose: int) -> np.ndarray:
    assert 0 < n <= MAX_IMAGES
    if not len(positions):
        return np.empty(0, dtype=np.int64)
    positions = positions.astype(np.int64, copy=False)
    first, last = int(positions.min()), int(positions.max())
    assert first >= 0
    epochs = (first // n, last // n)
    if epochs[0] == epochs[1]:
        keys = _round_keys(random_words(seed, purpose, np.array(epochs[:1])), n)
        places = (positions - epochs[0] * n).astype(np.uint32)
    else:
        epoch = positions // n
        places = (positions - epoch * n).astype(np.uint32)
        if epochs[1] - epochs[0] < len(positions):  # draw keys once per epoch instead of once per position
            words = random_words(seed, purpose, np.arange(epochs[0], epochs[1] + 1))[epoch - epochs[0]]
        else:
            words = random_words(seed, purpose, epoch)
        keys = _round_keys(words, n)
    columns = math.isqrt(n - 1) + 1
    rows = -(-n // columns)  # a grid of rows x columns with less than one row more than needed
    ids = _feistel(places, rows, columns, keys)
    outside = np.flatnonzero(ids >= n)
    while len(outside):  # cycle walking: permute again until the id is below n
        again = _feistel(ids[outside], rows, columns, [key if len(key) == 1 else key[outside] for key in keys])
        ids[outside] = again
        outside = outside[again >= n]
    return ids.astype(np.int64)


def _round_keys(words: np.ndarray, n: int) -> list[np.ndarray]:
    """Two 32-bit keys per round from one 64-bit word per position, or one word for all: uint64 [N] -> uint32 [N] each."""
    low, high = words.astype(np.uint32), (words >> np.uint64(32)).astype(np.uint32)
    keys = []
    for number in range(_SMALL_ROUNDS if n <= _SMALL else _ROUNDS):
        keys += [low + np.uint32(number * 0x9E3779B9 & 0xFFFFFFFF), high ^ np.uint32(number * 0x7F4A7C15 & 0xFFFFFFFF)]
    return keys


def _feistel(places: np.ndarray, rows: int, columns: int, keys: list[np.ndarray]) -> np.ndarray:
    """A keyed permutation of the cells of a grid, uint32 [N] in 0 .. rows * columns - 1, two keys per round.

    Rounds alternate: a hash of the column moves the row, a hash of the row moves the column. Each move is invertible. Words have
    32 bits and operations work in place, because this runs for every image that is read.
    """
    row = places // np.uint32(columns)
    column = places - row * np.uint32(columns)
    hashed, scratch = np.empty_like(places), np.empty_like(places)
    moved, other, n_moved, n_other = row, column, rows, columns
    for one, two in zip(keys[::2], keys[1::2], strict=True):
        np.bitwise_xor(other, one, out=hashed)
        np.multiply(hashed, np.uint32(0x85EBCA6B), out=hashed)  # the multipliers of murmur3's finaliser
        np.right_shift(hashed, np.uint32(15), out=scratch)
        np.bitwise_xor(hashed, scratch, out=hashed)
        np.bitwise_xor(hashed, two, out=hashed)
        np.multiply(hashed, np.uint32(0xC2B2AE35), out=hashed)
        np.right_shift(hashed, np.uint32(16), out=hashed)
        np.multiply(hashed, np.uint32(n_moved), out=hashed)  # below 2^16 * 2^16
        np.right_shift(hashed, np.uint32(16), out=hashed)  # 0 .. n_moved - 1
        np.add(moved, hashed, out=moved)
        np.subtract(moved, np.uint32(n_moved), out=scratch)  # wraps around below 0, so the smaller value is the remainder
        np.minimum(moved, scratch, out=moved)
        moved, other, n_moved, n_other = other, moved, n_other, n_moved
    return row * np.uint32(columns) + column
