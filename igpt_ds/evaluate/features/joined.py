"""Several splits of features read as one, such as train+val: the rows of one array after those of another, without a copy.

In: memory maps of the same width. Out: an array-like that the probes read by rows. Called by `files.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class JoinedRows:
    """Arrays [N_k, C] of one dtype as one array [sum of N_k, C]; rows are read when they are asked for, as from a memory map.

    `np.asarray` reads all rows into memory.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = list(arrays)
        self._ends = np.cumsum([len(array) for array in arrays])
        self.dtype, self.shape = arrays[0].dtype, (int(self._ends[-1]), *arrays[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        ids = np.arange(len(self))[rows]
        if not ids.ndim:
            return self[np.array([ids])][0]
        found, places = np.empty((len(ids), *self.shape[1:]), self.dtype), self._ends.searchsorted(ids, side="right")
        for k, array in enumerate(self._arrays):
            mine = places == k
            if mine.any():
                own = ids[mine] - (self._ends[k] - len(array))
                step = own[1] - own[0] if len(own) > 1 else 1
                near = step > 0 and (np.diff(own) == step).all()  # a slice reads a file once, where numbers gather row by row
                found[mine] = array[own[0] : own[-1] + 1 : step] if near else array[own]
        return found

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)
