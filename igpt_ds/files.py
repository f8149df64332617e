"""Durable files: a file appears complete under its final name, or not at all.

All writers use `atomic_file` or `atomic_dir`: the content is written under a temporary name beside the target, forced to disk,
then renamed. What a killed writer left is removed by the next one.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from igpt_ds.cli import FinishedError
from igpt_ds.errors import InputError, naming, reason
from igpt_ds.locks import locked, open_lock, try_lock
from igpt_ds.plain_files import check_file


def fsync_path(path: Path) -> None:
    """Forces a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial(path: Path) -> Path:
    # Not the process number, which may repeat in containers and on nodes that share a disk.
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")


def _partials(path: Path) -> Iterator[Path]:
    return path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 12}.partial")  # not those of NAME.json


_swept: set[Path] = set()  # paths whose leftovers this process removed: only killed processes leave some


@contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` and renames it to `path` when the block ends without an error.

    The writer holds the lock of its temporary file, so the first writer in a later process can remove those of killed ones.
    """
    partial = None
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path not in _swept:
                _swept.add(path)
                _remove_unlocked(_partials(path))
            partial, file = _new_file(path, mode)
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
            fsync_path(path.parent)
    finally:
        if partial is not None:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _new_file(path: Path, mode: str) -> tuple[Path, IO[Any]]:
    while True:
        partial = _partial(path)
        encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
        file = open(partial, mode.replace("w", "x"), encoding=encoding, errors=errors)  # noqa: SIM115  (the caller closes it)
        while try_lock(file.fileno()) is False:
            time.sleep(0.01)  # another process takes it for a leftover
        if partial.exists():
            return partial, file
        file.close()


def sweep_dated(path: Path) -> None:
    """Removes what killed writers left of files whose names differ from this one in their digits, such as a date."""
    name = re.sub(r"\d", "[0-9]", glob.escape(path.name))
    _remove_unlocked(path.parent.glob(f".{name}.{'[0-9a-f]' * 12}.partial"))


def _remove_unlocked(partials: Iterable[Path]) -> None:
    for left in partials:
        with suppress(OSError, ValueError):  # a directory, or removed at this moment
            descriptor = open_lock(left)
            try:
                if try_lock(descriptor):
                    left.unlink()
            finally:
                os.close(descriptor)


def check_writable(*files: Path | None, directories: Sequence[Path | None] = ()) -> None:
    """Checks before the work that its results can be written. It leaves nothing behind; None is skipped.

    Raises:
        ValueError: a file is a directory, a part of a path is a file, or the directory that exists cannot be written.
    """
    for path in filter(None, (*files, *directories)):
        if path in files and path.is_dir():
            raise InputError(f"{path} is a directory; name a file")
        parent = path if path.is_dir() else path.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise InputError(f"{path} cannot be written: {parent} is a file; choose another path")
        try:
            tempfile.TemporaryFile(dir=parent).close()
        except OSError as error:
            raise InputError(f"{path} cannot be written: {parent}: {reason(error)}") from None


def remove(path: Path) -> None:
    """Removes a file, a link or a directory; a missing one is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_taken(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir())))


@contextmanager
def reserved(path: Path, *others: Path) -> Iterator[None]:
    """Reserves new names for this process until the block ends, and removes what killed processes left of them.

    Args:
        path: what the block renames last, so that it exists only if everything does.
        others: what the block renames before. If the same command was killed in between, they are removed.

    Raises:
        ValueError: another process writes `path`, or one of the paths exists and is not an empty directory.
        FinishedError: the same command renamed `path` and was killed before it ended.
    """
    with locked(path) as lock:
        # A command notes itself only after it found all names free, so they are its own if it was killed.
        fresh = lock.held and not lock.entered
        again = fresh and lock.left == _command()
        if fresh:
            for left in (left for taken in (path, *others) for left in _partials(taken)):
                remove(left)
        if _is_taken(path):
            if again:
                raise FinishedError(f"{path}: finished by an earlier run of this command")
            raise InputError(f"{path} exists already; choose another name or remove it")
        for other in filter(_is_taken, others):
            if not again:
                raise InputError(f"{other} exists already; choose another name or remove it")
            remove(other)
        lock.note(_command())
        yield


def _command() -> str:
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


@contextmanager
def scratch_dir(path: Path) -> Iterator[Path]:
    """Yields an empty temporary directory beside `path`, and removes it. `reserved` removes those of killed processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yields an empty temporary directory beside `path`, renamed to `path` when the block ends without an error.

    Raises:
        ValueError: `path` exists already and is not an empty directory; results are never overwritten. Or another process
            writes it.
        FinishedError: as `reserved`.
    """
    with reserved(path), scratch_dir(path) as partial:
        yield partial
        move_dir(partial, path)


def move_dir(partial: Path, path: Path) -> None:
    """Forces a directory to disk and gives it its name, which is free or an empty directory."""
    for file in (partial, *partial.rglob("*")):
        fsync_path(file)
    os.replace(partial, path)
    fsync_path(path.parent)


def sha256_file(path: Path) -> str:
    """The hex sha256 of a file's bytes, read in pieces."""
    check_file(path)
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
