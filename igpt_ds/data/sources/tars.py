"""Walks a plain tar from its first member to its last, in a file, inside another tar, or coming out of a command.

In: bytes. Out: name, offset and size of each file in it. `sources/imagenet.py`, `sources/webtars.py` and `sources/archives.py`
list with it. Memory stays flat, and a tar that was cut is an error: Python's tarfile takes a damaged header for the end.
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

_BLOCK = 512
_PIECE = 1 << 20
# What tarfile and the decompressors raise on bytes that were cut or damaged.
BROKEN = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, OverflowError, ValueError)


class Member(NamedTuple):
    """A file in a tar: its data are `size` bytes from `offset` of the outermost file or stream."""

    name: str
    offset: int
    size: int


class Window:
    """A part of a file that can be sought, or a stream that can only be read forwards; as much of a file as tarfile asks for."""

    def __init__(self, file: IO[bytes], start: int = 0, size: int | None = None) -> None:
        """`size` None says that `file` is a stream of unknown length."""
        self.start, self.size = start, size
        self.last = b""  # what the latest read gave
        self.ended = False  # whether a read found the end of a stream
        self._file = file
        self._at = 0
        if size is not None:
            file.seek(start)

    def tell(self) -> int:
        """How many bytes lie before the place of the next read."""
        return self._at

    def seek(self, to: int) -> None:
        """Moves the place of the next read; in a stream forwards only."""
        if self.size is not None:
            self._file.seek(self.start + to)
            self._at = to
            return
        assert to >= self._at, "a stream is read forwards"
        while self._at < to and self.read(min(_PIECE, to - self._at)):
            pass

    def read(self, n: int) -> bytes:
        """At most n bytes; fewer where the window or the stream ends."""
        if self.size is not None:
            n = max(0, min(n, self.size - self._at))
        self.last = self._file.read(n)
        self._at += len(self.last)
        self.ended = self.ended or len(self.last) < n
        return self.last

    def data(self, member: Member) -> bytes:
        """A member's bytes; fewer than its size where the file or stream ends. On a stream, before the walk goes on."""
        self.seek(member.offset - self.start)
        return self.read(member.size)


@contextmanager
def tar_window(path: Path) -> Iterator[Window]:
    """A window on a whole tar file."""
    with open_binary(path) as file:
        yield Window(file, 0, path.stat().st_size)


def walk(window: Window, name: str) -> Iterator[Member]:
    """The regular files of a tar in the order in which they lie there; `name` is what errors call the tar.

    Raises:
        ValueError: it is no plain tar, it ends before its end mark, a header is damaged, or something follows the mark.
    """
    try:
        tar = tarfile.TarFile(fileobj=cast(Any, window))
    except BROKEN as error:
        raise ValueError(f"{name} is not a plain tar ({error}); decompress it, or copy it again") from None
    while True:
        try:
            member = tar.next()
        except BROKEN as error:
            raise _cut(name, window.start + tar.offset, str(error)) from None
        if member is None:
            break
        cast(Any, tar).members.clear()  # tarfile would keep every header that it has read
        if member.issym() or member.islnk() or member.issparse():
            raise ValueError(f"{name} holds the link or sparse file {member.name}; pack the tar again with plain files (tar -h)")
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
        raise ValueError(f"{name} goes on after the end of its archive at byte {end}; {fix}")


def _cut(name: str, offset: int, reason: str) -> ValueError:
    return ValueError(f"{name} was cut or damaged at byte {offset}: {reason}; copy it again")
