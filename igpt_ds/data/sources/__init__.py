"""Sources of raw images: a source lists its images and reads them, in a fixed order.

In: a spec such as `cifar10:DIR` or `imagefolder:DIR,test=DIR2`. Out: a `Source`. `tools/fit_palette.py` and
`data/shards/build.py` read sources. A new kind is a class in a file of this package and a line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from igpt_ds.data.sources.base import LABELS, Entry, Result, Source, Unlabelled, listing
from igpt_ds.data.sources.cifar import Cifar
from igpt_ds.data.sources.digits import Digits
from igpt_ds.data.sources.folders import ImageFolder
from igpt_ds.data.sources.held_out import WithTest
from igpt_ds.data.sources.imagenet import ImageNet
from igpt_ds.data.sources.names import dataset_name
from igpt_ds.data.sources.openai_arrays import OpenAIArrays
from igpt_ds.data.sources.stl10 import STL10
from igpt_ds.data.sources.webtars import WebTars
from igpt_ds.errors import InputError

__all__ = [
    "KINDS",
    "LABELS",
    "Entry",
    "ImageFolder",
    "OpenAIArrays",
    "Result",
    "Source",
    "dataset_name",
    "has_classes",
    "has_test_images",
    "listing",
    "open_source",
]

# The word before the colon -> the word for what follows, and the function that opens it with labels "use" or "ignore".
KINDS: dict[str, tuple[str, Callable[[str, str], Source]]] = {
    "imagenet": ("DIR", lambda rest, labels: ImageNet(Path(rest), labels)),
    "cifar10": ("PATH", lambda rest, labels: Cifar("cifar10", Path(rest))),
    "cifar100": ("PATH", lambda rest, labels: Cifar("cifar100", Path(rest))),
    "stl10": ("PATH", lambda rest, labels: STL10(Path(rest))),
    "imagefolder": ("DIR", lambda rest, labels: ImageFolder(Path(rest), labels)),
    "webdataset": ("SPEC", WebTars),
    "openai": ("PREFIX", OpenAIArrays),
    "digits": ("", lambda rest, labels: Digits()),
}


def _apart(train: Source, test: Source) -> tuple[Source, Source]:
    """The two sources, which must have no image in common."""
    one, other = (Path(source.name.partition(":")[2]).resolve() for source in (train, test))
    shared = one.is_relative_to(other) or other.is_relative_to(one)
    if isinstance(train, WebTars) and isinstance(test, WebTars):
        shared = shared or not set(train.urls).isdisjoint(test.urls)
    if shared:
        fix = "an image would be in two splits; move one of them out of the other"
        raise InputError(f"{test.name} and {train.name} are not apart, so {fix}")
    return train, test


def has_classes(source: Source) -> bool:
    """Whether images are labelled with at least two classes, which a probe needs. May list a source of class numbers."""
    return source.labelled if isinstance(source, WebTars) else len(source.classes) > 1


def has_test_images(source: Source) -> bool:
    """Whether some images are test images. Lists the source unless its tars tell."""
    if isinstance(source, WithTest | WebTars):
        return isinstance(source, WithTest) or "test" in source.splits
    return any(entry.split == "test" for entry in listing(source))


def open_source(spec: str, labels: str = "use") -> Source:
    """Opens `KIND:WHERE`, for example `imagefolder:photos`. Reads no image. With labels "ignore" no image needs a label.

    Raises:
        ValueError: the kind is unknown, its files are missing or contradict each other, or test images are among the others.
    """
    assert labels in LABELS
    kind, colon, rest = spec.partition(":")
    train, found, test = rest.rpartition(",test=")
    if found and kind != "openai" and not Path(rest).exists():
        return WithTest(spec, *_apart(*(open_source(f"{kind}:{where}", labels) for where in (train, test))))
    if not colon or kind not in KINDS or bool(rest) != bool(KINDS[kind][0]):
        known = ", ".join(f"{name}:{where}" for name, (where, _) in KINDS.items())
        raise InputError(f"source {spec!r} is unknown; known: {known}")
    source = KINDS[kind][1](rest, labels)
    return source if source.labels == labels else Unlabelled(source)
