"""The name of the images of a source, in tables, figures and result rows.

In: a spec such as `imagefolder:photos`. Out: its name: that of the folder, or of the data set if the kind is one.
`tools/make_shards.py` and the paper's stages use it where --name gives no other.
"""

from __future__ import annotations

import re
from pathlib import Path

from igpt_ds.data.sources.base import split_word
from igpt_ds.data.sources.openai_arrays import find_prefix


def dataset_name(spec: str) -> str:
    """`imagefolder:my/photos` -> "photos", `cifar10:batches` -> "cifar10", `webdataset:web/{00..99}.tar` -> "web"."""
    kind, _, where = spec.partition(":")
    where = where.rsplit(",test=", 1)[0]
    name = {"imagefolder": _folder, "webdataset": _tars, "openai": lambda prefix: find_prefix(prefix).name}.get(
        kind, lambda _: kind
    )(where)
    return name or kind


def _folder(where: str) -> str:
    return Path(where).resolve().name


def _tars(where: str) -> str:
    """The folder of tars, or the tar's own name, unless that is a number or a split: then its folder."""
    if where.startswith("pipe:"):
        found = re.findall(r"([^\s'\"]*)\.tar\b", where)
        where = found[-1] + ".tar" if found else ""
    if where and not where.endswith(".tar"):
        return _folder(where)
    folder, _, file = where.rpartition("/")
    stem = re.split(r"[{*?]", file.removesuffix(".tar"))[0].strip("-_. ")
    if re.search(r"[^\W\d_]", stem) and split_word(stem) is None:
        return stem
    name = _folder(folder or ".") if where else ""
    return "" if "{" in name or ":" in name else name
