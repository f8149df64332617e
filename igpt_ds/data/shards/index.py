"""index.json: what a dataset directory holds. Its one reader and its one writer.

In: the directory. Out: a `ShardIndex`. `dataset.py`, `streaming.py`, the tools and the preflight read; `build.py` writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igpt_ds.data.left_out import LeftOut
from igpt_ds.data.palette import Palette, load_palette
from igpt_ds.errors import InputError
from igpt_ds.schema import check_file_name, record_from, to_json
from igpt_ds.sealed import Format

SPLITS = ("train", "val", "test")
AGAIN = "make the shards again with tools/make_shards.py"
# Version 2 has "blocks", the crc32 of each 1,024 images, in each shard's entry; readers ignore it.
INDEX = Format("igpt_ds.shards", "shard index", AGAIN, version=3, sealed=2, oldest=2)


@dataclass(frozen=True)
class ShardEntry:
    """What the index says of one shard: its file name, its images, its size, its sha256."""

    name: str
    n_images: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_file_name(self.name)  # `--stream 'pipe:...'` puts it into a shell's line


@dataclass(frozen=True)
class SplitEntry:
    """What the index says of one split. dataset_hash: see `split_entry`. keys: the sha256 of its `keys_file`; older have none."""

    n_images: int
    dataset_hash: str
    shards: list[ShardEntry]
    keys: str | None = None


@dataclass(frozen=True)
class ShardIndex:
    """The content of index.json. The fields after `splits` say how the images were made; readers need none of them.

    Attributes:
        palette: the file name of the palette in the directory.
        labels: "use", or "ignore" where --labels ignore was given.
        max_pixels: the limit of an image's pixels, where it was set.
        made_with: the version of each package that decodes and resizes.
        left_out: what the source left out, by ending and reason. Older indexes have none.
        derived: how the images were chosen from another dataset directory, as the tool that chose them says it.
    """

    name: str
    n_px: int
    n_vocab: int
    palette: str
    palette_hash: str
    classes: list[str]
    splits: dict[str, SplitEntry]
    source: str | None = None
    source_hash: str | None = None
    labels: str | None = None
    val_fraction: float | None = None
    test_fraction: float | None = None
    images_per_shard: int | None = None
    seed: int | None = None
    filter: str | None = None
    crop: str | None = None
    views: int | None = None
    max_pixels: int | None = None
    made_with: dict[str, str] | None = None
    n_unreadable: int | None = None
    left_out: list[LeftOut] | None = None
    derived: dict[str, object] | None = None

    def __post_init__(self) -> None:
        check_file_name(self.palette, "palette")

    def of(self, path: Path, split: str) -> dict[str, SplitEntry]:
        """The splits that a name such as "train+val" joins, in the order of their images.

        Raises:
            ValueError: one of them does not exist, or is named twice.
        """
        parts = parts_of(split)
        if missing := [part for part in parts if part not in self.splits]:
            raise InputError(f"{path} has no split {missing[0]!r}; it has {', '.join(self.splits)}")
        return {part: self.splits[part] for part in parts}

    def load_palette(self, path: Path, fix: str = AGAIN) -> Palette:
        """The palette of the dataset directory `path`.

        Raises:
            ValueError: the palette is missing, or is not the one that the shards were made with.
        """
        palette = load_palette(path / self.palette)
        if palette.hash != self.palette_hash:
            raise InputError(f"{path / self.palette} is not the palette that the shards were made with; {fix}")
        return palette


def parts_of(split: str) -> list[str]:
    """The splits that a name joins, in the order of their images: "train+val" or "val+train" -> ["train", "val"].

    Raises:
        ValueError: one of them is named twice.
    """
    parts = split.split("+")
    if twice := [part for part in parts if parts.count(part) > 1]:
        raise InputError(f"split {split!r} names {twice[0]!r} twice; name each split once")
    return sorted(parts, key=lambda part: SPLITS.index(part) if part in SPLITS else len(SPLITS))


def folded(split: str, fitted: str) -> bool:
    """Whether images of `split` are among those of `fitted`, which joins several splits: "val" is folded into "train+val"."""
    return "+" in fitted and not set(split.split("+")).isdisjoint(fitted.split("+"))


def joined_hash(hashes: Sequence[str]) -> str:
    """The dataset_hash of several splits together; that of a single split is its own."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("+".join(hashes).encode()).hexdigest()


def read_index(path: Path) -> ShardIndex:
    """The index of a dataset directory.

    Raises:
        ValueError: `path` is not a dataset directory; index.json has another version, was changed, or a field is missing or
            has another type.
    """
    file = path / "index.json"
    if not file.is_file():
        raise InputError(f"{path} is no shard directory: it has no index.json; make one with tools/make_shards.py")
    return record_from(ShardIndex, INDEX.read(file), f"shard index {file}", AGAIN)


def write_index(path: Path, index: ShardIndex) -> None:
    """Writes the index of a dataset directory, atomically, in the newest version."""
    INDEX.write(path / "index.json", to_json(index))


def keys_file(split: str) -> str:
    """The name of the file with the keys of a split's images."""
    return f"{split}-keys.jsonl"


def split_entry(shards: list[ShardEntry], palette_hash: str, n_px: int) -> SplitEntry:
    """The entry of a split. Its dataset_hash identifies the images: the sha256 over the palette and the bytes of all shards."""
    lines = [palette_hash, str(n_px), *(shard.sha256 for shard in shards)]
    return SplitEntry(sum(shard.n_images for shard in shards), hashlib.sha256("\n".join(lines).encode()).hexdigest(), shards)
