"""`webdataset:SPEC`: tars of JPEG, PNG or WebP files as written by img2dataset, on disk or from a command.

In: SPEC is a tar, a folder of tars, brace notation such as `web/{00000..00099}.tar`, or `pipe:COMMAND`, also with braces. Out: a
source whose images are all "train". A tar on disk is read by seeking. A command runs again to read its images, from its start to
the last requested image, so only a single pass is fast; copy the tars if possible.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from igpt_ds.data.sources.base import VAL_FRACTION, Entry, Result
from igpt_ds.data.sources.places import read_places
from igpt_ds.data.sources.tars import Member, Window, tar_window, walk

_IMAGES = ("jpg", "jpeg", "png", "webp")
_MOST_CLASSES = 1_000_000  # a larger class number is an error, and its class names would fill the memory


class _Image(NamedTuple):
    key: str
    label: int | None
    number: int  # of its member in the tar, from 0
    offset: int
    size: int


class WebTars:
    """Keys are `<tar>/<member key>`; as in webdataset, the member key is the name up to its first dot.

    Labels are the decimal numbers in `.cls` members. The classes are the lines of `classes.txt` beside the first tar, or "0" to
    the highest label, for which all tars are listed once. Without `.cls` members every label is 0, the class "unlabelled". Other
    members, and other files of img2dataset beside the tars, are ignored.

    Raises:
        ValueError: SPEC names no tar, or two tars of one name. Listing raises it if a tar is truncated, a command fails, a key
            occurs twice, only some images are labelled, or a label has no class.
    """

    val_fraction = VAL_FRACTION

    def __init__(self, spec: str) -> None:
        self.name = f"webdataset:{spec}"
        self._pipe = spec.startswith("pipe:")
        self._urls = _expand(spec.removeprefix("pipe:")) if self._pipe else _find(spec)
        self._stems = _stems(self._urls, self._pipe)
        self._highest: int | None = None  # the highest label, known after a complete listing

    @cached_property
    def classes(self) -> list[str]:
        """The names of the classes. May list all tars."""
        if not self._labelled:
            return ["unlabelled"]
        if self._class_file:
            return self._class_file.read_text().splitlines()
        if self._highest is None:
            for _ in self.entries():
                pass
        return [str(label) for label in range((self._highest or 0) + 1)]

    def entries(self) -> Iterator[Entry]:
        """Images tar by tar, in the order of SPEC; tars of a folder are sorted by name."""
        highest, known = 0, len(self.classes) if self._class_file or not self._labelled else None
        for url, stem in zip(self._urls, self._stems, strict=True):
            for image in self._images(url):
                if (image.label is not None) != self._labelled:
                    raise ValueError(
                        f"{url}: {image.key} {_has(image.label)} .cls member, unlike the first image; label all or none"
                    )
                label = image.label or 0
                if known is not None and label >= known:
                    raise ValueError(f"{url}: {image.key} has the label {label}, but {self._class_file} names {known} classes")
                highest = max(highest, label)
                place = [url, image.number] if self._pipe else [url, image.offset, image.size]
                yield Entry("train", f"{stem}/{image.key}", label, place)
        self._highest = highest

    def read(self, entries: Sequence[Entry]) -> Iterator[Result]:
        """The members' bytes. Entries of a command in ascending order need one run of it.

        Raises:
            ValueError: an entry names another tar or command than the spec. A list of images is data and runs nothing.
        """
        if foreign := {entry.place[0] for entry in entries} - set(self._urls):
            raise ValueError(f"the list of images names {min(foreign)!r}, which {self.name} does not; list the images again")
        if not self._pipe:
            yield from read_places(Path(), entries)
            return
        for command, run in groupby(entries, key=lambda entry: entry.place[0]):
            numbers = [entry.place[1] for entry in run]
            while numbers:
                rise = next((i for i in range(1, len(numbers)) if numbers[i] <= numbers[i - 1]), len(numbers))
                yield from _members_of(command, numbers[:rise])
                numbers = numbers[rise:]

    def _images(self, url: str) -> Iterator[_Image]:
        opened: AbstractContextManager[Window] = _piped(url) if self._pipe else tar_window(Path(url))
        with opened as window:
            yield from _images(window, url)

    @cached_property
    def _labelled(self) -> bool:
        """Whether the first image has a .cls member; all other images must match it."""
        first = next((image for url in self._urls for image in self._images(url)), None)
        if first is None:
            raise ValueError(f"{self.name} holds no images; expected members that end in .{', .'.join(_IMAGES)}")
        return first.label is not None

    @property
    def _class_file(self) -> Path | None:
        file = Path(self._urls[0]).parent / "classes.txt"
        return file if not self._pipe and file.is_file() else None


def _has(label: int | None) -> str:
    return "has no" if label is None else "has a"


def _images(window: Window, name: str) -> Iterator[_Image]:
    """The images of one tar. Members of one image have the same name up to the first dot, and are adjacent."""
    seen: set[str] = set()
    members = ((number, member, *_key(member.name)) for number, member in enumerate(walk(window, name)))
    for key, group in groupby(members, key=lambda found: found[2]):
        image, label, other = None, None, ""
        for number, member, _, extension in group:
            if extension.lower() in _IMAGES:
                if key in seen or image:
                    raise ValueError(f"{name} holds two images of the key {key!r}; give each a name of its own")
                image = _Image(key, None, number, member.offset, member.size)
            elif extension == "cls":
                label = _label(window, member, name)
            elif extension.lower().rpartition(".")[2] in _IMAGES:
                other = member.name
        if image is not None:
            seen.add(key)
            yield image._replace(label=label)
        elif label is not None:
            raise ValueError(f"{name}: the label of {key} does not lie beside its image; pack the tar sorted by name")
        elif other and key.rpartition("/")[2]:
            raise ValueError(f"{name}: {other} has a dot inside its name, where webdataset ends the key; rename it")


def _key(name: str) -> tuple[str, str]:
    """`folder/12.jpg` -> (`folder/12`, `jpg`). The key of a hidden file ends in a slash, or is empty."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension if stem else ""


def _label(window: Window, member: Member, name: str) -> int:
    data = window.data(member).strip()
    if not data.isdigit():
        raise ValueError(f"{name}: {member.name} holds {data[:20]!r} where a class number should stand")
    if len(data) > 9 or int(data) >= _MOST_CLASSES:
        raise ValueError(f"{name}: {member.name} holds the class number {data[:20].decode()}; at most {_MOST_CLASSES - 1}")
    return int(data)


def _expand(spec: str) -> list[str]:
    if not spec.strip():
        raise ValueError("webdataset:pipe: names no command; write for example 'webdataset:pipe:cat web/{00000..00099}.tar'")
    if "{" not in spec:
        return [spec]
    try:
        return list(braceexpand(spec))
    except ValueError:
        raise ValueError(f"webdataset: the braces of {spec!r} do not match; write for example {{00000..00099}}") from None


def _find(spec: str) -> list[str]:
    """The tars on disk that a spec names."""
    if "://" in spec:
        raise ValueError(f"webdataset:{spec} is not on disk; write for example 'webdataset:pipe:curl -sfL {spec}'")
    path = Path(spec)
    if path.is_dir():
        tars = sorted(str(file) for file in path.glob("*.tar") if not file.name.startswith("."))
        if not tars:
            raise ValueError(f"source directory {path} holds no tars; expected {path}/<name>.tar")
        return tars
    tars = [spec] if path.exists() else _expand(spec)
    for tar in tars:
        if not Path(tar).is_file():
            raise ValueError(f"tar {tar} does not exist; name a tar, a folder of tars, or several as {{00000..00099}}.tar")
    return tars


def _stems(urls: list[str], pipe: bool) -> list[str]:
    """The first part of the keys of each tar. For a command it is the last tar named in it, or its number."""
    if not pipe:
        stems = [Path(url).stem for url in urls]
        twice = sorted(stem for stem, same in groupby(sorted(stems)) if len(list(same)) > 1)
        if twice:
            raise ValueError(f"two tars are called {twice[0]}.tar, so that keys would not be unique; give each a name of its own")
        return stems
    found = [re.findall(r"([^\s/'\"]+?)\.tar\b", url)[-1:] for url in urls]
    stems = [words[0] for words in found if words]
    return stems if len(set(stems)) == len(urls) else [str(number) for number in range(len(urls))]


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
        raise ValueError(f"{failed}; run it by hand to see why") from None


def _members_of(command: str, numbers: list[int]) -> Iterator[bytes]:
    """The data of the members with these ascending numbers, in one run of the command."""
    left = iter(numbers)
    wanted: int | None = next(left)
    with _piped(command) as window:
        for number, member in enumerate(walk(window, command)):
            if number != wanted:
                continue
            data = window.data(member)
            if len(data) != member.size:
                raise ValueError(f"{command} was cut in {member.name}; copy it again")
            yield data
            wanted = next(left, None)
            if wanted is None:
                return
        raise ValueError(f"the command {command!r} gives no member {wanted} any more; it was changed after it was listed")
