"""A copy of a rank's state in host memory, written to a file later with the bytes that torch.save would write now.

In: the object that DeepSpeed saves. Out: a `Snapshot`. torch pickles the object at once and hands over each storage of its
tensors. A thread copies the storages into buffers beside the next forward and backward pass, which change none of them; the
update must wait for it. The buffers are reused by the next snapshot, so it must wait until this one is written. Called by
train/checkpoint/disk.py and train/checkpoint/saver.py.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

LOWEST_PRIORITY = 19  # of a thread that writes
PIECE = 1 << 26  # bytes that are copied at a time


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

    def take(self, n_bytes: int) -> torch.UntypedStorage:
        """The next buffer, of this size."""
        if self._used == len(self._kept):
            self._kept.append(torch.UntypedStorage(0))
        if self._kept[self._used].nbytes() != n_bytes:
            self._kept[self._used] = torch.UntypedStorage(0)  # frees it before the new one is there
            self._kept[self._used] = torch.UntypedStorage(n_bytes)
        self._used += 1
        return self._kept[self._used - 1]


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
        self._pending: list[tuple[torch.UntypedStorage, torch.UntypedStorage, Any]] = []  # buffer, source, event of its device
        self._buffers = buffers
        with _left_on_device():
            torch.serialization._save(state, self, pickle, torch.serialization.DEFAULT_PROTOCOL, False)

    def write_record(self, name: str, content: Any, size: int) -> None:
        """torch calls this for each record, in the order of the file."""
        if isinstance(content, torch.UntypedStorage):
            device, source = content.device, content
            content = self._buffers.take(source.nbytes())
            event = None if device.type == "cpu" else torch.accelerator.current_stream(device).record_event()
            self._pending.append((content, source, event))
        self._records.append((name, content, size))

    def copy(self) -> None:
        """Copies the tensors, in pieces: Python's lock is free meanwhile. Until then nothing may change them."""
        while self._pending:
            buffer, source, event = self._pending.pop()
            if event is None:
                for ours, theirs in zip(_pieces(buffer), _pieces(source), strict=True):
                    np.copyto(ours, theirs)
                continue
            beside = torch.Stream(source.device)  # the stream of the training does not wait for it
            beside.wait_event(event)
            with beside:
                buffer.copy_(source)

    def write(self, file: Any) -> None:
        """Writes the file, as torch.save does. torch holds Python's lock for moments only."""
        self.copy()
        with torch.serialization._open_zipfile_writer(file) as archive:
            for record in self._records:
                archive.write_record(*record)


def _pieces(storage: torch.UntypedStorage) -> Iterator[np.ndarray]:
    whole = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    yield from (whole[start : start + PIECE] for start in range(0, len(whole), PIECE))


@contextmanager
def _left_on_device() -> Iterator[None]:
    """torch would copy a storage on a GPU to the host before it hands it over; the buffer takes it directly."""
    setattr(torch.UntypedStorage, "cpu", lambda storage: storage)  # noqa: B010
    try:
        yield
    finally:
        delattr(torch.UntypedStorage, "cpu")


def lower_priority() -> None:
    """The calling thread yields its core to all others, where the system lets it. Linux counts each thread by itself."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
