"""Near-duplicates: which images of a training set show the same as an image of an evaluation set, straight or mirrored.

In: two splits of shards. Out: `Found`, the training images with the nearest evaluation image of each. `tools/dedup_shards.py`
writes the exclusion list from it.

Methods: "phash" (the signs of an image's lowest frequencies, by the library imagehash) and "dhash" (where it grows brighter from
left to right) give 64 bits an image, compared by the number of bits that differ, and hold against another size, JPEG, palette or
brightness; "tokens" finds grids that are equal in every token. The mirror image of each evaluation image is looked for as well,
since training flips images.

Flat images are left out on both sides and counted. All images of one colour have the same hash, so that a single blank one in
the evaluation set would exclude every blank one, and they tell a model nothing that a probe could profit from. Flat is: grey
levels that span less than 8 of 256, or a hash with less than 8 bits of one kind (phash sets half of them in any image with some
structure); for "tokens", one single token.
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

METHODS = ("phash", "dhash", "tokens")
BITS = 64
FARTHEST = 16  # bits; unlike images differ in 32 of the 64 on average
_FLAT_LEVELS, _FLAT_BITS = 8, 8
_BLOCK = 2048  # images read and compared at a time
_TASK = 8 * _BLOCK  # images that a worker is given at a time
_PAIRS = 1 << 16  # distances computed at a time: half a MiB, which stays in a core's cache
_NONE = np.iinfo(np.int64).max

_Part = tuple[np.ndarray, np.ndarray, int]  # of a run of training images: ids found, their codes (see `nearest`), flat ones


@dataclass(frozen=True)
class Found:
    """The P training images that are near an evaluation image, rising by id, each with the nearest one."""

    train_ids: np.ndarray  # int64 [P]
    eval_ids: np.ndarray  # int64 [P]; of equally near ones the unmirrored first, then the smallest id
    distances: np.ndarray  # int64 [P], bits that differ
    mirrored: np.ndarray  # bool [P]: near is the mirror image of the evaluation image
    flat_train: int  # images that were not compared
    flat_eval: int
    n_pairs: int  # comparisons made


@dataclass
class _Queries:
    """The evaluation images and then their mirror images, ready for comparison."""

    method: str
    max_distance: int
    hashes: np.ndarray  # uint64 [Q]; none for "tokens"
    ids: np.ndarray  # int64 [Q]
    n_straight: int  # the first so many are unmirrored
    digests: dict[bytes, int] = field(default_factory=dict)  # for "tokens": the query with that digest


def find_duplicates(
    train: ShardSet, evaluated: ShardSet, method: str = "phash", max_distance: int = 4, workers: int = 1
) -> Found:
    """Compares every image of `train` with every image of `evaluated` and its mirror image.

    Memory does not grow with the training set, except for what is found. The result does not depend on `workers`.

    Args:
        max_distance: bits that may differ, 0..16; "tokens" finds distance 0 alone.
        workers: processes that read, hash and compare.

    Raises:
        ValueError: the two splits share images, "tokens" of unlike size or palette, a distance or workers without sense, images
            that are damaged.
    """
    assert method in METHODS
    _check(train, evaluated, method, max_distance, workers)
    queries, flat_eval = _queries(evaluated, method, max_distance)
    spans = [(start, min(start + _TASK, train.n_images)) for start in range(0, train.n_images, _TASK)]
    parts: Iterator[_Part | str]
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
                raise ValueError(part)
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
        raise ValueError(f"{sets} hold the same images, all of which would be excluded; name two different sets")
    if method == "tokens" and (train.n_px, train.palette_hash) != (evaluated.n_px, evaluated.palette_hash):
        sides = " and ".join(f"{s.path} ({s.n_px}x{s.n_px}, palette {s.palette_hash[:8]})" for s in (train, evaluated))
        raise ValueError(f"tokens of {sides} cannot be equal; make both alike, or use --method phash")
    if not 0 <= max_distance <= FARTHEST:
        raise ValueError(f"max_distance={max_distance} must lie in 0..{FARTHEST}; unlike images differ in {BITS // 2} bits")
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")


# --------------------------------------------------------------------------------------------------- fingerprints


def fingerprints(images: np.ndarray, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Perceptual hashes by imagehash: uint8 [N, h, w, 3] -> uint64 [N], and which of the images are flat, bool [N]."""
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
    """A digest of 192 bits for each token grid of [N, n_px, n_px], so that equal ones mean equal grids; None for a flat one."""
    grids = np.ascontiguousarray(grids)
    flat = (grids == grids[:, :1, :1]).all(axis=(1, 2))
    return [
        None if one else hashlib.blake2b(grid.tobytes(), digest_size=24).digest() for one, grid in zip(flat, grids, strict=True)
    ]


def _queries(evaluated: ShardSet, method: str, max_distance: int) -> tuple[_Queries, int]:
    """The evaluation set as queries, and how many of its images are flat."""
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


def _search(train: ShardSet, queries: _Queries, span: tuple[int, int]) -> _Part:
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
            code[~flat] = nearest(hashes[~flat], queries.hashes, queries.max_distance)
        near = code != _NONE
        ids.append(block[near])
        codes.append(code[near])
        n_flat += int(flat.sum())
    return np.concatenate(ids), np.concatenate(codes), n_flat


def _search_there(path: Path, split: str, queries: _Queries, span: tuple[int, int]) -> _Part | str:
    """`_search` in a worker process, which opens the shards once; of bad shards the message, since not every error can travel."""
    try:
        return _search(_opened(path, split), queries, span)
    except ValueError as error:
        return str(error)


@lru_cache(maxsize=1)
def _opened(path: Path, split: str) -> ShardSet:
    return ShardSet(path, split)


def nearest(hashes: np.ndarray, queries: np.ndarray, max_distance: int) -> np.ndarray:
    """The nearest query of each hash, by comparing all with all: uint64 [N], uint64 [Q] -> int64 [N].

    An entry is distance * 2^32 + the query's number (the smallest of equally near ones), or the largest int64 where no query
    lies within max_distance bits.
    """
    best = np.full(len(hashes), _NONE)
    rows = max(1, _PAIRS // max(1, len(hashes)))
    for start in range(0, len(queries) if len(hashes) else 0, rows):
        distance = bit_count(queries[start : start + rows, None] ^ hashes)
        if distance.min() <= max_distance:  # seldom, and far cheaper to ask than to look for the places
            query, place = np.nonzero(distance <= max_distance)
            np.minimum.at(best, place, (distance[query, place].astype(np.int64) << 32) | (start + query))
    return best


def bit_count(values: np.ndarray) -> np.ndarray:
    """The ones among each number's 64 bits: uint64 [..., N] -> uint8 [..., N]."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(values)
    words = np.ascontiguousarray(values).view(np.uint16)  # numpy 1: four look-ups a number
    table = _ones()
    counts = table.take(words[..., 0::4])
    for part in range(1, 4):
        counts += table.take(words[..., part::4])
    return counts


@lru_cache(maxsize=1)
def _ones() -> np.ndarray:
    return np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(axis=1, dtype=np.uint8)
