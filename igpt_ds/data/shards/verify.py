"""Finds the bytes of a shard that differ from those that were written.

In: a shard file and its entry in the index. Out: the damaged byte ranges, one per image if the images can be told apart.
Called by `ShardSet.verify` and `tools/verify_shards.py`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igpt_ds.data.shards.index import AGAIN, ShardEntry
from igpt_ds.data.shards.record import END, MAX_IMAGES, checksum, names_of, numbers, pack, record_dtype
from igpt_ds.files import sha256_file
from igpt_ds.plain_files import check_file

_CHUNK = 1024  # images of a damaged shard compared at a time


@dataclass(frozen=True)
class Damage:
    """Bytes first .. last of a shard, both included, that differ from what was written."""

    file: Path
    first: int
    last: int
    what: str

    def __str__(self) -> str:
        return f"shard {self.file}: bytes {self.first} to {self.last} are damaged: {self.what}; {AGAIN}"


def all_damage(
    path: Path, shards: Iterable[ShardEntry], n_px: int, workers: int | None = None
) -> Generator[tuple[str, list[Damage]], None, None]:
    """Reads every shard once, several at a time. Yields (shard name, its damage) in the order of the shards."""
    threads = ThreadPoolExecutor(workers)  # sha256 releases the interpreter lock, so threads use every core
    try:
        tasks = [(entry.name, threads.submit(shard_damage, path / entry.name, entry, n_px)) for entry in shards]
        for name, task in tasks:
            yield name, task.result()
    finally:
        threads.shutdown(cancel_futures=True)


def shard_damage(file: Path, entry: ShardEntry, n_px: int) -> list[Damage]:
    """Compares one shard with its entry in the index: size, then sha256. Where the sha256 differs, names the damaged images."""
    size, expected, dtype = file.stat().st_size if file.is_file() else 0, entry.bytes, record_dtype(n_px)
    if size != expected:
        check_file(file)
    if size < expected:
        return [Damage(file, size, expected - 1, f"the file ends after {size} of {expected} bytes")]
    if size > expected:
        return [Damage(file, expected, size - 1, f"the file continues after its {expected} bytes")]
    if sha256_file(file) == entry.sha256:
        return []
    records = np.memmap(file, dtype, mode="r", shape=entry.n_images).view(np.ndarray)
    found = [
        Damage(file, row * dtype.itemsize, (row + 1) * dtype.itemsize - 1, f"image {row} of this shard")
        for first in range(0, entry.n_images, _CHUNK)
        for row in (first + _damaged_rows(records[first : first + _CHUNK])).tolist()
    ]
    with open(file, "rb") as opened:
        opened.seek(size - len(END))
        if opened.read() != END:
            found.append(Damage(file, size - len(END), size - 1, "these bytes should be zero and end the tar file"))
    return found or [Damage(file, 0, size - 1, "its sha256 is not the index's, though every image matches its own checksum")]


def damaged_rows(file: Path, entry: ShardEntry, n_px: int) -> list[int]:
    """The rows of a shard of the right size whose tokens or label are not those of their checksum: what a training reads."""
    records = np.memmap(file, record_dtype(n_px), mode="r", shape=entry.n_images).view(np.ndarray)
    found = []
    for first in range(0, entry.n_images, _CHUNK):
        some = records[first : first + _CHUNK]
        found += (first + np.flatnonzero(checksum(some["tokens"], numbers(some["label"])) != some["checksum"])).tolist()
    return found


def _damaged_rows(records: np.ndarray) -> np.ndarray:
    """The numbers of the records whose bytes are not those that their own name, tokens, label and checksum make."""
    names, tokens, labels = names_of(records) % MAX_IMAGES, records["tokens"], numbers(records["label"]) % MAX_IMAGES
    differs = pack(names, tokens, labels).view(np.uint8) != records.view(np.uint8)
    return np.flatnonzero(differs.reshape(len(records), -1).any(axis=1) | (checksum(tokens, labels) != records["checksum"]))
