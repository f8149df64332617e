"""The keys of images, one for each row of some arrays: a text file that is opened when the first key is wanted.

    "horse/0001.jpg"
    "horse/0002.jpg"

A line is a JSON string in ASCII, so a key may hold any character, and bytes of file names that are no UTF-8 (as `os.fsdecode`
gives them). In: keys in the order of the rows. Out: `Keys`. Shard directories and feature directories have one file per split;
their index or manifest has its sha256.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np

from igpt_ds.errors import InputError, naming
from igpt_ds.files import atomic_file, sha256_file
from igpt_ds.plain_files import check_file


def write_keys(path: Path, keys: Iterable[str]) -> None:
    """Writes a file of keys, atomically. Memory holds one key at a time."""
    with atomic_file(path) as file:
        file.writelines(json.dumps(key).encode() + b"\n" for key in keys)


class Keys(Sequence[str]):
    """The keys of n rows. Nothing is read before the first key; then the file is compared with its sha256 and mapped.

    Raises:
        ValueError: (the first access) the file is missing, was changed, or has another number of lines.
    """

    def __init__(self, path: Path, n: int, sha256: str, fix: str) -> None:
        self._path, self._n, self._sha256, self._fix = path, n, sha256, fix

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(self._n))]
        number = row + self._n if row < 0 else row
        if not 0 <= number < self._n:
            raise IndexError(f"row {row} of {self._n} keys")
        text, ends = self._text
        return str(json.loads(text[ends[number - 1] + 1 if number else 0 : ends[number]].tobytes()))

    def __repr__(self) -> str:
        return f"Keys({str(self._path)!r}, {self._n})"

    @cached_property
    def _text(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of the file, and the place of each line's end."""
        check_file(self._path)
        if not self._path.is_file() or sha256_file(self._path) != self._sha256:
            raise InputError(f"{self._path} is missing or damaged: its sha256 differs; {self._fix}")
        with naming(self._path):
            text = np.memmap(self._path, np.uint8, "r") if self._n else np.zeros(0, np.uint8)
        ends = np.flatnonzero(text == ord("\n"))
        if len(ends) != self._n:
            raise InputError(f"{self._path} has {len(ends)} keys, not {self._n}; {self._fix}")
        return text, ends
