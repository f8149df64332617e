"""`imagefolder:DIR`: images in one folder per class.

In: `DIR/<class>/<image>`, where all images are "train", or `DIR/train/<class>/<image>` with or without
`DIR/test/<class>/<image>`. Out: a source. DIR has the second layout if its only folders are `train` and optionally `test`, and
these hold class folders instead of images. A class may be called "train".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from igpt_ds.data.sources.base import VAL_FRACTION, Entry, Result, has_images, image_names, visible_folders
from igpt_ds.data.sources.places import read_places


class ImageFolder:
    """Classes and images are sorted by name. Hidden files and folders without images are ignored.

    Keys are the paths below DIR: `<class>/<image>` or `train/<class>/<image>`.

    Raises:
        ValueError: DIR does not exist, holds no images, mixes the two layouts, or has a class in `test` that `train` lacks.
    """

    val_fraction = VAL_FRACTION

    def __init__(self, directory: Path) -> None:
        self.name = f"imagefolder:{directory}"
        self._directory = directory
        if not directory.is_dir():
            raise ValueError(f"source directory {directory} does not exist; expected {directory}/<class>/<image>.jpg")
        self._divided = self._is_divided()
        self.classes = self._classes("train") if self._divided else self._classes("")
        if not self.classes:
            raise ValueError(f"source directory {directory} holds no images; expected {directory}/<class>/<image>.jpg")
        extra = set(self._classes("test")) - set(self.classes) if self._has_test() else set()
        if extra:
            raise ValueError(f"{directory}/test has the class {min(extra)!r}, which {directory}/train lacks; remove or rename it")

    def entries(self) -> Iterator[Entry]:
        """Images class by class. Memory holds the names of one class folder."""
        if not self._divided:
            yield from self._entries("train", "")
            return
        yield from self._entries("train", "train")
        if self._has_test():
            yield from self._entries("test", "test")

    def read(self, entries: Sequence[Entry]) -> Iterator[Result]:
        """The files' bytes, or a ValueError for a file that cannot be read."""
        return read_places(self._directory, entries)

    def _entries(self, split: str, below: str) -> Iterator[Entry]:
        for label, name in enumerate(self.classes):
            folder = Path(below, name)
            if (self._directory / folder).is_dir():
                for file in image_names(self._directory / folder):
                    path = str(folder / file)
                    yield Entry(split, path, label, [path])

    def _classes(self, below: str) -> list[str]:
        folder = self._directory / below
        return [name for name in visible_folders(folder) if has_images(folder / name)]

    def _has_test(self) -> bool:
        return self._divided and (self._directory / "test").is_dir()

    def _is_divided(self) -> bool:
        """Whether DIR holds train and test instead of classes. Refuses ambiguous folders."""
        directory, folders = self._directory, visible_folders(self._directory)
        if "train" not in folders or not self._classes("train"):
            return False
        if has_images(directory / "train"):
            both = "holds both images and folders of images"
            raise ValueError(f"{directory}/train {both}, so it is neither a class nor a split; move one of the two away")
        extra = [name for name in folders if name not in ("train", "test")]
        if extra:
            fix = "only train and test are read, since validation images are drawn from train; move the others away"
            raise ValueError(f"{directory}/train holds class folders, but {directory}/{extra[0]} lies beside it: {fix}")
        return True
