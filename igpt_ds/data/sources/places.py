"""Reads images that are files, or slices of larger files.

In: entries with a place `[path]` or `[path, offset, size]`. Out: the bytes. Folders, ImageNet and local tars use it.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from igpt_ds.data.left_out import HUGE, SPECIAL, UNREADABLE, BadImageError
from igpt_ds.data.sources.base import Entry
from igpt_ds.errors import InputError, reason
from igpt_ds.plain_files import check_file

_MAX_BYTES = 1 << 30  # any file may be an image, but no process has memory for any file


def read_places(root: Path, entries: Sequence[Entry]) -> Iterator[bytes | ValueError]:
    """The bytes of each entry, in order; paths are relative to `root`. A tar stays open while consecutive entries are in it.

    A single file that cannot be read is one bad image; its result is a ValueError.

    Raises:
        ValueError: an entry leads out of `root`; a file of many images cannot be opened, or ends before a listed slice.
    """
    with ExitStack() as stack:
        name, file = "", None
        for entry in entries:
            if root.parts and ((place := Path(entry.place[0])).is_absolute() or ".." in place.parts):
                raise InputError(f"the list of images names {entry.place[0]!r}, which is not below {root}; list the images again")
            if len(entry.place) == 1:
                yield _whole(root / entry.place[0])
                continue
            if file is None or entry.place[0] != name:
                stack.close()
                name = entry.place[0]
                file = stack.enter_context(open_binary(root / name))
            offset, size = entry.place[1:3]
            if error := huge(f"{root / name}: {entry.key}", size):
                yield error
                continue
            file.seek(offset)
            data = file.read(size)
            if len(data) != size:
                raise InputError(
                    f"{root / name} was listed up to byte {offset + size} ({entry.key}) but ends before; list it again"
                )
            yield data


def _whole(path: Path) -> bytes | ValueError:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return BadImageError(f"{path} cannot be read: it is not a file", SPECIAL)  # a fifo or a device may never end
        return huge(str(path), status.st_size) or path.read_bytes()
    except OSError as error:
        return BadImageError(f"{path} cannot be read: {reason(error)}", UNREADABLE)


def huge(name: str, size: int) -> ValueError | None:
    """The error of a file that is too large to be tried as an image."""
    return BadImageError(f"{name} is larger than 1 GiB, so it is not read as an image", HUGE) if size > _MAX_BYTES else None


def open_binary(path: Path) -> IO[bytes]:
    """Opens a file for reading, never a fifo or a device, which may not end.

    Raises:
        ValueError: the file does not exist, cannot be read, or is not a regular file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} cannot be read: it is not a file")
        check_file(path)
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from None
