"""Writing what may not fit: free space is asked for before, and a rank whose disk fails does not leave the others waiting.

DeepSpeed's save is full of meetings of all ranks. A rank that raises in the middle of it never comes to the next one, and the
others wait for it until a time-out kills them. So writing goes through `Writer`, which keeps an error for later; afterwards all
ranks learn of it and stop together. Called by train/checkpoint/save_load.py.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import IO, Any

import torch

SLACK = 1.02  # for what a file holds besides its tensors, and for estimates


def require_space(directory: Path, needed: int, what: str) -> None:
    """Refuses to begin what the disk of `directory` (which need not exist yet) has no room for.

    Raises:
        ValueError: fewer than `needed` bytes are free there.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"{what} needs {needed:,} bytes and {directory} has {free:,} free; "
            "free some space there, lower --keep_last, or put --run_dir on another disk"
        )


class _Hashing:
    """A file that is told of each block it is written; torch writes from the beginning to the end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, block: Any) -> int:
        """Writes the whole block."""
        try:
            written = self._file.write(block)
        except OSError as error:
            self.error = error  # torch tells of it in words of its own
            raise
        self.digest.update(block)
        self.bytes += written
        return written

    def flush(self) -> None:
        """Empties the buffer."""
        self._file.flush()


class Writer:
    """Stands in for DeepSpeed's checkpoint engine while it saves: writes with checksums, to the disk itself, and never raises."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        self.entries: list[dict[str, Any]] = []  # name, bytes and sha256 of each file written
        self.error = ""  # the first that happened

    def save(self, state_dict: Any, path: str) -> None:
        """Writes one file of torch.save."""
        if self.error:
            return
        try:
            with open(path, "wb") as file:
                hashing = _Hashing(file)
                try:
                    torch.save(state_dict, hashing)  # type: ignore[arg-type]  # it calls write and flush alone
                except RuntimeError as error:
                    raise hashing.error or error from None
                file.flush()
                os.fsync(file.fileno())
            entry = {"name": Path(path).name, "bytes": hashing.bytes, "sha256": hashing.digest.hexdigest()}
            self.entries.append(entry)
        except (OSError, RuntimeError) as error:
            strerror = getattr(error, "strerror", None)
            self.error = f"{path}: {strerror or ' '.join(str(error).split())}"

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Makes a directory."""
        try:
            Path(path).mkdir(parents=True, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or f"{path}: {error.strerror}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)
