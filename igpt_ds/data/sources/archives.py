"""The files of a published dataset, in a folder or in its archive.

In: a path, and the file names of each format. Out: the bytes of those files. `sources/cifar.py`, `sources/stl10.py` and
`sources/imagenet_truth.py` use it. Each read decompresses an archive from its start up to the requested file.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from igpt_ds.data.sources.places import open_binary
from igpt_ds.data.sources.tars import BROKEN, Member, Window, walk
from igpt_ds.errors import InputError

_OPENERS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}


class Files:
    """The files of one format of a dataset, in a folder or an archive. Files of other names are ignored."""

    def __init__(self, path: Path, form: str, members: Mapping[str, Member] | None) -> None:
        self.path, self.form = path, form
        self.folder = path if members is None else None  # the folder, or None for an archive
        self._members = members
        self._held: dict[str, bytes] = {}  # files read from an archive, because reading them again takes seconds

    def has(self, name: str) -> bool:
        """Whether this file exists."""
        return (self.path / name).is_file() if self._members is None else name in self._members

    def full_name(self, name: str) -> str:
        """The file's name in errors."""
        return f"{self.path}/{name}"

    def read(self, name: str) -> bytes:
        """The whole file.

        Raises:
            ValueError: the file does not exist, or the archive is truncated or damaged.
        """
        if not self.has(name):
            raise InputError(f"{self.full_name(name)} does not exist; unpack or download the dataset again")
        if self._members is None:
            with open_binary(self.path / name) as file:
                return file.read()
        if name in self._held:
            return self._held[name]
        data = b""
        with _unpacked(self.path) as window, suppress(*BROKEN):
            data = window.data(self._members[name])
        self._held[name] = data
        if len(data) != self._members[name].size:
            raise InputError(f"{self.path} was cut in {name}; download it again")
        return data


def find_files(path: Path, formats: Mapping[str, Sequence[str]]) -> Files:
    """The first format with a file in `path`, in the format's folder below `path`, or in the archive `path`.

    `formats` has for each format the folder in its archive and the names of its files.

    Raises:
        ValueError: `path` does not exist, or holds no file of any format.
    """
    expected = f"expected the folder {' or '.join(formats)}, a folder that contains it, or its archive (.tar.gz, .tar.xz, .tar)"
    if path.is_dir():
        for form, names in formats.items():
            for folder in (path, path / form):
                if any((folder / name).is_file() for name in names):
                    return Files(folder, form, None)
    elif path.is_file():
        members = _members(path, {name for names in formats.values() for name in names})
        for form, names in formats.items():
            if members.keys() & set(names):
                return Files(path, form, members)
    else:
        raise InputError(f"{path} does not exist; {expected}")
    raise InputError(f"{path} holds no file of this dataset; {expected}")


def _members(path: Path, names: set[str]) -> dict[str, Member]:
    """The members with these file names, in any folder. Stops when all are found."""
    found: dict[str, Member] = {}
    with _unpacked(path) as window:
        for member in walk(window, str(path)):
            name = member.name.rpartition("/")[2]
            if name in names:
                found.setdefault(name, member)
                if len(found) == len(names):
                    break
    return found


@contextmanager
def _unpacked(path: Path) -> Iterator[Window]:
    with open_binary(path) as file:
        opener = _OPENERS.get(file.read(2))
        file.seek(0)
        unpacked: IO[bytes] = opener(file) if opener else file  # type: ignore[operator]
        yield Window(unpacked)
