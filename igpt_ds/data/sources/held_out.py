"""`KIND:WHERE,test=WHERE2`: a source whose test images are another source of the same kind.

In: the two sources. Out: a source. Called by `open_source`. The test images' keys begin with "test/".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

from igpt_ds.data.left_out import COPY, Tally
from igpt_ds.data.sources.base import Entry, Result, Source, listing
from igpt_ds.data.sources.copies import without_copies
from igpt_ds.errors import InputError


class WithTest:
    """The images of `train`, then all images of `test` as the split "test".

    Raises:
        ValueError: the test images have a class that the others lack. Listing raises it if `train` has test images of its own.
    """

    def __init__(self, name: str, train: Source, test: Source) -> None:
        self.name, self.labels, self.val_fraction = name, train.labels, train.val_fraction
        self.classes = train.classes
        self.left_out = Tally()
        self._train, self._test = train, test
        if extra := set(test.classes) - set(self.classes):
            fix = "remove or rename it, or add --labels ignore"
            raise InputError(f"{test.name} has the class {min(extra)!r}, which {train.name} lacks; {fix}")

    def entries(self) -> Iterator[Entry]:
        """Those of both, the test images last. A copy of a test image is left out."""
        copies = Tally()
        every = partial(self._both, lambda source: source.entries())
        yield from without_copies(every, self.read, lambda entry: copies.add(entry.key, COPY, lost=False))
        self.left_out = Tally([*self._train.left_out.rows(), *self._test.left_out.rows(), *copies.rows()])

    def listed(self) -> Iterator[Entry]:
        """As `listing` of both."""
        return self._both(listing)

    def _both(self, entries: Callable[[Source], Iterator[Entry]]) -> Iterator[Entry]:
        for entry in entries(self._train):
            if entry.split == "test":
                raise InputError(f"{self._train.name} has test images of its own, such as {entry.key}; leave out ',test='")
            yield entry
        labels = [self.classes.index(name) for name in self._test.classes]
        for entry in entries(self._test):
            yield entry._replace(split="test", key=f"test/{entry.key}", label=labels[entry.label])

    def read(self, entries: Sequence[Entry]) -> Iterator[Result]:
        """Each entry from its source."""
        for of_test, some in groupby(entries, key=lambda entry: entry.split == "test"):
            yield from (self._test if of_test else self._train).read(list(some))
