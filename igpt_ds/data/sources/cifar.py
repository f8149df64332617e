"""`cifar10:PATH` and `cifar100:PATH`: the files of Krizhevsky's page, in the python version or the binary version.

In: PATH is the folder `cifar-10-batches-py`, `cifar-10-batches-bin`, `cifar-100-python` or `cifar-100-binary`, a folder that
contains it, or the downloaded archive. Out: a source with the same keys, labels and pixels for both versions.
`sources/unpickle.py` reads the python version, so a malicious pickle cannot run code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from igpt_ds.data.left_out import Tally
from igpt_ds.data.sources.archives import find_files
from igpt_ds.data.sources.base import VAL_FRACTION, Entry
from igpt_ds.data.sources.unpickle import load_pickle
from igpt_ds.errors import InputError

_PIXELS = 3 * 32 * 32


class _Versions(NamedTuple):
    """The names of folders, files and fields in the two versions of one dataset."""

    python: str  # folder
    binary: str  # folder
    train: list[str]  # batches
    test: str
    meta: str  # pickle with the names of the classes
    meta_key: str
    meta_text: str  # the same as text
    labels_key: str
    head: int  # bytes before the pixels of a binary record; the last one is the label
    n_classes: int


_VERSIONS = {
    "cifar10": _Versions(
        python="cifar-10-batches-py",
        binary="cifar-10-batches-bin",
        train=[f"data_batch_{number}" for number in range(1, 6)],
        test="test_batch",
        meta="batches.meta",
        meta_key="label_names",
        meta_text="batches.meta.txt",
        labels_key="labels",
        head=1,
        n_classes=10,
    ),
    "cifar100": _Versions(
        python="cifar-100-python",
        binary="cifar-100-binary",
        train=["train"],
        test="test",
        meta="meta",
        meta_key="fine_label_names",
        meta_text="fine_label_names.txt",
        labels_key="fine_labels",
        head=2,  # coarse label, fine label
        n_classes=100,
    ),
}


class Cifar:
    """Keys are `train/00000` and `test/00000`, numbers in the order of the official files. CIFAR-100 has its 100 fine classes.

    The test batch is optional. Memory holds one batch (at most 160 MB).

    Raises:
        ValueError: a file is missing, truncated or not plain data. Listing raises it if shapes, lengths or labels of a batch are
            not those of the dataset.
    """

    val_fraction = VAL_FRACTION
    labels = "use"
    left_out = Tally()  # nothing: its files are those of the publisher

    def __init__(self, kind: str, path: Path) -> None:
        """`kind` is "cifar10" or "cifar100"."""
        layout = self._layout = _VERSIONS[kind]
        self.name = f"{kind}:{path}"
        batches = [*layout.train, layout.test]
        self._files = find_files(
            path,
            {
                layout.python: [*batches, layout.meta],
                layout.binary: [*(f"{batch}.bin" for batch in batches), layout.meta_text],
            },
        )
        self._ending = ".bin" if self._files.form == layout.binary else ""
        for batch in layout.train:
            if not self._files.has(batch + self._ending):
                missing = self._files.full_name(batch + self._ending)
                raise InputError(f"{missing} does not exist; unpack or download the dataset again")
        self.classes = self._read_classes()
        self._held: tuple[str, np.ndarray, list[int]] | None = None  # the last batch read: name, uint8 [n, 3072], labels

    def entries(self) -> Iterator[Entry]:
        """The batches in their official order."""
        index, size = 0, None
        for batch in self._layout.train:
            labels = self._batch(batch)[1]
            if size not in (None, len(labels)):
                name = self._files.full_name(batch + self._ending)
                raise InputError(f"{name} holds {len(labels)} images, unlike the {size} of those before it; download it again")
            size = len(labels)
            for row, label in enumerate(labels):
                yield Entry("train", f"train/{index:05d}", label, [batch, row])
                index += 1
        if self._files.has(self._layout.test + self._ending):
            for row, label in enumerate(self._batch(self._layout.test)[1]):
                yield Entry("test", f"test/{row:05d}", label, [self._layout.test, row])

    def read(self, entries: Sequence[Entry]) -> Iterator[np.ndarray]:
        """uint8 [32, 32, 3] per entry."""
        for entry in entries:
            batch, row = entry.place
            images, _ = self._batch(batch)
            if row >= len(images):
                name = self._files.full_name(batch + self._ending)
                raise InputError(f"{name} was listed with {entry.key} but ends before; list it again")
            yield np.ascontiguousarray(images[row].reshape(3, 32, 32).transpose(1, 2, 0))

    def _batch(self, batch: str) -> tuple[np.ndarray, list[int]]:
        if self._held is None or self._held[0] != batch:
            self._held = None  # never hold two at once
            self._held = (batch, *self._read_batch(batch + self._ending))
        return self._held[1], self._held[2]

    def _read_batch(self, file: str) -> tuple[np.ndarray, list[int]]:
        """Pixels, uint8 [n, 3072], and labels."""
        name, data, layout = self._files.full_name(file), self._files.read(file), self._layout
        if self._ending:
            record = layout.head + _PIXELS
            if not data or len(data) % record:
                raise InputError(
                    f"{name} has {len(data)} bytes, which is not a multiple of {record}: it was cut; download it again"
                )
            records = np.frombuffer(data, np.uint8).reshape(-1, record)
            images, labels = records[:, layout.head :], records[:, layout.head - 1].tolist()
        else:
            images, labels = _checked(load_pickle(data, name), layout.labels_key, name)
        if not all(0 <= label < layout.n_classes for label in labels):
            wrong = next(label for label in labels if not 0 <= label < layout.n_classes)
            raise InputError(f"{name} holds the label {wrong}; labels lie in 0..{layout.n_classes - 1}. Download it again")
        return images, labels

    def _read_classes(self) -> list[str]:
        layout = self._layout
        file = layout.meta_text if self._ending else layout.meta
        name, data = self._files.full_name(file), self._files.read(file)
        if self._ending:
            classes = data.decode("latin1").split()
        else:
            names = load_pickle(data, name).get(layout.meta_key)
            texts = (
                [item.decode("latin1") if isinstance(item, bytes) else item for item in names] if isinstance(names, list) else []
            )
            classes = [text for text in texts if isinstance(text, str)]
        if len(classes) != layout.n_classes:
            raise InputError(f"{name} names {len(classes)} classes, expected {layout.n_classes}; download it again")
        return classes


def _checked(batch: dict[str, object], labels_key: str, name: str) -> tuple[np.ndarray, list[int]]:
    """Pixels and labels of an unpickled batch, after checks."""
    images, labels = batch.get("data"), batch.get(labels_key)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (_PIXELS,) or not len(images):
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise InputError(f"{name}: 'data' is {found}, expected uint8 [n, {_PIXELS}]; download it again")
    if not isinstance(labels, list) or len(labels) != len(images) or any(type(label) is not int for label in labels):
        raise InputError(f"{name}: {labels_key!r} is not a list of {len(images)} integers; download it again")
    return images, labels
