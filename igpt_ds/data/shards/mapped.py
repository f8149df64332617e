"""Records of many files as one array: reads a field of any records by number, in one step for any number of files.

In: files of records made by `record.py`. Out: arrays of one field. Called by `dataset.py`. A field is gathered by address,
because a loop over the files would cost more than the copy. The addresses of all files are reserved at the start. A file is
opened, mapped to its addresses and closed again when one of its records is read for the first time: 100 million images are 6,104
files, more than a process may hold open, and on a cluster every rank would open all of them at the same moment.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

from igpt_ds.errors import naming

_PROT_NONE, _MAP_FIXED = 0, 0x10  # which the module mmap lacks

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def _map(address: int | None, size: int, protection: int, flags: int, descriptor: int = -1) -> int:
    found = _libc.mmap(address, size, protection, flags, descriptor, 0)
    if found in (None, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)


class MappedRecords:
    """Files of records, concatenated: record i is the i-th over all files. Each file has at least one record.

    Args:
        check: called with the path and the size of a file when it is opened; raises if the size is wrong.

    Attributes: files; n_records, the sum over all files.
    """

    def __init__(
        self, files: Sequence[Path], counts: Sequence[int], dtype: np.dtype, check: Callable[[Path, int], None] | None = None
    ) -> None:
        assert min(counts) > 0
        self.files, self.n_records = files, sum(counts)
        self._dtype, self._check, self._first = dtype, check, np.cumsum([0, *counts])[:-1]
        self._sizes = np.array(counts) * dtype.itemsize
        ends = np.cumsum(-(-self._sizes // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._starts, span = np.concatenate([[0], ends[:-1]]), int(ends[-1])
        self._address = _map(None, span, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        weakref.finalize(self, _libc.munmap, self._address, span).atexit = False  # a thread may still read when the program ends
        self._mapped: np.ndarray = np.zeros(len(files), dtype=bool)
        self._n_mapped = 0
        self._shift = self._starts - self._first * dtype.itemsize  # place of record 0, if it were in that file
        whole = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(self._address))
        self._windows = {name: self._window(whole, *field[:2]) for name, field in (dtype.fields or {}).items()}

    def _window(self, whole: np.ndarray, field: np.dtype, offset: int) -> tuple[np.ndarray, int, int]:
        """A view with one row per address from the first file on (only rows of a mapped file may be read), the field's offset
        in a record, and the bytes from one row to the next."""
        base, shape = field.base, field.shape
        inner = [base.itemsize * int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
        rows = len(whole) // base.itemsize
        start = whole[: base.itemsize].view(base)
        return as_strided(start, (rows, *shape), (base.itemsize, *inner), writeable=False), offset, base.itemsize

    def field(self, name: str, ids: np.ndarray) -> np.ndarray:
        """One field of some records: int64 [B] -> [B, ...], a copy.

        Raises:
            OSError: a file cannot be opened; and what `check` raises.
        """
        window, offset, size = self._windows[name]
        return window[(self._offsets(ids) + offset) // size]

    def _offsets(self, ids: np.ndarray) -> np.ndarray:
        assert not len(ids) or (ids.min() >= 0 and ids.max() < self.n_records)
        files = self._first.searchsorted(ids, side="right") - 1
        if self._n_mapped < len(self.files):
            for file in np.unique(files[~self._mapped[files]]).tolist():
                self._open(file)
        return ids * self._dtype.itemsize + self._shift[files]

    def _open(self, file: int) -> None:
        """Maps a file to its addresses. Two threads may do so at once, with the same result."""
        path, size = self.files[file], int(self._sizes[file])
        with naming(path), open(path, "rb", buffering=0) as opened:
            found = os.fstat(opened.fileno()).st_size
            if self._check is not None:
                self._check(path, found)
            assert found >= size, path
            place = self._address + int(self._starts[file])
            _map(place, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, opened.fileno())
        self._mapped[file] = True
        self._n_mapped = int(self._mapped.sum())

    def first(self, file: int) -> int:
        """The number of a file's first record."""
        return int(self._first[file])

    def place(self, record: int) -> tuple[Path, int, int]:
        """The place of a record: the file, its number in the file, its first byte."""
        file = int(self._first.searchsorted(record, side="right")) - 1
        row = record - int(self._first[file])
        return self.files[file], row, row * self._dtype.itemsize
