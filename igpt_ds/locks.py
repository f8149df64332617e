"""One writer at a time: a lock file beside what is written, held with flock until the writer ends, however it ends.

In: the path that a process writes. Out: a `Lock`. Called by files.py, data/shards/build.py, train/ and tools/reshard.py. The
lock of DIR/NAME is DIR/.NAME.lock. The last holder removes it; the file of a killed process stays until the next one. flock works
on NFS too, because the file is open for writing. On a disk without locks nobody is refused, and `Lock.held` is False.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from igpt_ds.errors import InputError, naming

_HOLDER = re.compile(rb"\S+ \(pid \d+\)\n")
_LONGEST = 1000  # bytes of a lock file
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Lock:
    """An open lock file.

    held: whether flock holds it; False on a disk without locks. left: what a killed holder noted; "" without one.
    entered: whether this process held it before.
    """

    path: Path
    descriptor: int
    held: bool
    left: str = ""
    entered: bool = False

    def note(self, text: str) -> None:
        """Writes this process, and `text` for the next holder in case this process is killed."""
        if self.held:
            note_holder(self.descriptor, text)


class InUseError(InputError):
    """Another process writes the same path."""


_mine: dict[Path, Lock] = {}  # of this process: who holds a lock may ask for it again


def lock_path(path: Path) -> Path:
    """The lock file of a path."""
    return path.with_name(f".{path.name}.lock")


def try_lock(descriptor: int, shared: bool = False) -> bool | None:
    """Whether this process now holds the lock of an open file; None on a disk without locks."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def open_lock(path: Path) -> int:
    """Opens a lock file, or makes it. A link, a pipe or a file with a second name is refused, and nothing is truncated.

    Raises:
        ValueError: it is no plain file.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise InputError(f"{path} is not a plain file, so it cannot be a lock; remove it") from None
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise InputError(f"{path} is not a plain file with one name, so it cannot be a lock; remove it")
    return descriptor


def holder_of(descriptor: int) -> str:
    """The process that a lock file names, as "host (pid 7)"; "another process" if it names none."""
    found = _HOLDER.match(os.pread(descriptor, _LONGEST, 0))
    return found[0].decode(errors="replace").strip() if found else "another process"


def note_holder(descriptor: int, text: str = "") -> None:
    """Writes this process and a text into a lock file that it holds. A file that no lock wrote is left as it is."""
    content = os.pread(descriptor, _LONGEST, 0)
    if not content or _HOLDER.match(content):
        with naming(Path(f"/proc/self/fd/{descriptor}").readlink()):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{socket.gethostname()} (pid {os.getpid()})\n{text}".encode(), 0)


@contextmanager
def locked(path: Path, wait: float = 0.0, shared: bool = False) -> Iterator[Lock]:
    """Holds the lock of `path`; a process that holds it already may enter again.

    Args:
        wait: seconds to wait for another holder.
        shared: whether other holders of a shared lock are allowed.

    Raises:
        InUseError: another process holds it; the error names the path and the process.
        ValueError, OSError: the lock file cannot be used.
    """
    place = lock_path(path.absolute())
    if place in _mine:
        yield replace(_mine[place], entered=True)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = _acquire(path, place, wait, shared)
    _mine[place] = lock
    try:
        lock.note("")
        yield lock
    finally:
        del _mine[place]
        _release(lock)


def _acquire(path: Path, place: Path, wait: float, shared: bool) -> Lock:
    until = time.monotonic() + wait
    while True:
        descriptor = open_lock(place)
        ours = try_lock(descriptor, shared)
        if ours is not False and _is_there(descriptor, place):
            left = os.pread(descriptor, _LONGEST, 0).decode(errors="replace")
            return Lock(place, descriptor, bool(ours), left.partition("\n")[2])
        holder = holder_of(descriptor)
        os.close(descriptor)
        if ours is False:
            if time.monotonic() >= until:
                raise InUseError(f"{path} is being written by {holder}; wait until that process ends, or choose another name")
            time.sleep(_LOOK_SECONDS)


def _is_there(descriptor: int, place: Path) -> bool:
    """Whether the open file still has its name: a holder that ends removes the file."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(place))
    return False


def _release(lock: Lock) -> None:
    # Others may share the lock: only a holder that is alone removes the file.
    if try_lock(lock.descriptor) and _is_there(lock.descriptor, lock.path):
        with suppress(OSError):
            lock.path.unlink()
    os.close(lock.descriptor)
