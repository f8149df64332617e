"""Which bytes of a shard are not those that were written.

In: a shard file and what the index says of it. Out: the damaged byte ranges, an image each where one can be told.
`ShardSet.verify` and `tools/verify_shards.py` call; `data/shards/build.py` writes the crc32 of each block of images.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igpt_ds.data.shards.record import END, MAX_IMAGES, ShardEntry, checksum, names_of, numbers, pack, record_dtype
from igpt_ds.files import sha256_file

BLOCK_IMAGES = 1024  # images under one crc32 of the index
AGAIN = "make the shards again with tools/make_shards.py"


@dataclass(frozen=True)
class Damage:
    """Bytes first .. last of a shard, both included, that are not what was written."""

    file: Path
    first: int
    last: int
    what: str

    def __str__(self) -> str:
        return f"shard {self.file}: bytes {self.first} to {self.last} are damaged: {self.what}; {AGAIN}"


def all_damage(
    path: Path, shards: Iterable[ShardEntry], n_px: int, workers: int | None = None
) -> Generator[tuple[str, list[Damage]], None, None]:
    """Reads every shard once, several at a time: (shard name, what is damaged in it), in their order."""
    threads = ThreadPoolExecutor(workers)  # checksums of large blocks hold no lock, so threads take every core
    try:
        tasks = [(entry.name, threads.submit(shard_damage, path / entry.name, entry, n_px)) for entry in shards]
        for name, task in tasks:
            yield name, task.result()
    finally:
        threads.shutdown(cancel_futures=True)


def shard_damage(file: Path, entry: ShardEntry, n_px: int) -> list[Damage]:
    """Compares one shard with its entry in the index: size, the crc32 of every block, the end of the tar file, sha256."""
    size, expected, dtype = file.stat().st_size if file.is_file() else 0, entry.bytes, record_dtype(n_px)
    if size < expected:
        return [Damage(file, size, expected - 1, f"the file ends after {size} of {expected} bytes")]
    if size > expected:
        return [Damage(file, expected, size - 1, f"the file goes on after its {expected} bytes")]
    records = np.memmap(file, dtype, mode="r", shape=entry.n_images).view(np.ndarray)
    found = [damage for number, crc in enumerate(entry.blocks) for damage in _block_damage(file, records, number, crc)]
    with open(file, "rb") as opened:
        opened.seek(size - len(END))
        if opened.read() != END:
            found.append(Damage(file, size - len(END), size - 1, "these bytes should be zero and end the tar file"))
    if not found and sha256_file(file) != entry.sha256:
        return [Damage(file, 0, size - 1, "its sha256 is not the index's, though every block is as written")]
    return found


def _block_damage(file: Path, records: np.ndarray, number: int, crc: str) -> list[Damage]:
    first, size = number * BLOCK_IMAGES, records.dtype.itemsize
    block = records[first : first + BLOCK_IMAGES]
    if crc32(block) == crc:
        return []
    names, tokens, labels = names_of(block) % MAX_IMAGES, block["tokens"], numbers(block["label"]) % MAX_IMAGES
    differs = pack(names, tokens, labels).view(np.uint8) != block.view(np.uint8)
    differs = differs.reshape(len(block), size).any(axis=1) | (checksum(tokens, labels) != block["checksum"])
    rows = (first + np.flatnonzero(differs)).tolist()
    if not rows:
        return [Damage(file, first * size, (first + len(block)) * size - 1, f"the crc32 of block {number} is not {crc}")]
    return [Damage(file, row * size, (row + 1) * size - 1, f"image {row} of this shard") for row in rows]


def crc32(records: np.ndarray) -> str:
    """The crc32 of some records' bytes, eight hex digits."""
    return f"{zlib.crc32(records.view(np.uint8).data):08x}"
