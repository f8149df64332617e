"""Near-duplicates: training images that show the same as an evaluation image or its mirror image.

In: two splits of shards. Out: `Found`, the training images and the nearest evaluation image of each. `tools/dedup_shards.py`
writes the exclusion list from it.

Methods: "phash" (the signs of the lowest frequencies, by the library imagehash) and "dhash" (whether brightness rises from left
to right) give 64 bits per image. The distance of two images is the number of different bits; it changes little with size, JPEG
quality, palette or brightness. "tokens" finds token grids that are equal. Each evaluation image is also mirrored, because
training flips images.

Flat images of both sets are counted and not compared. All images of one colour have the same hash, so one blank evaluation image
would exclude every blank training image, and blank images do not help a probe. An image is flat if its grey levels span less than
8 of 256, or if its hash has fewer than 8 ones or fewer than 8 zeros (phash sets half of the bits in any image with some
structure). For "tokens", an image is flat if all its tokens are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.workers import process_pool
from igpt_ds.errors import InputError

METHODS = ("phash", "dhash", "tokens")
BITS = 64
FARTHEST = 16  # bits; unlike images differ in 32 of the 64 on average
_FLAT_LEVELS, _FLAT_BITS = 8, 8
_BLOCK = 2048  # images read and compared at once
_TASK = 8 * _BLOCK  # images per task of a worker
_PAIRS = 1 << 16  # distances computed at once: half a MiB, which fits the cache of a core
_NONE = np.iinfo(np.int64).max

_Matches = tuple[
    np.ndarray, np.ndarray, int
]  # of some training images: ids found, their codes (see `nearest_query`), flat images


@dataclass(frozen=True)
class Found:
    """The P training images that are near an evaluation image, sorted by id, and the nearest evaluation image of each."""

    train_ids: np.ndarray  # int64 [P]
    eval_ids: np.ndarray  # int64 [P]; among equal distances the unmirrored image first, then the smallest id
    distances: np.ndarray  # int64 [P], different bits
    mirrored: np.ndarray  # bool [P]: the evaluation image was mirrored
    flat_train: int  # flat images, which were not compared
    flat_eval: int
    n_pairs: int  # comparisons


@dataclass
class _Queries:
    """The evaluation images and then their mirror images, ready for comparison."""

    method: str
    max_distance: int
    hashes: np.ndarray  # uint64 [Q]; none for "tokens"
    ids: np.ndarray  # int64 [Q]
    n_straight: int  # the first n_straight queries are unmirrored
    digests: dict[bytes, int] = field(default_factory=dict)  # for "tokens": digest -> number of the query


def find_duplicates(
    train: ShardSet, evaluated: ShardSet, method: str = "phash", max_distance: int = 4, workers: int = 1
) -> Found:
    """Compares every image of `train` with every image of `evaluated` and its mirror image.

    Memory grows with the number of duplicates, not with the training set. The result does not depend on `workers`.

    Args:
        max_distance: bits that may differ, 0..16; "tokens" finds distance 0 only.
        workers: processes that read, hash and compare.

    Raises:
        ValueError: the two splits share images, "tokens" is used with different sizes or palettes, max_distance or workers is
            out of range, or images are damaged.
    """
    assert method in METHODS
    _check(train, evaluated, method, max_distance, workers)
    queries, flat_eval = _queries(evaluated, method, max_distance)
    spans = [(start, min(start + _TASK, train.n_images)) for start in range(0, train.n_images, _TASK)]
    parts: Iterator[_Matches | str]
    with ExitStack() as stack:
        if workers > 1 and len(spans) > 1:
            pool = stack.enter_context(process_pool(min(workers, len(spans)), "spawn"))
            parts = pool.map(partial(_search_there, train.path, train.split, queries), spans)
        else:
            parts = map(partial(_search, train, queries), spans)
        bar = stack.enter_context(tqdm(total=train.n_images, desc=method, unit=" images", leave=False, disable=None))
        ids, codes, flat = [], [], 0
        for (start, stop), part in zip(spans, parts, strict=True):
            if isinstance(part, str):
                raise InputError(part)
            ids.append(part[0])
            codes.append(part[1])
            flat += part[2]
            bar.update(stop - start)
    code = np.concatenate(codes)
    query = code & 0xFFFFFFFF
    return Found(
        train_ids=np.concatenate(ids),
        eval_ids=queries.ids[query],
        distances=code >> 32,
        mirrored=query >= queries.n_straight,
        flat_train=flat,
        flat_eval=flat_eval,
        n_pairs=(train.n_images - flat) * len(queries.ids),
    )


def _check(train: ShardSet, evaluated: ShardSet, method: str, max_distance: int, workers: int) -> None:
    shared = set(train.split.split("+")) & set(evaluated.split.split("+"))
    if train.dataset_hash == evaluated.dataset_hash or (shared and train.path.resolve() == evaluated.path.resolve()):
        sets = f"{train.path} split {train.split!r} and {evaluated.path} split {evaluated.split!r}"
        raise InputError(f"{sets} hold the same images, all of which would be excluded; name two different sets")
    if method == "tokens" and (train.n_px, train.palette_hash) != (evaluated.n_px, evaluated.palette_hash):
        sides = " and ".join(f"{s.path} ({s.n_px}x{s.n_px}, palette {s.palette_hash[:8]})" for s in (train, evaluated))
        raise InputError(f"tokens of {sides} cannot be equal; make both alike, or use --method phash")
    if not 0 <= max_distance <= FARTHEST:
        raise InputError(f"max_distance={max_distance} must lie in 0..{FARTHEST}; unlike images differ in {BITS // 2} bits")
    if workers < 1:
        raise InputError(f"workers={workers} must be at least 1")


# --------------------------------------------------------------------------------------------------- fingerprints


def fingerprints(images: np.ndarray, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Perceptual hashes by imagehash: uint8 [N, h, w, 3] -> uint64 [N], and whether each image is flat, bool [N]."""
    import imagehash
    from PIL import Image

    hash_of = {"phash": imagehash.phash, "dhash": imagehash.dhash}[method]
    bits = np.empty((len(images), BITS), dtype=bool)
    flat = np.empty(len(images), dtype=bool)
    for row, image in enumerate(images):
        grey = Image.fromarray(image).convert("L")
        flat[row] = np.ptp(np.asarray(grey)) < _FLAT_LEVELS
        bits[row] = hash_of(grey).hash.reshape(-1)
    hashes = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
    ones = bits.sum(axis=1)
    return hashes, flat | (ones < _FLAT_BITS) | (ones > BITS - _FLAT_BITS)


def _digests(grids: np.ndarray) -> list[bytes | None]:
    """A digest of 192 bits for each token grid of [N, n_px, n_px]; equal digests mean equal grids. None for a flat grid."""
    grids = np.ascontiguousarray(grids)
    flat = (grids == grids[:, :1, :1]).all(axis=(1, 2))
    return [
        None if one else hashlib.blake2b(grid.tobytes(), digest_size=24).digest() for one, grid in zip(flat, grids, strict=True)
    ]


def _queries(evaluated: ShardSet, method: str, max_distance: int) -> tuple[_Queries, int]:
    """The evaluation set as queries, and the number of its flat images."""
    queries = _Queries(method, max_distance, np.empty(0, np.uint64), np.empty(0, np.int64), 0)
    hashes: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    flat_eval = 0
    for turn in (1, -1):
        for block in _blocks(0, evaluated.n_images):
            grids = evaluated.tokens(block)[:, :, ::turn]
            if method == "tokens":
                digests = _digests(grids)
                flat = np.array([digest is None for digest in digests])
                first = sum(map(len, ids))
                for place, digest in enumerate(digest for digest in digests if digest is not None):
                    queries.digests.setdefault(digest, first + place)
            else:
                found, flat = fingerprints(evaluated.palette.decode(grids), method)
                hashes.append(found[~flat])
            ids.append(block[~flat])
            if turn == 1:
                flat_eval += int(flat.sum())
                queries.n_straight += int((~flat).sum())
    queries.ids = np.concatenate(ids)
    if hashes:
        queries.hashes = np.concatenate(hashes)
    return queries, flat_eval


def _blocks(start: int, stop: int) -> Iterator[np.ndarray]:
    for first in range(start, stop, _BLOCK):
        yield np.arange(first, min(first + _BLOCK, stop))


# --------------------------------------------------------------------------------------------------- comparison


def _search(train: ShardSet, queries: _Queries, span: tuple[int, int]) -> _Matches:
    """Compares the training images start..stop - 1 with the queries."""
    ids: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    n_flat = 0
    for block in _blocks(*span):
        grids = train.tokens(block)
        if queries.method == "tokens":
            digests = _digests(grids)
            flat = np.array([digest is None for digest in digests])
            code = np.array([_NONE if digest is None else queries.digests.get(digest, _NONE) for digest in digests])
        else:
            hashes, flat = fingerprints(train.palette.decode(grids), queries.method)
            code = np.full(len(block), _NONE)
            code[~flat] = nearest_query(hashes[~flat], queries.hashes, queries.max_distance)
        near = code != _NONE
        ids.append(block[near])
        codes.append(code[near])
        n_flat += int(flat.sum())
    return np.concatenate(ids), np.concatenate(codes), n_flat


def _search_there(path: Path, split: str, queries: _Queries, span: tuple[int, int]) -> _Matches | str:
    """`_search` in a worker process, which opens the shards once. Returns an error as its message, which can be pickled."""
    try:
        return _search(_opened(path, split), queries, span)
    except InputError as error:
        return str(error)


@lru_cache(maxsize=1)
def _opened(path: Path, split: str) -> ShardSet:
    return ShardSet(path, split)


def nearest_query(hashes: np.ndarray, queries: np.ndarray, max_distance: int) -> np.ndarray:
    """The nearest query of each hash, by comparing all pairs: uint64 [N], uint64 [Q] -> int64 [N].

    An entry is distance * 2^32 + the number of the query (the smallest among equal distances), or the largest int64 if no query
    is within max_distance bits.
    """
    best = np.full(len(hashes), _NONE)
    rows = max(1, _PAIRS // max(1, len(hashes)))
    for start in range(0, len(queries) if len(hashes) else 0, rows):
        distance = bit_count(queries[start : start + rows, None] ^ hashes)
        if distance.min() <= max_distance:  # rarely true, and much cheaper than finding the places
            query, place = np.nonzero(distance <= max_distance)
            np.minimum.at(best, place, (distance[query, place].astype(np.int64) << 32) | (start + query))
    return best


def bit_count(values: np.ndarray) -> np.ndarray:
    """The number of ones among 64 bits: uint64 [..., N] -> uint8 [..., N]."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(values)
    words = np.ascontiguousarray(values).view(np.uint16)  # numpy 1: four look-ups per number
    table = _ones()
    counts = table.take(words[..., 0::4])
    for part in range(1, 4):
        counts += table.take(words[..., part::4])
    return counts


@lru_cache(maxsize=1)
def _ones() -> np.ndarray:
    return np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(axis=1, dtype=np.uint8)
