"""`imagefolder:DIR`: images in one folder per class, or without classes.

In: `DIR/<class>/<image>`, where all images are "train", or `DIR/train/<class>/<image>` with or without
`DIR/val/<class>/<image>` and `DIR/test/<class>/<image>`, or the same without classes, `DIR/<image>` or `DIR/train/<image>`, which
has no labels. Out: a source. DIR has splits if its only folders are `train` and `val` (or `valid`, `validation`) or `test`, and
all of them hold class folders, or all of them images. A class may be called "train".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from igpt_ds.data.left_out import COPY, DEEP, EMPTY_CLASS, LOOSE, Tally
from igpt_ds.data.sources.base import (
    UNLABELLED,
    VAL_FRACTION,
    Entry,
    Result,
    has_images,
    scan,
    split_word,
    visible_folders,
    walk_images,
)
from igpt_ds.data.sources.copies import without_copies
from igpt_ds.data.sources.places import read_places
from igpt_ds.errors import InputError

_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class ImageFolder:
    """Classes and images are sorted by name. Keys do not depend on the layout: `<class>/<image>` is the path below DIR or below
    DIR/train, `val/<class>/<image>` and `test/<class>/<image>` are images of these splits, whatever their folder is called.

    Every file is tried as an image that is not known to be something else (`data/left_out.py`). Images beside or below the class
    folders are left out and counted. With labels "ignore", images count at any depth, and folders called train, val and test are
    splits. No validation images are drawn from train where there is a folder of them.

    Raises:
        ValueError: DIR does not exist, holds no images, mixes the two layouts, or has a class in `test` that `train` lacks.
    """

    def __init__(self, directory: Path, labels: str = "use") -> None:
        self.name, self.labels = f"imagefolder:{directory}", labels
        self.left_out = Tally()
        self._directory = directory
        if not directory.is_dir():
            raise InputError(f"source directory {directory} does not exist; expected {directory}/<class>/<image>.jpg")
        self._flat = labels == "ignore"
        self._divided = self._is_divided()
        self._splits = {split: name for name, split in _SPLITS.items() if self._divided and (directory / name).is_dir()}
        self.val_fraction = 0.0 if "val" in self._splits else VAL_FRACTION
        self.classes = UNLABELLED if self._flat else self._classes("train" if self._divided else "")
        if not self.classes and has_images(directory):
            self.classes, self._flat = UNLABELLED, True
        if not self.classes:
            raise InputError(f"source directory {directory} holds no images; {self._advice()}")
        for name in self._splits.values() if not self._flat else ():
            if extra := set(self._classes(name)) - set(self.classes):
                lacks = f"has the class {min(extra)!r}, which {directory}/train lacks"
                raise InputError(f"{directory}/{name} {lacks}; remove or rename it")

    def entries(self) -> Iterator[Entry]:
        """Images class by class. A copy of an image of another split is left out. Memory holds the names of one class folder."""
        if len(self._splits) > 1:
            return without_copies(self.listed, self.read, lambda entry: self.left_out.add(entry.place[0], COPY, lost=False))
        return self.listed()

    def listed(self) -> Iterator[Entry]:
        """Images class by class, copies included, which only the files' contents show."""
        self.left_out = Tally()
        if not self._divided:
            yield from self._entries("train", "")
            return
        loose, _ = scan(self._directory, "", self.left_out)
        if self._flat:
            yield from (Entry("train", self._free(path, f"train/{path}"), 0, [path]) for path in loose)
        else:
            self._leave_out(loose, LOOSE)
        for split, name in self._splits.items():
            yield from self._entries(split, name)

    def read(self, entries: Sequence[Entry]) -> Iterator[Result]:
        """The files' bytes, or a ValueError for a file that cannot be read."""
        return read_places(self._directory, entries)

    def _entries(self, split: str, below: str) -> Iterator[Entry]:
        if self.labels == "ignore":
            for path in walk_images(self._directory, below, self.left_out):
                yield Entry(split, self._key(split, path), 0, [path])
            return
        labels = {f"{below}/{name}" if below else name: label for label, name in enumerate(self.classes)}
        loose, folders = scan(self._directory, below, self.left_out)
        if self._flat:
            yield from (Entry(split, self._key(split, path), 0, [path]) for path in loose)
        else:
            self._leave_out(loose, LOOSE)
        for folder in folders:
            images, deeper = scan(self._directory, folder, self.left_out)
            if not images and not self._flat:
                self.left_out.add(folder, EMPTY_CLASS, lost=False, ending="")
            for path in images:
                yield Entry(split, self._key(split, path), labels[folder], [path])
            for below_class in deeper:
                self._leave_out(walk_images(self._directory, below_class, self.left_out), DEEP)

    def _key(self, split: str, path: str) -> str:
        """The key of an image at a path below DIR: the same whether it lies in DIR or in DIR/train."""
        if not self._divided:
            return path
        below = path.removeprefix(f"{self._splits[split]}/")
        if split != "train":
            return f"{split}/{below}"
        first, _, rest = below.partition("/")
        return self._free(below, f"{self._splits[first]}/{rest}") if self._flat and first in self._splits else below

    def _free(self, key: str, other: str) -> str:
        """A key that an image at the path `other` may have too: images at any depth have the same keys in rare cases."""
        return f"./{key}" if (self._directory / other).is_file() else key

    def _leave_out(self, paths: Iterator[str] | list[str], reason: str) -> None:
        for path in paths:
            self.left_out.add(path, reason)

    def _classes(self, below: str) -> list[str]:
        folder = self._directory / below
        return [name for name in visible_folders(folder) if has_images(folder / name)]

    def _is_divided(self) -> bool:
        """Whether DIR holds splits instead of classes. Refuses ambiguous folders."""
        directory, folders = self._directory, visible_folders(self._directory)
        only_splits = "train" in folders and not set(folders) - set(_SPLITS)
        if only_splits and len({_SPLITS[name] for name in folders}) < len(folders):
            raise InputError(f"{directory} holds {', '.join(folders)}, of which two are validation images; keep one of them")
        if only_splits and self.labels == "ignore":
            return True
        if only_splits and len(folders) > 1 and all(self._holds_only_images(name) for name in folders):
            self._flat = True
            return True
        if "train" not in folders or not self._classes("train"):
            self._refuse_splits(folders)
            return False
        if has_images(directory / "train"):
            both = "holds both images and folders of images"
            raise InputError(f"{directory}/train {both}, so it is neither a class nor a split; move one of the two away")
        extra = [name for name in folders if name not in _SPLITS]
        if extra:
            fix = "only train, val and test are read; move the others away"
            raise InputError(f"{directory}/train holds class folders, but {directory}/{extra[0]} lies beside it: {fix}")
        return True

    def _holds_only_images(self, name: str) -> bool:
        return has_images(self._directory / name) and not self._classes(name)

    def _refuse_splits(self, folders: list[str]) -> None:
        """Refuses folders that are all named like splits, whose images would otherwise become classes of one split."""
        splits = {split_word(re.sub("[^A-Za-z]", "", name)) for name in folders}  # train2017, but no train_station
        if len(splits) < 2 or None in splits:
            return
        if self.labels == "ignore" or any(has_images(self._directory / name) for name in folders):
            fix = "call them train, val and test, name one of them as the source, or rename them if they are classes"
            raise InputError(f"{self._directory} holds the splits {', '.join(folders)} instead of classes; {fix}")

    def _advice(self) -> str:
        expected = f"expected {self._directory}/<class>/<image>.jpg"
        deep = next(walk_images(self._directory, "", Tally()), None)
        if deep is None:
            return expected
        return f"{expected}, found {self._directory}/{deep}; name the folder above its class, or add --labels ignore"
