"""A copy of a rank's state in host memory, written to a file later with the bytes that torch.save would write now.

In: the object that DeepSpeed saves. Out: a `Snapshot`. torch pickles the object at once and hands over each storage of its
tensors, which is copied into a buffer; training may change the tensors then. The buffers are reused by the next snapshot, so it
must wait until this one is written. Called by train/checkpoint/disk.py and train/checkpoint/saver.py.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

LOWEST_PRIORITY = 19  # of a thread that writes


@dataclass
class Buffers:
    """Host memory for the storages of one snapshot, in the order in which they are saved."""

    _kept: list[torch.UntypedStorage] = field(default_factory=list)
    _used: int = 0

    @property
    def bytes(self) -> int:
        """The memory that is kept for the next snapshot."""
        return sum(buffer.nbytes() for buffer in self._kept)

    def reuse(self) -> None:
        """The next snapshot overwrites the buffers."""
        self._used = 0

    def copy(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """A copy on the host, in the next buffer."""
        if self._used == len(self._kept):
            self._kept.append(torch.UntypedStorage(0))
        if self._kept[self._used].nbytes() != storage.nbytes():
            self._kept[self._used] = torch.UntypedStorage(0)  # frees it before the new one is there
            self._kept[self._used] = torch.UntypedStorage(storage.nbytes())
        buffer = self._kept[self._used]
        self._used += 1
        if storage.nbytes():
            buffer.copy_(storage)
        return buffer


class Snapshot:
    """One object of torch.save: the records of its file.

    Args:
        state: what torch.save takes.
        buffers: hold the tensors.

    Raises:
        RuntimeError: the host has too little memory.
    """

    def __init__(self, state: Any, buffers: Buffers) -> None:
        self._records: list[tuple[str, Any, int]] = []
        self._buffers = buffers
        with _left_on_device():
            torch.serialization._save(state, self, pickle, torch.serialization.DEFAULT_PROTOCOL, False)

    def write_record(self, name: str, content: Any, size: int) -> None:
        """torch calls this for each record, in the order of the file."""
        kept = self._buffers.copy(content) if isinstance(content, torch.UntypedStorage) else content
        self._records.append((name, kept, size))

    def write(self, file: Any) -> None:
        """Writes the file, as torch.save does. torch holds Python's lock for moments only."""
        with torch.serialization._open_zipfile_writer(file) as archive:
            for record in self._records:
                archive.write_record(*record)


@contextmanager
def _left_on_device() -> Iterator[None]:
    """torch would copy a storage on a GPU to the host before it hands it over; the buffer takes it directly."""
    setattr(torch.UntypedStorage, "cpu", lambda storage: storage)  # noqa: B010
    try:
        yield
    finally:
        delattr(torch.UntypedStorage, "cpu")


def lower_priority() -> None:
    """The calling thread yields its core to all others. Linux counts each thread by itself."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
