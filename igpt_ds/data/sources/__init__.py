"""Sources of raw images: a source lists its images and reads them, in a fixed order.

In: a spec such as `cifar10:DIR`. Out: a `Source`. `tools/fit_palette.py` and `data/shards/build.py` read sources. A new kind is a
class in a file of this package and a line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from igpt_ds.data.sources.base import LABELS, Entry, Result, Source, Unlabelled
from igpt_ds.data.sources.cifar import Cifar
from igpt_ds.data.sources.digits import Digits
from igpt_ds.data.sources.folders import ImageFolder
from igpt_ds.data.sources.imagenet import ImageNet
from igpt_ds.data.sources.stl10 import STL10
from igpt_ds.data.sources.webtars import WebTars
from igpt_ds.errors import InputError

__all__ = ["KINDS", "LABELS", "Entry", "ImageFolder", "Result", "Source", "open_source"]

# The word before the colon -> the word for what follows, and the function that opens it with labels "use" or "ignore".
KINDS: dict[str, tuple[str, Callable[[str, str], Source]]] = {
    "imagenet": ("DIR", lambda rest, labels: ImageNet(Path(rest), labels)),
    "cifar10": ("PATH", lambda rest, labels: Cifar("cifar10", Path(rest))),
    "cifar100": ("PATH", lambda rest, labels: Cifar("cifar100", Path(rest))),
    "stl10": ("PATH", lambda rest, labels: STL10(Path(rest))),
    "imagefolder": ("DIR", lambda rest, labels: ImageFolder(Path(rest), labels)),
    "webdataset": ("SPEC", WebTars),
    "digits": ("", lambda rest, labels: Digits()),
}


def open_source(spec: str, labels: str = "use") -> Source:
    """Opens `KIND:WHERE`, for example `imagefolder:photos`. Reads no image. With labels "ignore" no image needs a label.

    Raises:
        ValueError: the kind is unknown, or its files are missing or contradict each other.
    """
    assert labels in LABELS
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in KINDS or bool(rest) != bool(KINDS[kind][0]):
        known = ", ".join(f"{name}:{where}" for name, (where, _) in KINDS.items())
        raise InputError(f"source {spec!r} is unknown; known: {known}")
    source = KINDS[kind][1](rest, labels)
    return source if source.labels == labels else Unlabelled(source)
