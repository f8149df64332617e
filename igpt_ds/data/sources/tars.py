"""Lists the members of a plain tar that is a file, a part of another tar, or the output of a command.

In: bytes. Out: name, offset and size of each file in it. `sources/imagenet.py`, `sources/webtars.py` and `sources/archives.py`
use it. Memory stays constant. A truncated tar is an error, while Python's tarfile treats a damaged header as the end.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from igpt_ds.data.sources.places import open_binary
from igpt_ds.errors import InputError

_BLOCK = 512
_PIECE = 1 << 20
# Exceptions of tarfile and the decompressors on truncated or damaged bytes.
BROKEN = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, OverflowError, ValueError)


class TornError(InputError):
    """A tar that is truncated or damaged. The members before the damage are intact."""


class Member(NamedTuple):
    """A file in a tar: `size` bytes at `offset` of the outermost file or stream."""

    name: str
    offset: int
    size: int


class Window:
    """A seekable part of a file, or a stream that is read forwards, with the file methods that tarfile needs."""

    def __init__(self, file: IO[bytes], start: int = 0, size: int | None = None) -> None:
        """`size` None means that `file` is a stream of unknown length."""
        self.start, self.size = start, size
        self.last = b""  # the bytes of the last read
        self.ended = False  # whether a read reached the end of a stream
        self._file = file
        self._at = 0
        if size is not None:
            file.seek(start)

    def tell(self) -> int:
        """The position of the next read."""
        return self._at

    def seek(self, to: int) -> None:
        """Moves the position of the next read; in a stream only forwards."""
        if self.size is not None:
            self._file.seek(self.start + to)
            self._at = to
            return
        assert to >= self._at, "a stream is read forwards"
        while self._at < to and self.read(min(_PIECE, to - self._at)):
            pass

    def read(self, n: int) -> bytes:
        """At most n bytes; fewer at the end of the window or the stream."""
        if self.size is not None:
            n = max(0, min(n, self.size - self._at))
        self.last = self._file.read(n)
        self._at += len(self.last)
        self.ended = self.ended or len(self.last) < n
        return self.last

    def data(self, member: Member) -> bytes:
        """A member's bytes; fewer than its size at the end of the file. In a stream, call it before the walk continues."""
        self.seek(member.offset - self.start)
        return self.read(member.size)


@contextmanager
def tar_window(path: Path) -> Iterator[Window]:
    """A window on a whole tar file."""
    with open_binary(path) as file:
        yield Window(file, 0, path.stat().st_size)


def walk(window: Window, name: str) -> Iterator[Member]:
    """The regular files of a tar, in its order; `name` is the tar's name in errors.

    Raises:
        TornError: it is not a plain tar, it ends before its end mark, or a header is damaged.
        ValueError: it holds a link or a device, or data follows the end mark.
    """
    try:
        tar = tarfile.TarFile(fileobj=cast(Any, window))
    except BROKEN as error:
        raise TornError(f"{name} is not a plain tar ({error}); decompress it, or copy it again") from None
    while cast(Any, tar).firstmember is not None or tar.offset:  # Python 3.10 seeks to byte -1 of an empty tar
        try:
            member = tar.next()
        except BROKEN as error:
            raise _cut(name, window.start + tar.offset, str(error)) from None
        if member is None:
            break
        cast(Any, tar).members.clear()  # otherwise tarfile keeps every header
        if member.issym() or member.islnk() or member.issparse() or member.isdev():
            what = "device or fifo" if member.isdev() else "link or sparse file"
            raise InputError(f"{name} holds the {what} {member.name}; pack the tar again with plain files (tar -h)")
        if member.isreg():
            if window.size is not None and member.offset_data + member.size > window.size:
                raise _cut(name, window.start + member.offset_data, f"{member.name} should have {member.size} bytes")
            yield Member(member.name.removeprefix("./"), window.start + member.offset_data, member.size)
    if window.last != bytes(_BLOCK):
        raise _cut(name, window.start + tar.offset, "neither a header nor the end of the archive")
    end = window.start + tar.offset
    try:
        rest = any(piece.strip(b"\0") for piece in iter(lambda: window.read(_PIECE), b""))
    except BROKEN as error:
        raise _cut(name, end, str(error)) from None
    if rest:
        fix = "tars joined by cat cannot be read, keep them apart"
        raise InputError(f"{name} continues after the end of its archive at byte {end}; {fix}")


def _cut(name: str, offset: int, reason: str) -> TornError:
    return TornError(f"{name} was cut or damaged at byte {offset}: {reason}; copy it again")
