"""The tars that the SPEC of `webdataset:SPEC` names: their paths, the splits and the parts of keys in their names.

In: SPEC. Out: paths or commands. Called by `sources/webtars.py`.
"""

from __future__ import annotations

import re
from itertools import groupby
from math import prod
from pathlib import Path
from shlex import quote

from braceexpand import braceexpand

from igpt_ds.data.left_out import HIDDEN, NO_TAR, Tally, why_not
from igpt_ds.data.sources.base import split_word
from igpt_ds.errors import InputError

_COMPRESSED = {"gz": "gunzip", "tgz": "gunzip", "bz2": "bunzip2", "tbz2": "bunzip2", "xz": "unxz", "txz": "unxz", "zst": "unzstd"}

_DOWNLOADS = dict.fromkeys(("http", "https", "ftp"), "curl -sfL {}") | {"s3": "aws s3 cp {} -", "gs": "gcloud storage cat {}"}
MAX_TARS = 1 << 20


def expand(spec: str) -> list[str]:
    """The commands or paths that braces stand for."""
    if not spec.strip():
        raise InputError("webdataset:pipe: names no command; write for example 'webdataset:pipe:cat web/{00000..00099}.tar'")
    if "{" not in spec:
        return [spec]
    ranges = re.findall(r"\{([-+]?\d{1,18})\.\.([-+]?\d{1,18})", spec)  # braceexpand makes them whole before it yields a name
    if prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > MAX_TARS or re.search(r"\.\.[-+]?\d{19}", spec):
        raise InputError(f"webdataset: the braces of {spec!r} stand for more than {MAX_TARS} tars; correct the range")
    try:
        return list(braceexpand(spec))
    except ValueError:
        raise InputError(f"webdataset: the braces of {spec!r} do not match; write for example {{00000..00099}}") from None


def find(spec: str, beside: Tally) -> list[str]:
    """The tars on disk that a spec names. What else lies in a folder of tars is counted."""
    if "://" in spec:
        command = _DOWNLOADS.get(spec.partition("://")[0].lower())
        fix = (
            f"write for example 'webdataset:pipe:{command.format(spec)}'"
            if command
            else "copy the tars to a disk and name them there"
        )
        raise InputError(f"webdataset:{spec} is not on disk; {fix}")
    path = Path(spec)
    if path.is_dir():
        tars = _tars_in(path, beside)
        if not tars:
            raise InputError(f"source directory {path} holds no tars; expected {path}/<name>.tar")
        return tars
    tars = [spec] if path.exists() else expand(spec)
    for tar in tars:
        if not Path(tar).is_file():
            what = "is not a file" if Path(tar).exists() else "does not exist"
            raise InputError(f"tar {tar} {what}; name a tar, a folder of tars, or several as {{00000..00099}}.tar")
    return tars


def _tars_in(path: Path, beside: Tally) -> list[str]:
    tars = []
    for file in sorted(path.iterdir()):
        name, reason = file.name, why_not(file.name)
        ending = name.lower().rpartition(".")[2]
        if reason == HIDDEN:
            beside.add(name, reason, lost=False)
        elif ending in _COMPRESSED and (ending.startswith("t") or ".tar." in name.lower()):
            fix = f"{_COMPRESSED[ending]} {quote(str(file))}"
            raise InputError(f"{file} is compressed, so its parts cannot be read; decompress it ({fix}), or move it away")
        elif ending == "tar":
            tars.append(str(file))
        elif file.is_dir() and any(below.suffix.lower() == ".tar" for below in file.iterdir()):
            raise InputError(f"{file} holds tars one folder too deep; move them to {path}, or name {file} as the source")
        elif not file.is_dir():
            beside.add(name, reason or NO_TAR, lost=reason is None)
    return tars


def splits(urls: list[str]) -> list[str]:
    """The split of each tar, by the words in which the names differ: validation tars are no training images.

    Raises:
        ValueError: some tars are named as validation images, and others are not.
    """
    parts = [set(re.split(r"[/\s]+", url)) for url in urls]
    shared = set.intersection(*parts)
    words = [split_word(" ".join(sorted(mine - shared))) for mine in parts]
    if len(set(words)) == 1:
        return ["train"] * len(urls)
    if "val" in words:
        val, other = (urls[next(i for i, word in enumerate(words) if (word == "val") == is_val)] for is_val in (True, False))
        fix = "validation images are drawn from the training images; name the tars of one split, as train-{00000..00099}.tar"
        raise InputError(f"the tars {other} and {val} are of different splits: {fix}")
    return ["test" if word == "test" else "train" for word in words]


def stems(urls: list[str], pipe: bool) -> list[str]:
    """The first part of the keys of each tar. For a command it is the last tar named in it, or its number."""
    if not pipe:
        stems = [Path(url).stem for url in urls]
        twice = sorted(stem for stem, same in groupby(sorted(stems)) if len(list(same)) > 1)
        if twice:
            raise InputError(f"two tars are called {twice[0]}.tar, so that keys would not be unique; give each a name of its own")
        return stems
    found = [re.findall(r"([^\s/'\"]+?)\.tar\b", url)[-1:] for url in urls]
    stems = [words[0] for words in found if words]
    return stems if len(set(stems)) == len(urls) else [str(number) for number in range(len(urls))]
