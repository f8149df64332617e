"""What a source leaves out, and why: the one rule of which files are tried as images, and the count of all others.

In: file names and reasons. Out: `LeftOut` rows, which make_shards prints and index.json stores. The sources, `data/images.py`,
`data/shards/` and `tools/fit_palette.py` use it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TextIO

from igpt_ds.errors import InputError

# Endings and names of files that are something else. Any other file is tried as an image: no list says what an image is.
_OTHER_TEXTS = (
    "txt json jsonl csv tsv md rst cls xml yaml yml toml html htm pdf doc docx xls xlsx log ini cfg db sh py m ipynb xmp aae"
)
_OTHER_ARRAYS = (
    "pyc pyd npy npz mat h5 hdf5 pt pth ckpt safetensors pkl pickle parquet arrow feather lmdb mdb msgpack idx lst lock"
)
_OTHER_MEDIA = "mp4 avi mov mkv webm mp3 wav flac tar tgz gz bz2 xz zst zip rar 7z md5 sha1 sha256"
_OTHER_ENDINGS = frozenset(f".{word}" for word in f"{_OTHER_TEXTS} {_OTHER_ARRAYS} {_OTHER_MEDIA}".split())
_OTHER_NAMES = frozenset({"readme", "license", "licence", "copying", "makefile", "md5sums", "sha256sums", "icon\r"})

NOT_IMAGE = "not images by name"
HIDDEN = "hidden"
LOOSE = "beside the class folders"
DEEP = "deeper than a class folder"
DANGLING = "dangling links"
ABOVE = "links to a folder above"
SPECIAL = "fifos, sockets or devices"
UNLABELLED_TEST = "test sets without labels"
NO_TAR = "not in a tar"
TORN = "images in torn tars, estimated"
BESIDE = "beside an image of the same key"
COPY = "also a test or validation image"
EMPTY_CLASS = "classes without images"
UNREADABLE = "cannot be read"
UNDECODABLE = "cannot be decoded"
EMPTY = "empty"
HUGE = "files above 1 GiB"
TOO_LARGE = "too many pixels"

_NAMES = {EMPTY_CLASS: 1000, TORN: 1000}  # names that are kept for a reason
_FEW = 5  # names that are kept for any other reason, and rows in an error
_MOST_ROWS = 200  # (ending, reason) pairs; further endings count as one
_LONGEST = 12  # characters of an ending


class BadImageError(InputError):
    """An image that cannot be used, with the reason to count it by."""

    def __init__(self, message: str, reason: str = UNDECODABLE) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImageError], tuple[str, str]]:
        return type(self), (str(self), self.reason)  # it travels from worker processes


def reason_of(error: ValueError) -> str:
    """The reason to count an image by."""
    return error.reason if isinstance(error, BadImageError) else UNDECODABLE


@dataclass(frozen=True)
class LeftOut:
    """Files of one ending (lower case, "" for none) that are left out for one reason.

    names: the first of them. lost: whether they may be images, which --max_bad limits.
    """

    ending: str
    reason: str
    n: int
    names: list[str]
    lost: bool

    def __str__(self) -> str:
        more = ", ..." if self.n > len(self.names) and self.reason != TORN else ""
        kind = f" {self.ending}" if self.ending else ""
        return f"{self.reason}: {self.n}{kind} ({', '.join(self.names)}{more})".replace("\n", "\\n")  # one row is one line


def ending_of(name: str) -> str:
    """`a/B.v2.JPG` -> ".jpg"; "" where the name has none. A very long one counts as none."""
    stem, dot, ending = name.rpartition("/")[2].rpartition(".")
    return f".{ending.lower()}" if dot and stem and len(ending) < _LONGEST else ""


def why_not(name: str) -> str | None:
    """The reason why a file of this name is not tried as an image, or None if it is tried."""
    file = name.rpartition("/")[2]
    if file.startswith("."):
        return HIDDEN
    return NOT_IMAGE if ending_of(file) in _OTHER_ENDINGS or file.lower() in _OTHER_NAMES else None


def print_left_out(rows: Iterable[LeftOut], to: TextIO | None = None) -> None:
    """Prints one line for each ending and reason, with the first names; `to` None is standard output."""
    for row in rows:
        print(f"left out    {row}", file=to)


class Tally:
    """Counts what is left out. Memory stays constant."""

    def __init__(self, rows: Iterable[LeftOut] = ()) -> None:
        self.n_lost = 0
        self._rows: dict[tuple[str, str], tuple[list[int], list[str], bool]] = {}
        for row in rows:
            self._rows.setdefault((row.ending, row.reason), ([0], [], row.lost))
            for name in row.names:
                self.add(name, row.reason, n=0, ending=row.ending)
            self.add("", row.reason, lost=row.lost, n=row.n, ending=row.ending)

    def add(self, name: str, reason: str, *, lost: bool = True, n: int = 1, ending: str | None = None) -> None:
        """Counts `n` files, of which `name` is one. `ending` replaces that of the name."""
        key = (ending_of(name) if ending is None else ending, reason)
        row = self._rows.get(key)
        if row is None:
            if len(self._rows) >= _MOST_ROWS:
                key = (".*", reason)
            row = self._rows.setdefault(key, ([0], [], lost))
        row[0][0] += n
        self.n_lost += n * lost
        if name and len(row[1]) < _NAMES.get(reason, _FEW):
            row[1].append(name)

    def rows(self) -> list[LeftOut]:
        """What was counted: lost files first, then by number."""
        rows = [LeftOut(ending, reason, n, names, lost) for (ending, reason), ((n,), names, lost) in self._rows.items()]
        return sorted(rows, key=lambda row: (not row.lost, -row.n, row.ending, row.reason))

    def check(self, source: str, n_listed: int, max_bad: float) -> None:
        """Refuses a source that loses too much before any image is read.

        Raises:
            ValueError: more than the fraction max_bad is lost.
        """
        total = n_listed + self.n_lost
        if self.n_lost > max_bad * total:
            rows = [str(row) for row in self.rows() if row.lost]
            lost = "; ".join(rows[:_FEW] + [f"{len(rows) - _FEW} more kinds"] * (len(rows) > _FEW))
            fix = "repair or move them, or raise --max_bad"
            if any(row.reason in (LOOSE, DEEP) for row in self.rows()):
                fix = "move them into class folders, take images at any depth with --labels ignore, or raise --max_bad"
            allowed = f"more than the {max_bad:g} of {total} images that --max_bad allows"
            raise InputError(f"{source}: {self.n_lost} left out, {allowed}: {lost}; {fix}")
