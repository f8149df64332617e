"""`stl10:PATH`: the labelled images of STL-10 from its binary files.

In: PATH is the folder `stl10_binary`, a folder that contains it, or the archive. Out: a source of 96x96 images. The 100,000
images of `unlabeled_X.bin` are not read, as in paper 3.1. Unpack the archive (2.6 GB) first: otherwise each process decompresses
it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from igpt_ds.data.left_out import Tally
from igpt_ds.data.sources.archives import find_files
from igpt_ds.data.sources.base import VAL_FRACTION, Entry
from igpt_ds.errors import InputError

_FOLDER = "stl10_binary"
_NAMES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "class_names.txt")
_SIDE = 96
_PIXELS = 3 * _SIDE * _SIDE


class STL10:
    """Keys are `train/0000` and `test/0000`, numbers in the order of the official files. The test files are optional.

    Raises:
        ValueError: a file is missing. Listing raises it if lengths do not match, or a label has no class.
    """

    val_fraction = VAL_FRACTION
    labels = "use"
    left_out = Tally()  # nothing: its files are those of the publisher

    def __init__(self, path: Path) -> None:
        self.name = f"stl10:{path}"
        self._files = find_files(path, {_FOLDER: _NAMES})
        self.classes = self._files.read("class_names.txt").decode("latin1").split()
        self._splits = ["train"]
        if self._files.has("test_X.bin") or self._files.has("test_y.bin"):
            self._splits.append("test")
        for name in (f"{split}_{part}.bin" for split in self._splits for part in "Xy"):
            if not self._files.has(name):
                raise InputError(f"{self._files.full_name(name)} does not exist; unpack or download the dataset again")
        self._held: tuple[str, np.ndarray] | None = None  # the last split read, and its images

    def entries(self) -> Iterator[Entry]:
        """The images of train_X.bin, then those of test_X.bin."""
        for split in self._splits:
            name = self._files.full_name(f"{split}_y.bin")
            labels = self._files.read(f"{split}_y.bin")
            if len(labels) != len(self._images(split)):
                n_images = f"{len(self._images(split))} images"
                raise InputError(f"{name} holds {len(labels)} labels for the {n_images} of {split}_X.bin; download both again")
            for index, label in enumerate(labels):
                if not 1 <= label <= len(self.classes):
                    raise InputError(f"{name} holds the label {label}; labels lie in 1..{len(self.classes)}. Download it again")
                yield Entry(split, f"{split}/{index:04d}", label - 1, [split, index])

    def read(self, entries: Sequence[Entry]) -> Iterator[np.ndarray]:
        """uint8 [96, 96, 3] per entry; the files store planes of columns."""
        for entry in entries:
            split, index = entry.place
            if index >= len(self._images(split)):
                name = self._files.full_name(f"{split}_X.bin")
                raise InputError(f"{name} was listed with {entry.key} but ends before; list it again")
            yield np.ascontiguousarray(self._images(split)[index].transpose(2, 1, 0))

    def _images(self, split: str) -> np.ndarray:
        """uint8 [n, 3, 96 columns, 96 rows]; mapped into memory if the file is in a folder."""
        if self._held is None or self._held[0] != split:
            name = f"{split}_X.bin"
            folder = self._files.folder
            self._held = None  # never hold two at once
            empty = folder is not None and not (folder / name).stat().st_size  # an empty file cannot be mapped
            data = (
                np.memmap(folder / name, np.uint8, "r")
                if folder and not empty
                else np.frombuffer(self._files.read(name), np.uint8)
            )
            if not len(data) or len(data) % _PIXELS:
                reason = f"has {len(data)} bytes, which is not a multiple of {_PIXELS}: it was cut"
                raise InputError(f"{self._files.full_name(name)} {reason}; download it again")
            self._held = (split, data.reshape(-1, 3, _SIDE, _SIDE))
        return self._held[1]
