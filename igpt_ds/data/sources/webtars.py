"""`webdataset:SPEC`: tars of images as written by img2dataset, on disk or from a command.

In: SPEC is a tar, a folder of tars, brace notation such as `web/{00000..00099}.tar`, or `pipe:COMMAND`, also with braces. Out: a
source. If only some tars have the word "test" in their names, these are "test"; all others are "train". A tar on disk is read by
seeking. A command runs again to read its images, from its start to the last requested image, so only a single pass is fast; copy
the tars if possible.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from igpt_ds.data.left_out import BESIDE, TORN, Tally, ending_of, why_not
from igpt_ds.data.sources.base import UNLABELLED, VAL_FRACTION, Entry, Result
from igpt_ds.data.sources.places import huge, read_places
from igpt_ds.data.sources.tar_names import expand, find, splits, stems
from igpt_ds.data.sources.tars import Member, TornError, Window, tar_window, walk
from igpt_ds.errors import InputError

_USUAL = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")  # preferred among the members of one key
_MOST_CLASSES = 1_000_000  # a larger class number is an error, and its class names would fill the memory


class _Image(NamedTuple):
    key: str
    ending: str
    label: int | None
    number: int  # of its member in the tar, from 0
    offset: int
    size: int


class WebTars:
    """Keys are `<tar>/<member key>`. As in webdataset, the member key is the name up to its first dot.

    Labels are the decimal numbers in `.cls` members. The classes are the lines of `classes.txt` beside the first tar, or "0" to
    the highest label, for which all tars are listed once. Without `.cls` members, or with labels "ignore", every label is 0, the
    class "unlabelled". Other members and other files beside the tars are counted. A torn tar among several is read up to the
    damage; the images after it are counted as lost.

    Raises:
        ValueError: SPEC names no tar, two tars of one name, a compressed tar, or the tars of a validation split among others.
            Listing raises it if the only tar is torn, a command fails, a key occurs twice, only some images are labelled, or a
            label has no class.
    """

    val_fraction = VAL_FRACTION

    def __init__(self, spec: str, labels: str = "use") -> None:
        self.name, self.labels = f"webdataset:{spec}", labels
        self._pipe = spec.startswith("pipe:")
        self._beside = Tally()  # what lies beside the tars
        self.urls = expand(spec.removeprefix("pipe:")) if self._pipe else find(spec, self._beside)
        self._stems = stems(self.urls, self._pipe)
        self.splits = splits(self.urls)
        self._highest: int | None = None  # the highest label, known after a complete listing
        self.left_out = Tally()

    @cached_property
    def classes(self) -> list[str]:
        """The names of the classes. May list all tars."""
        if not self.labelled:
            return UNLABELLED
        if self._class_file:
            return self._class_file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        if self._highest is None:
            for _ in self.entries():
                pass
        return [str(label) for label in range((self._highest or 0) + 1)]

    def entries(self) -> Iterator[Entry]:
        """Images tar by tar, in the order of SPEC; tars of a folder are sorted by name."""
        tally, torn = Tally(self._beside.rows()), dict[str, str]()
        highest, known = 0, len(self.classes) if self._class_file or not self.labelled else None
        counts = dict.fromkeys(self.urls, 0)
        tars = sorted(zip(self.urls, self._stems, self.splits, strict=True), key=lambda tar: tar[2] == "test")
        for url, stem, split in tars:
            for image in self._images(url, tally, torn):
                if (image.label is not None) != self.labelled:
                    fix = "label all or none, or add --labels ignore"
                    raise InputError(f"{url}: {image.key} {_has(image.label)} .cls member, unlike the first image; {fix}")
                label = image.label or 0
                if known is not None and label >= known:
                    raise InputError(f"{url}: {image.key} has the label {label}, but {self._class_file} names {known} classes")
                highest = max(highest, label)
                place = [url, image.number] if self._pipe else [url, image.offset, image.size]
                counts[url] += 1
                yield Entry(split, f"{stem}/{image.key}", label, place, image.ending)
        whole = [count for url, count in counts.items() if url not in torn]
        if not whole:
            raise InputError(next(iter(torn.values())))
        for url, error in torn.items():
            tally.add(error, TORN, n=max(1, round(sum(whole) / len(whole)) - counts[url]), ending="")
        self._highest, self.left_out = highest, tally

    def read(self, entries: Sequence[Entry]) -> Iterator[Result]:
        """The members' bytes. Entries of a command in ascending order need one run of it.

        Raises:
            ValueError: an entry names another tar or command than the spec. A list of images is data and runs nothing.
        """
        if foreign := {entry.place[0] for entry in entries} - set(self.urls):
            raise InputError(f"the list of images names {min(foreign)!r}, which {self.name} does not; list the images again")
        if not self._pipe:
            yield from read_places(Path(), entries)
            return
        for command, run in groupby(entries, key=lambda entry: entry.place[0]):
            numbers = [entry.place[1] for entry in run]
            while numbers:
                rise = next((i for i in range(1, len(numbers)) if numbers[i] <= numbers[i - 1]), len(numbers))
                yield from _members_of(command, numbers[:rise])
                numbers = numbers[rise:]

    def _images(self, url: str, tally: Tally, torn: dict[str, str]) -> Iterator[_Image]:
        """The images of one tar. Adds the error to `torn` if it is torn and not the only one."""
        opened: AbstractContextManager[Window] = _piped(url) if self._pipe else tar_window(Path(url))
        try:
            with opened as window:
                yield from _images(window, url, tally, self.labels == "use")
        except TornError as error:
            if len(self.urls) == 1:
                raise
            torn[url] = str(error)

    @cached_property
    def labelled(self) -> bool:
        """Whether the first image has a .cls member; all other images must match it."""
        if self.labels == "ignore":
            return False
        torn: dict[str, str] = {}
        first = next((image for url in self.urls for image in self._images(url, Tally(), torn)), None)
        if first is None:
            raise InputError(
                next(iter(torn.values()), f"{self.name} holds no images; expected members that end in .jpg, .jpeg, .png, .webp")
            )
        return first.label is not None

    @property
    def _class_file(self) -> Path | None:
        file = Path(self.urls[0]).parent / "classes.txt"
        return file if not self._pipe and file.is_file() else None


def _has(label: int | None) -> str:
    return "has no" if label is None else "has a"


def _images(window: Window, name: str, tally: Tally, labels: bool) -> Iterator[_Image]:
    """The images of one tar. Members of one image have the same name up to the first dot, and are adjacent."""
    seen: set[str] = set()
    members = ((number, member, *_key(member.name)) for number, member in enumerate(walk(window, name)))
    for key, group in groupby(members, key=lambda found: found[2]):
        found, label = list[tuple[bool, bool, int, Member]](), None
        for number, member, _, extension in group:
            if labels and extension == "cls":
                label = _label(window, member, name)
            elif reason := why_not(member.name):
                tally.add(member.name, reason, lost=False)
            else:  # the usual endings first, then those without a dot, as `jpg` before `seg.png`
                usual = extension.lower().rpartition(".")[2] in _USUAL
                found.append((not usual, "." in extension, number, member))
        if found:
            yield _chosen(found, key, name, tally, seen)._replace(label=label)
        elif label is not None:
            raise InputError(f"{name}: the label of {key} does not lie beside its image; pack the tar sorted by name")


def _chosen(found: list[tuple[bool, bool, int, Member]], key: str, name: str, tally: Tally, seen: set[str]) -> _Image:
    """The image among the members of one key that may be images. The others are counted."""
    found.sort()
    unusual, dotted, number, member = found[0]
    if key in seen or (not unusual and any(other[:2] == (unusual, dotted) for other in found[1:])):
        names = " and ".join(other[3].name for other in found[:2])
        raise InputError(f"{name} holds two images of the key {key!r}; give each a name of its own up to the first dot: {names}")
    seen.add(key)
    for other in found[1:]:
        tally.add(other[3].name, BESIDE, lost=False)
    return _Image(key, ending_of(member.name), None, number, member.offset, member.size)


def _key(name: str) -> tuple[str, str]:
    """`folder/12.jpg` -> (`folder/12`, `jpg`). The key of a hidden file ends in a slash, or is empty."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension if stem else ""


def _label(window: Window, member: Member, name: str) -> int:
    data = window.data(member).strip()
    if not data.isdigit():
        raise InputError(f"{name}: {member.name} holds {data[:20]!r} where a class number should stand")
    if len(data) > 9 or int(data) >= _MOST_CLASSES:
        raise InputError(f"{name}: {member.name} holds the class number {data[:20].decode()}; at most {_MOST_CLASSES - 1}")
    return int(data)


@contextmanager
def _piped(command: str) -> Iterator[Window]:
    """The output of a shell command. If it is read to its end, the command must succeed; otherwise the command is killed."""
    process = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    window = Window(process.stdout)
    try:
        try:
            yield window
        except ValueError:
            _check(window, process)  # if the command failed, that is the better error
            raise
        _check(window, process)
    finally:
        process.stdout.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the shell and its children
            process.wait()


def _check(window: Window, process: subprocess.Popen[bytes]) -> None:
    if window.ended and process.wait():
        failed = f"the command {process.args!r} failed with exit status {process.returncode}"
        raise InputError(f"{failed}; run it by hand to see why") from None


def _members_of(command: str, numbers: list[int]) -> Iterator[Result]:
    """The data of the members with these ascending numbers, in one run of the command."""
    left = iter(numbers)
    wanted: int | None = next(left)
    with _piped(command) as window:
        for number, member in enumerate(walk(window, command)):
            if number != wanted:
                continue
            error = huge(f"{command}: {member.name}", member.size)
            data = b"" if error else window.data(member)
            if len(data) != member.size and not error:
                raise InputError(f"{command} was cut in {member.name}; copy it again")
            yield error or data
            wanted = next(left, None)
            if wanted is None:
                return
        raise InputError(f"the command {command!r} gives no member {wanted} any more; it was changed after it was listed")
