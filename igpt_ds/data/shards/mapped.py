"""Records of many files as one array: reads a field of any records by number, in one step for any number of files.

In: files of records made by `record.py`. Out: arrays of one field. Called by `dataset.py`. Each file is mapped into memory,
and a field is gathered by address, because a loop over the files would cost more than the copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided


class MappedRecords:
    """Files of records, concatenated: record i is the i-th over all files. Each file has at least one record.

    Attributes: files; n_records, the sum over all files.
    """

    def __init__(self, files: Sequence[Path], counts: Sequence[int], dtype: np.dtype) -> None:
        assert min(counts) > 0
        self.files, self.n_records = files, sum(counts)
        self._dtype, self._first = dtype, np.cumsum([0, *counts])[:-1]
        # Views of the maps' memory, which lives as long as this object.
        self._maps = [np.memmap(file, dtype, mode="r", shape=count) for file, count in zip(files, counts, strict=True)]
        address = np.array([mapped.__array_interface__["data"][0] for mapped in self._maps])
        self._origin = self._maps[int(address.argmin())]
        self._span = int(address.max() - address.min()) + dtype.itemsize * max(counts)
        self._shift = address - address.min() - self._first * dtype.itemsize  # address of record 0, if it were in that file
        self._windows = {name: self._window(*field[:2]) for name, field in (dtype.fields or {}).items()}

    def _window(self, field: np.dtype, offset: int) -> tuple[np.ndarray, int, int]:
        """A view with one row per address from the lowest map on (only rows inside a map may be read), the field's offset in a
        record, and the bytes from one row to the next."""
        base, shape = field.base, field.shape
        start = np.frombuffer(self._origin, base, count=1)
        inner = [base.itemsize * int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
        rows = self._span // base.itemsize
        return as_strided(start, (rows, *shape), (base.itemsize, *inner), writeable=False), offset, base.itemsize

    def field(self, name: str, ids: np.ndarray) -> np.ndarray:
        """One field of some records: int64 [B] -> [B, ...], a copy."""
        window, offset, size = self._windows[name]
        return window[(self._offsets(ids) + offset) // size]

    def _offsets(self, ids: np.ndarray) -> np.ndarray:
        assert not len(ids) or (ids.min() >= 0 and ids.max() < self.n_records)
        shift = self._shift[0] if len(self.files) == 1 else self._shift[self._first.searchsorted(ids, side="right") - 1]
        return ids * self._dtype.itemsize + shift

    def first(self, file: int) -> int:
        """The number of a file's first record."""
        return int(self._first[file])

    def place(self, record: int) -> tuple[Path, int, int]:
        """The place of a record: the file, its number in the file, its first byte."""
        file = int(self._first.searchsorted(record, side="right")) - 1
        row = record - int(self._first[file])
        return self.files[file], row, row * self._dtype.itemsize
