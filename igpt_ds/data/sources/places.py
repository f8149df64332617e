"""Images that lie in files of their own or in a slice of a larger file: from their places to their bytes.

In: entries with a place `[path]` or `[path, offset, size]`. Out: the bytes. Folders, ImageNet and local tars read through it.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from igpt_ds.data.sources.base import Entry


def read_places(root: Path, entries: Sequence[Entry]) -> Iterator[bytes | ValueError]:
    """The bytes of each entry in order; paths are relative to `root`. A tar stays open while entries come from it.

    A single file that cannot be read is one bad image and comes back as a ValueError.

    Raises:
        ValueError: a file that holds many images cannot be opened, or ends before a slice that was listed.
    """
    with ExitStack() as stack:
        name, file = "", None
        for entry in entries:
            if len(entry.place) == 1:
                yield _whole(root / entry.place[0])
                continue
            if file is None or entry.place[0] != name:
                stack.close()
                name = entry.place[0]
                file = stack.enter_context(open_binary(root / name))
            _, offset, size = entry.place
            file.seek(offset)
            data = file.read(size)
            if len(data) != size:
                raise ValueError(
                    f"{root / name} was listed up to byte {offset + size} ({entry.key}) but ends before; list it again"
                )
            yield data


def _whole(path: Path) -> bytes | ValueError:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return ValueError(f"{path} cannot be read: it is no file")  # a fifo or a device would never end
        return path.read_bytes()
    except OSError as error:
        return ValueError(f"{path} cannot be read: {error.strerror}")


def open_binary(path: Path) -> IO[bytes]:
    """Opens a file for reading.

    Raises:
        ValueError: it does not exist or may not be read.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
