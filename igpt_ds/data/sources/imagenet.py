"""`imagenet:DIR`: ILSVRC2012 as published, or as usually unpacked.

In, training set: `DIR/train/<wnid>/*.JPEG` or `DIR/ILSVRC2012_img_train.tar`, a tar with one tar per class, which is read without
unpacking. In, validation set (optional): `DIR/val/<wnid>/*.JPEG`; or `DIR/val/*.JPEG` or `DIR/ILSVRC2012_img_val.tar` with ground
truth (`sources/imagenet_truth.py`). DIR may be the root of Kaggle's download. Out: a source whose "test" is the validation set,
as in paper 3.1. The unlabelled test set is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from igpt_ds.data.left_out import DEEP, LOOSE, UNLABELLED_TEST, Tally, why_not
from igpt_ds.data.sources.base import UNLABELLED, Entry, Result, has_images, scan, visible_folders, walk_images
from igpt_ds.data.sources.imagenet_truth import Truth
from igpt_ds.data.sources.places import open_binary, read_places
from igpt_ds.data.sources.tars import Member, Window, tar_window, walk
from igpt_ds.errors import InputError

_KAGGLE = Path("ILSVRC/Data/CLS-LOC")
_TRAIN_TAR = "ILSVRC2012_img_train.tar"
_VAL_TAR = "ILSVRC2012_img_val.tar"


class ImageNet:
    """Classes are the wnids, sorted by name as in torchvision; keys are `train/<wnid>/<file>` and `val/<file>`.

    Raises:
        ValueError: there are no images, or validation images have no ground truth. Listing raises it if a tar is truncated, a
            class is empty, or a validation image has no ground truth or a class that the training set lacks.
    """

    val_fraction = 0.04  # paper 3.1: "we use 4% as our experimental validation set"

    def __init__(self, directory: Path, labels: str = "use") -> None:
        self.name, self.labels = f"imagenet:{directory}", labels
        self.left_out = Tally()
        root = self._root = directory / _KAGGLE if (directory / _KAGGLE).is_dir() else directory
        self._train_folder = (root / "train").is_dir()
        self._train_tar = not self._train_folder and (root / _TRAIN_TAR).is_file()
        self._val_folder = (root / "val").is_dir()
        val_tar = not self._val_folder and (root / _VAL_TAR).is_file()
        if not (self._train_folder or self._train_tar or self._val_folder or val_tar):
            known = f"train/<wnid>/*.JPEG, {_TRAIN_TAR}, val/*.JPEG or {_VAL_TAR}"
            raise InputError(f"source directory {directory} holds no ImageNet; expected in it {known}")
        loose = self._val_folder and has_images(root / "val")
        if loose and labels == "use" and visible_folders(root / "val"):
            raise InputError(
                f"{root}/val holds both loose images and class folders; finish moving them, or move one of the two away"
            )
        self._flat_val = loose or val_tar
        images = root / ("val" if loose else _VAL_TAR)
        self._truth = Truth.find((directory, root), images) if self._flat_val and labels == "use" else None

    @cached_property
    def classes(self) -> list[str]:
        """The wnids of the training set, or of the validation set if there is no training set."""
        return UNLABELLED if self.labels == "ignore" else self._wnids

    @cached_property
    def _wnids(self) -> list[str]:
        if self._train_folder:
            return visible_folders(self._root / "train")
        if self._train_tar:
            return [member.name.removesuffix(".tar") for member in self._class_tars]
        return visible_folders(self._root / "val") if self._truth is None else sorted(set(self._truth.wnids.values()))

    def entries(self) -> Iterator[Entry]:
        """The training set class by class, then the validation set; images by name. Memory holds one folder or tar of names."""
        self.left_out = Tally()
        if (self._root / "test").is_dir():
            self.left_out.add("test", UNLABELLED_TEST, lost=False)
        labels = {} if self.labels == "ignore" else {wnid: label for label, wnid in enumerate(self._wnids)}
        if self._train_folder:
            yield from self._folders("train", "train", labels)
        elif self._train_tar:
            yield from self._tar_of_tars(labels)
        if self._flat_val and (self._truth or not self._val_folder):
            for name, place in self._val_places():
                label = self._label(self._truth.wnid(name), labels, f"the image val/{name}") if self._truth else 0
                yield Entry("test", f"val/{name}", label, place)
        elif self._val_folder:
            yield from self._folders("test", "val", labels)

    def read(self, entries: Sequence[Entry]) -> Iterator[Result]:
        """The JPEG files' bytes."""
        return read_places(self._root, entries)

    def _label(self, wnid: str, labels: dict[str, int], what: str) -> int:
        if self.labels == "ignore":
            return 0
        if wnid not in labels:
            raise InputError(
                f"{self._root}: {what} is of the class {wnid}, which the training set lacks; add or remove the class"
            )
        return labels[wnid]

    def _folders(self, split: str, below: str, labels: dict[str, int]) -> Iterator[Entry]:
        if self.labels == "ignore":
            for path in walk_images(self._root, below, self.left_out):
                yield Entry(split, path if split == "train" else f"{below}/{path.rpartition('/')[2]}", 0, [path])
            return
        loose, folders = scan(self._root, below, self.left_out)
        for path in loose:
            self.left_out.add(path, LOOSE)
        for folder in folders:
            label = self._label(folder.rpartition("/")[2], labels, f"the folder {folder}")
            images, deeper = scan(self._root, folder, self.left_out)
            if not images:
                raise InputError(f"{self._root}/{folder} holds no images; fill it or remove it")
            for path in images:
                yield Entry(split, path if split == "train" else f"{below}/{path.rpartition('/')[2]}", label, [path])
            for deep in deeper:
                for path in walk_images(self._root, deep, self.left_out):
                    self.left_out.add(path, DEEP)

    @cached_property
    def _class_tars(self) -> list[Member]:
        """The tars in the tar of the training set, by name."""
        path = self._root / _TRAIN_TAR
        with tar_window(path) as window:
            members = sorted(walk(window, str(path)))
        wrong = [member.name for member in members if not member.name.endswith(".tar")]
        if wrong or not members:
            raise InputError(f"{path} holds {wrong[0] if wrong else 'nothing'}, expected only <wnid>.tar; download it again")
        return members

    def _tar_of_tars(self, labels: dict[str, int]) -> Iterator[Entry]:
        with open_binary(self._root / _TRAIN_TAR) as file:
            for tar in self._class_tars:
                wnid = tar.name.removesuffix(".tar")
                window = Window(file, tar.offset, tar.size)
                images = _images(window, f"{self._root / _TRAIN_TAR} ({tar.name})", self.left_out)
                if not images:
                    raise InputError(f"{self._root / _TRAIN_TAR} ({tar.name}) holds no images; download it again")
                for image in images:
                    yield Entry(
                        "train",
                        f"train/{wnid}/{image.name}",
                        self._label(wnid, labels, tar.name),
                        [_TRAIN_TAR, image.offset, image.size],
                    )

    def _val_places(self) -> Iterator[tuple[str, list[str | int]]]:
        """Name and place of each image outside class folders."""
        if self._val_folder:
            for path in scan(self._root, "val", self.left_out)[0]:
                yield path.removeprefix("val/"), [path]
            return
        with tar_window(self._root / _VAL_TAR) as window:
            images = _images(window, str(self._root / _VAL_TAR), self.left_out)
        for image in images:
            yield image.name, [_VAL_TAR, image.offset, image.size]


def _images(window: Window, name: str, tally: Tally) -> list[Member]:
    """The images of one tar by name; ImageNet's largest has 50,000."""
    found = []
    for member in walk(window, name):
        if reason := why_not(member.name):
            tally.add(member.name, reason, lost=False)
        else:
            found.append(member._replace(name=member.name.rpartition("/")[2]))
    return sorted(found)
