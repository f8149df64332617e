"""`digits:`, the 1,797 handwritten digits that come with scikit-learn: 8x8, 17 grey levels, ten classes.

In: nothing. Out: a source that needs no files, for the demo and for tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from igpt_ds.data.left_out import Tally
from igpt_ds.data.sources.base import VAL_FRACTION, Entry


class Digits:
    """Keys are `{label}/{index:04d}`, in scikit-learn's order; all are "train"."""

    val_fraction = VAL_FRACTION
    labels = "use"
    left_out = Tally()  # nothing: its files are those of the publisher

    def __init__(self) -> None:
        self.name = "digits:"
        self.classes = [str(digit) for digit in range(10)]

    def entries(self) -> Iterator[Entry]:
        """The digits in scikit-learn's order."""
        for index, label in enumerate(self._data[1]):
            yield Entry("train", f"{label}/{index:04d}", int(label), [index])

    def read(self, entries: Sequence[Entry]) -> Iterator[np.ndarray]:
        """uint8 [8, 8, 3] per entry: the 17 levels scaled to 0..255."""
        for entry in entries:
            yield np.repeat(self._data[0][entry.place[0]][..., None], 3, axis=-1)

    @cached_property
    def _data(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_digits  # lazily: only this source needs it

        digits = load_digits()
        return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target
