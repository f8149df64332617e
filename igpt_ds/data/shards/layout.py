"""Assigns images to shards from the source's list of names, before any image is read.

In: a source and the settings. Out: a directory {plan.json, train-000000.jsonl, ...} with one file of entries per shard.
Called by `data/shards/build.py`. Names are read one at a time, so memory does not grow with the source.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from tqdm import tqdm

from igpt_ds.data.images import CROPS, DEFAULT_FILTER, FILTERS
from igpt_ds.data.left_out import LeftOut
from igpt_ds.data.palette import Palette
from igpt_ds.data.shards.encode import CropSpec
from igpt_ds.data.shards.index import SPLITS
from igpt_ds.data.shards.record import MAX_IMAGES
from igpt_ds.data.sources import Entry, OpenAIArrays, Source
from igpt_ds.data.sources.copies import hashed
from igpt_ds.errors import InputError
from igpt_ds.files import atomic_dir, sha256_file
from igpt_ds.schema import record_from
from igpt_ds.sealed import Format

PLAN = Format("igpt_ds.plan", "plan", "remove its directory and begin again", version=1, sealed=1, oldest=1)
IMAGES_PER_SHARD = 16384  # 64 MiB of 32x32 images, 160 MiB of 64x64
_FRACTIONS = {"train": ("val_fraction", "test_fraction"), "val": ("val_fraction",), "test": ("test_fraction",)}
MAX_PX = 1024  # a million tokens per image; the paper's largest images have 4,096


@dataclass(frozen=True)
class Part:
    """The share of one job: part i of n, 0 <= i < n."""

    i: int = 0
    n: int = 1

    def __str__(self) -> str:
        return f"{self.i}/{self.n}"

    def check(self) -> None:
        """Refuses a part that does not exist.

        Raises:
            ValueError: i is not one of 0 .. n - 1.
        """
        if not 0 <= self.i < self.n:
            raise InputError(f"part {self} does not exist; the first of n is 0/n, the last n-1/n")


WHOLE = Part()  # one job makes all shards


@dataclass(frozen=True)
class ShardOptions:
    """How a source becomes shards.

    n_px: side of the square images.
    val_fraction: fraction of the training images, chosen by a hash of the key, that becomes the split "val"; 0 makes no such
        split. None means the source's own fraction: 10 % for CIFAR and STL-10, 4 % for ImageNet (paper 3.1).
    seed: of the split and the random crops.
    test_fraction: fraction of the training images that becomes the split "test", for a source without test images. With it, all
        splits are chosen by a hash of the file instead of the key, so that equal files are in one split.
    filter, crop, views: the resizing filter (None: not known), how an image becomes a square, random crops per training image.
    max_pixels: the largest image, or None for PIL's limit against decompression bombs.
    """

    n_px: int
    val_fraction: float | None = None
    images_per_shard: int = IMAGES_PER_SHARD
    seed: int = 0
    filter: str | None = DEFAULT_FILTER
    crop: str = "none"
    views: int = 1
    max_pixels: int | None = None
    test_fraction: float | None = None

    def __post_init__(self) -> None:
        for name in ("val_fraction", "test_fraction"):
            if (share := getattr(self, name)) is not None and not 0 <= share < 1:
                raise InputError(f"{name}={share} must be at least 0 and below 1")
        for name in ("n_px", "images_per_shard", "views", "max_pixels"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_px > MAX_PX:
            raise InputError(f"n_px={self.n_px} must be at most {MAX_PX}")
        if self.filter not in (*FILTERS, None):
            raise InputError(f"filter {self.filter!r} is unknown; known: {', '.join(FILTERS)}")
        if self.crop not in CROPS:
            raise InputError(f"crop {self.crop!r} is unknown; known: {', '.join(CROPS)}")
        if self.views > 1 and self.crop != "random":
            raise InputError(f"views={self.views} of one image differ with crop 'random' only, not {self.crop!r}")
        if self.views > self.images_per_shard:
            raise InputError(f"views={self.views} do not fit images_per_shard={self.images_per_shard}")

    def settings(self, source: Source, palette: Palette) -> ShardSettings:
        """The options together with the source and the palette."""
        options = asdict(self) | ({"val_fraction": source.val_fraction} if self.val_fraction is None else {})
        if isinstance(source, OpenAIArrays):
            given = (self.crop, self.filter) != ("none", DEFAULT_FILTER)
            options |= source.preparation(palette, self.n_px, given)
        return ShardSettings(**options, source=source.name, labels=source.labels, palette_hash=palette.hash)

    def crop_spec(self, split: str) -> CropSpec:
        """The crop of the images of a split. Validation and test images get one central crop (paper 3.1)."""
        if split == "train" or self.crop != "random":
            return CropSpec(self.n_px, self.crop, self.filter, self.seed, self.views, self.max_pixels)
        return CropSpec(self.n_px, "center", self.filter, self.seed, 1, self.max_pixels)

    def entries_per_shard(self, split: str) -> int:
        """Images of the source per shard; all views of an image are in the same shard."""
        return self.images_per_shard // self.crop_spec(split).views


@dataclass(frozen=True, kw_only=True)
class ShardSettings(ShardOptions):
    """All settings that determine the bytes of the shards: the options, the source and the palette."""

    val_fraction: float = field()  # no default here
    source: str
    labels: str = "use"
    palette_hash: str


@dataclass(frozen=True)
class Planned:
    """One shard of the plan."""

    name: str
    split: str
    first: int  # the number of its first image in the split
    n_entries: int
    file: Path
    sha256: str  # of `file`

    def entries(self) -> Iterator[Entry]:
        """Its images, from the plan's file.

        Raises:
            ValueError: the file was changed.
        """
        content = self.file.read_bytes() if self.file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise InputError(f"{self.file} is damaged; remove {self.file.parents[1]} and begin again")
        yield from (Entry(*json.loads(line)) for line in content.splitlines())


def split_of(key: str, seed: int, val_fraction: float, test_fraction: float = 0.0) -> str:
    """The split of a training image, by a hash of its key: it does not depend on other images (paper 3.1).

    val_fraction is that of the images that are not test images.
    """
    if _drawn(f"{seed}/test/{key}", test_fraction):
        return "test"
    return "val" if _drawn(f"{seed}/{key}", val_fraction) else "train"


def _drawn(key: str, fraction: float) -> bool:
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _in_splits(source: Source, settings: ShardSettings) -> Iterator[tuple[str, Entry]]:
    """Every image of the source and its split."""
    fractions = settings.val_fraction, settings.test_fraction or 0.0
    for entry, key in _identified(source, by_content=bool(settings.test_fraction)):
        if entry.split == "val" and settings.val_fraction:
            own = f"has validation images of its own, such as {entry.key}"
            raise InputError(f"{source.name} {own}; leave out --val_fraction {settings.val_fraction:g}")
        if entry.split == "test" and settings.test_fraction:
            own = f"has test images of its own, such as {entry.key}"
            raise InputError(f"{source.name} {own}; leave out --test_fraction {settings.test_fraction:g}")
        yield split_of(key, settings.seed, *fractions) if entry.split == "train" else entry.split, entry


def _identified(source: Source, by_content: bool) -> Iterator[tuple[Entry, str]]:
    """Every image and what its split is drawn by: its key, or the sha256 of its file. An unreadable image has its key."""
    if not by_content:
        yield from ((entry, entry.key) for entry in source.entries())
        return
    yield from ((entry, digest or entry.key) for entry, digest in hashed(source.entries(), source.read))


def make_plan(path: Path, source: Source, settings: ShardSettings, max_bad: float = 1) -> None:
    """Writes the plan directory, which appears when it is complete.

    Raises:
        ValueError: the source is empty, a split would be empty, a split has more images than nine digits can number, or the
            source leaves out more than the fraction max_bad.
    """
    with atomic_dir(path) as partial:
        digest, counts, by_label = hashlib.sha256(), dict.fromkeys(SPLITS, 0), Counter[int]()
        with ExitStack() as stack:
            files: dict[str, IO[str]] = {}
            for split, entry in tqdm(_in_splits(source, settings), "list", unit=" images", leave=False, disable=None):
                number, place = divmod(counts[split], settings.entries_per_shard(split))
                if place == 0:
                    if split in files:
                        files[split].close()
                    files[split] = stack.enter_context(_new_file(partial, split, number))
                files[split].write(json.dumps(entry) + "\n")
                digest.update(json.dumps([split, entry.key, entry.label]).encode())
                counts[split] += 1
                by_label[entry.label] += 1
        source.left_out.check(source.name, sum(counts.values()), max_bad)
        _check_counts(counts, source, settings)
        hashes = {file.name: sha256_file(file) for file in sorted(partial.glob("*.jsonl"))}
        n_listed = [by_label[label] for label in range(len(source.classes))]
        plan = _PlanFile(settings, source.classes, digest.hexdigest(), counts, hashes, source.left_out.rows(), n_listed)
        PLAN.write(partial / "plan.json", asdict(plan))


def _new_file(directory: Path, split: str, number: int) -> IO[str]:
    return open(directory / f"{split}-{number:06d}.jsonl", "w", encoding="utf-8")


def _check_counts(counts: dict[str, int], source: Source, settings: ShardSettings) -> None:
    drawn = sum(counts.values()) if settings.test_fraction else counts["train"] + counts["val"]
    if isinstance(source, OpenAIArrays) and not counts["train"]:
        return  # the test arrays alone can be evaluated
    if not drawn:
        raise InputError(f"source {source.name} holds no training images")
    wanted = {"train": 1.0, "val": settings.val_fraction, "test": settings.test_fraction}
    for split in (split for split, fraction in wanted.items() if fraction):
        if not counts[split]:
            of = [f"{name}={value}" for name in _FRACTIONS[split] if (value := getattr(settings, name))]
            equal = "; equal files are in one split" if settings.test_fraction else ""
            fix = f"change {' or '.join(of)} or the seed{equal}"
            raise InputError(f"none of the {drawn} images of {source.name} falls to {split}; {fix}")
    for split, count in counts.items():
        if count * settings.crop_spec(split).views >= MAX_IMAGES:
            raise InputError(f"{split} would have {count} images x {settings.views} views; at most {MAX_IMAGES - 1}")


@dataclass(frozen=True)
class _PlanFile:
    """The content of plan.json.

    lists: the sha256 of each shard's file of entries. left_out: what the source left out. n_listed: images of each class.
    """

    settings: ShardSettings
    classes: list[str]
    source_hash: str
    counts: dict[str, int]
    lists: dict[str, str]
    left_out: list[LeftOut] = field(default_factory=list)
    n_listed: list[int] = field(default_factory=list)


class ShardPlan:
    """A plan on disk: the images of each shard.

    Raises:
        ValueError: the plan is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        again = dataclasses.replace(PLAN, fix=f"remove {path.parent} and begin again")
        plan = record_from(_PlanFile, again.read(path / "plan.json"), f"plan {path / 'plan.json'}", again.fix)
        self.settings, self.classes, self.source_hash, self.counts = plan.settings, plan.classes, plan.source_hash, plan.counts
        self.left_out, self.n_listed = plan.left_out, plan.n_listed
        self._lists, self._path = plan.lists, path

    @property
    def n_entries(self) -> int:
        """Images of the source, in all splits."""
        return sum(self.counts.values())

    def shards(self) -> list[Planned]:
        """Every shard, split by split."""
        return [
            Planned(
                f"{name}.tar", split, first, min(size, count - first), self._path / f"{name}.jsonl", self._lists[f"{name}.jsonl"]
            )
            for split, count in self.counts.items()
            for size in [self.settings.entries_per_shard(split)]
            for number, first in enumerate(range(0, count, size))
            for name in [f"{split}-{number:06d}"]
        ]

    def differences(self, settings: ShardSettings) -> list[str]:
        """The settings that differ from those of this plan, each in words."""
        old, new = asdict(self.settings), asdict(settings)
        return [f"{name} {old[name]!r}, now {new[name]!r}" for name in old if old[name] != new[name]]
