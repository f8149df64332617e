"""What is a plain file: fifos, devices, links and pointers are refused, and a memory map's space is reserved."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from igpt_ds.errors import InputError, naming

_POINTERS = {
    b"version https://git-lfs.github.com/spec/": "a pointer of Git LFS instead of the file; get the file with: git lfs pull",
    b"/annex/objects/": "a pointer of git-annex instead of the file; get the file with: git annex get FILE",
}
_NOT_SUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # by a file system; EINVAL also of an empty file


def pointer(start: bytes) -> str:
    """What a file is that begins with `start`, if it stands in for the file, as in a clone without its data; otherwise ""."""
    return next((words for prefix, words in _POINTERS.items() if start.startswith(prefix)), "")


def check_file(path: Path) -> None:
    """Refuses what holds no content of a file: a fifo, a device, a socket, a pointer. The reader tells that a file is missing.

    Raises:
        ValueError: it is none; the error names the fix.
    """
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            return
        if not stat.S_ISREG(kind):
            raise InputError(f"{path} is a fifo, a device or a socket, not a file; name a file, or write the content to one")
        with open(path, "rb") as file:
            words = pointer(file.read(64))
    except OSError:  # a missing file, which a link of git-annex may stand for
        words = pointer(b"/annex/objects/") if path.is_symlink() and "annex/objects" in str(path.readlink()) else ""
    if words:
        raise InputError(f"{path} is {words}")


def is_missing(path: Path) -> bool:
    """Whether a file that a directory may lack is missing.

    Raises:
        ValueError: it is a link to a file that does not exist, so the directory once had it.
    """
    if path.exists():
        return False
    if path.is_symlink():
        raise InputError(f"{path} is a link to {path.readlink()}, which does not exist; restore that file, or remove the link")
    return True


@contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """The path of a file or directory for a library that takes UTF-8 alone; a path of other bytes becomes a descriptor's path."""
    try:
        yield str(path).encode().decode()
    except UnicodeEncodeError:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)


def beside(path: Path, ending: str) -> Path:
    """The path beside `path` whose name is that of `path` with an ending. "." and ".." have the names of their directories."""
    whole = path if path.name not in ("", "..") else path.resolve()
    return whole.parent / f"{whole.name}{ending}"


def is_inside(path: Path, directory: Path) -> bool:
    """Whether a path is a file in a directory or below it, also after links were followed."""
    return path.is_file() and path.resolve().is_relative_to(directory.resolve())


def reserve(path: Path) -> None:
    """Gives a file that is about to be written through a memory map the disk space of its whole size.

    Without it a full disk kills the process, with SIGBUS.

    Raises:
        OSError: there is no space.
    """
    with naming(path), open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise


def open_plain(path: str | os.PathLike[str], flags: int) -> int:
    """The `opener` of open() for files of fixed names in a directory that others may write: a link or a fifo is refused.

    Raises:
        OSError: it is not a plain file; nothing was written.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EEXIST, "it is not a plain file", os.fspath(path))
    return descriptor
