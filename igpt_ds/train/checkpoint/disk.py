"""Writes that may fail: free space is checked first, and one rank's failing disk does not block the other ranks.

DeepSpeed's save has many collectives. If a rank raises in between, the others wait for it until they time out. So
`CheckpointWriter` stores the error instead; afterwards all ranks learn of it and stop together. Called by
train/checkpoint/save.py and tools/reshard.py.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from igpt_ds import dist
from igpt_ds.errors import InputError, error_text, naming
from igpt_ds.memory import available_memory, in_memory
from igpt_ds.train.checkpoint.manifest import FileEntry
from igpt_ds.train.checkpoint.snapshot import Buffers, Snapshot

SLACK = 1.02  # for what a file holds beside its tensors, and for estimates


ROOM = "free some space there, lower --keep_last, or put --run_dir on another disk"


def require_space(directory: Path, needed: int, what: str, fix: str = ROOM) -> None:
    """Refuses to start a write that the disk of `directory` has no space for. The directory need not exist yet.

    What is written into memory, such as /dev/shm, counts as the memory of this process does.

    Raises:
        ValueError: fewer than `needed` bytes are free.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(f"{what} needs {needed:,} bytes and {directory} has {free:,} free; {fix}")
    if in_memory(existing) and (memory := available_memory()) is not None and memory < needed:
        raise InputError(f"{what} needs {needed:,} bytes of memory for {directory} and {memory:,} are free; {fix}")


class Hashing:
    """A file that hashes each block as it is written, front to back."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, block: Any) -> int:
        """Writes the whole block."""
        try:
            written = self._file.write(block)
        except OSError as error:
            self.error = error  # torch hides it behind an error of its own
            raise
        self.digest.update(block)
        self.bytes += written
        return written

    def flush(self) -> None:
        """Empties the buffer."""
        self._file.flush()


class CheckpointWriter:
    """Replaces DeepSpeed's checkpoint engine during a save: writes with checksums, forces to disk, and never raises.

    Args:
        buffers: hold the contents of the files until `write_held`; None: each file is written at once.
    """

    def __init__(self, wrapped: Any, buffers: Buffers | None = None) -> None:
        self.wrapped, self._buffers = wrapped, buffers
        self.entries: list[FileEntry] = []  # of each file written
        self.copies: list[FileEntry] = []  # of other ranks' files (neighbours.py)
        self.error = ""  # the first one
        self._held: list[tuple[str, Snapshot]] = []
        if buffers is not None:
            buffers.reuse()

    def save(self, state_dict: Any, path: str) -> None:
        """Writes one file by torch.save, or holds its content."""
        if self.error:
            return
        if self._buffers is None:
            self._write(path, partial(torch.save, state_dict))
            return
        try:
            self._held.append((path, Snapshot(state_dict, self._buffers)))
        except (RuntimeError, MemoryError) as error:
            self.error = f"{path}: {' '.join(str(error).split())}"

    def copy_held(self) -> None:
        """Copies what is held and still shared with the training."""
        for path, snapshot in self._held:
            try:
                snapshot.copy()
            except (RuntimeError, MemoryError) as error:
                self.error = self.error or f"{path}: {' '.join(str(error).split())}"

    def write_held(self) -> None:
        """Writes the files that are held."""
        for path, snapshot in self._held:
            if not self.error:
                self._write(path, snapshot.write)

    def _write(self, path: str, write: Callable[[Any], None]) -> None:
        try:
            with naming(path), open(path, "wb") as file:
                hashing = Hashing(file)
                try:
                    write(hashing)  # it only calls write and flush
                except RuntimeError as error:
                    raise hashing.error or error from None
                file.flush()
                os.fsync(file.fileno())
            self.entries.append(FileEntry(Path(path).name, hashing.bytes, hashing.digest.hexdigest()))
        except OSError as error:
            self.error = error_text(error)
        except (RuntimeError, MemoryError) as error:
            self.error = f"{path}: {' '.join(str(error).split())}"

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Makes a directory."""
        try:
            Path(path).mkdir(parents=True, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or error_text(error)

    def commit(self, info: Any) -> bool:
        """DeepSpeed calls this on each rank that has written its files, before a barrier. The slowest disk has no time limit."""
        dist.meet()
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)
