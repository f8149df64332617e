"""Writes one shard.

In: records. Out: a tar file, and its entry for the index, which `data/shards/verify.py` checks. Called by `build.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from igpt_ds.data.shards.index import ShardEntry
from igpt_ds.data.shards.record import END
from igpt_ds.files import atomic_file


class ShardFile:
    """A shard that is being written, with its counts and its sha256. `shard_file` makes it."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self.n_images = 0
        self._name, self._file, self._bytes, self._digest = name, file, 0, hashlib.sha256()

    def add(self, records: np.ndarray) -> None:
        """Appends images: contiguous records of `data/shards/record.py`."""
        self._write(records.view(np.uint8).data)
        self.n_images += len(records)

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._bytes += len(content)

    def close(self) -> ShardEntry:
        """Ends the tar file. Returns the shard's entry for the index."""
        self._write(END)
        return ShardEntry(self._name, self.n_images, self._bytes, self._digest.hexdigest())


@contextmanager
def shard_file(path: Path) -> Iterator[ShardFile]:
    """Opens a shard that appears as `path` if the `with` block ends without an error; call `close()` at the end of the block."""
    with atomic_file(path) as file:
        yield ShardFile(path.name, file)
