"""The classes of the validation images of ILSVRC2012, which the images do not contain.

In: `LOC_val_solution.csv` (Kaggle), or the development kit `ILSVRC2012_devkit_t12` as folder or .tar.gz. Out: file name -> wnid.
Called by `sources/imagenet.py`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from igpt_ds.data.sources.archives import find_files
from igpt_ds.data.sources.places import open_binary
from igpt_ds.errors import InputError

_CSV = "LOC_val_solution.csv"
_KIT = "ILSVRC2012_devkit_t12"
_NUMBERS = "ILSVRC2012_validation_ground_truth.txt"  # line n is the ILSVRC2012_ID of ILSVRC2012_val_<n>.JPEG
_META = "meta.mat"  # ILSVRC2012_ID -> wnid


class Truth:
    """The ground truth in one file or folder, read on first use."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def find(cls, directories: Sequence[Path], images: Path) -> Truth:
        """The first ground truth in these directories, for the images at `images`.

        Raises:
            ValueError: there is no ground truth.
        """
        for directory in directories:
            for path in (directory / _CSV, directory / _KIT, directory / f"{_KIT}.tar.gz"):
                if path.exists():
                    return cls(path)
        lacking = f"no ground truth for them lies in {' or '.join(sorted({str(path) for path in directories}))}"
        fix = f"put {_CSV} (Kaggle) or {_KIT}.tar.gz (image-net.org) there, sort the images into class folders, or move them away"
        raise InputError(f"{images} holds validation images, but {lacking}; {fix}")

    def wnid(self, file: str) -> str:
        """The class of an image by its file name.

        Raises:
            ValueError: the ground truth does not have the image.
        """
        stem = file.rpartition(".")[0]
        if stem not in self.wnids:
            raise InputError(f"{self._path} has no class for the image {file}; remove the image or complete the ground truth")
        return self.wnids[stem]

    @cached_property
    def wnids(self) -> dict[str, str]:
        """File name without extension -> wnid, for every image.

        Raises:
            ValueError: the file has another format than its name says.
        """
        if self._path.name == _CSV:
            return self._from_csv()
        folder = self._path / "data" if (self._path / "data").is_dir() else self._path
        files = find_files(folder, {_KIT: (_NUMBERS, _META)})
        numbers = files.read(_NUMBERS).split()
        wnids = _wnids_by_number(files.read(_META), files.full_name(_META))
        unknown = [number for number in numbers if number not in wnids]
        if unknown:
            raise InputError(
                f"{files.full_name(_NUMBERS)} holds {unknown[0]!r}, a class number that {_META} lacks; download it again"
            )
        return {f"ILSVRC2012_val_{line:08d}": wnids[number] for line, number in enumerate(numbers, start=1)}

    def _from_csv(self) -> dict[str, str]:
        with open_binary(self._path) as file:
            rows = list(csv.DictReader(io.StringIO(file.read().decode("utf-8", "replace"))))
        try:
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
        except (KeyError, IndexError, AttributeError):
            raise InputError(f"{self._path} is not a table of ImageId,PredictionString; download it again") from None


def _wnids_by_number(data: bytes, name: str) -> dict[bytes, str]:
    """ILSVRC2012_ID (decimal digits) -> wnid."""
    from scipy.io import loadmat  # lazily: only the development kit needs it

    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"].reshape(-1)
        return {b"%d" % int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    except Exception as error:  # loadmat raises nearly anything on a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{name} cannot be read as the development kit's table of classes: {reason}; download it again"
        ) from None
