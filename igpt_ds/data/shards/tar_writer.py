"""One shard on its way to disk: records go in, a whole tar file and its description come out.

`data/shards/build.py` calls. What is described here is what `data/shards/verify.py` and `data/shards/dataset.py` check.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from igpt_ds.data.shards.record import END, ShardEntry
from igpt_ds.data.shards.verify import BLOCK_IMAGES
from igpt_ds.files import atomic_file


class ShardFile:
    """Counts and sums what it writes; made by `shard_file`."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self.n_images = 0
        self._name, self._file, self._bytes, self._digest = name, file, 0, hashlib.sha256()
        self._crcs: list[int] = []

    def add(self, records: np.ndarray) -> None:
        """Appends images: records of `data/shards/record.py`, in one piece of memory."""
        while len(records):
            if self.n_images % BLOCK_IMAGES == 0:
                self._crcs.append(0)
            part = records[: BLOCK_IMAGES - self.n_images % BLOCK_IMAGES]
            content = part.view(np.uint8).data
            self._crcs[-1] = zlib.crc32(content, self._crcs[-1])
            self._write(content)
            self.n_images += len(part)
            records = records[len(part) :]

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._bytes += len(content)

    def close(self) -> ShardEntry:
        """Ends the tar file; the shard's entry in the index."""
        self._write(END)
        blocks = [f"{crc:08x}" for crc in self._crcs]
        return ShardEntry(self._name, self.n_images, self._bytes, self._digest.hexdigest(), blocks)


@contextmanager
def shard_file(path: Path) -> Iterator[ShardFile]:
    """Opens a shard that appears as `path` when the block ends without an error; end the block with `close()`."""
    with atomic_file(path) as file:
        yield ShardFile(path.name, file)
