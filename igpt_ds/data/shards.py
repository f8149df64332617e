"""Token shards: the one format in which images reach the model. Written once from a source and a palette, read by number.

In: a source, a palette, n_px. Out: a directory {palette.npy, index.json, train-000000.tar, ..., val-000000.tar}; then tokens
and labels by image id. `tools/make_shards.py` writes; the loader, feature extraction and sampling read.

A shard is a plain USTAR file that webdataset reads: for image 12 the members `000000012.cls` (class index in ASCII) and
`000000012.npy` (uint16 [n_px, n_px]). All images take the same number of bytes, so that image i of a shard lies at i times that
number and is read from a memory map without an index of members; each read checks the member's name.
"""

from __future__ import annotations

import hashlib
import io
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from igpt_ds.data.images import DEFAULT_FILTER, fit_to_square
from igpt_ds.data.palette import Palette, load_palette, save_palette
from igpt_ds.data.sources import Source
from igpt_ds.files import atomic_dir, read_json, sha256_file, write_json

FORMAT, VERSION = "igpt_ds.shards", 1
IMAGES_PER_SHARD = 16384  # 36 MiB of 32x32 images
SPLITS = ("train", "val")
_AGAIN = "make the shards again with tools/make_shards.py"
_BLOCK = 512  # a tar file is made of blocks: one of header, then the content, filled up with zeros
_DIGITS = 9  # of the image id in a member's name
_POWERS = 10 ** np.arange(_DIGITS - 1, -1, -1)


def _npy(grid: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, grid.astype("<u2"), version=(1, 0))
    return file.getvalue()


def _record(n_px: int) -> np.dtype:
    """The bytes of one image in a shard: .cls header and content, .npy header, preamble and content."""
    content = _npy(np.zeros((n_px, n_px)))
    preamble = len(content) - 2 * n_px * n_px
    fields = {
        "cls_digits": (("u1", _DIGITS), 0),
        "cls_suffix": ("S8", _DIGITS),
        "label": ("S20", _BLOCK),
        "npy_digits": (("u1", _DIGITS), 2 * _BLOCK),
        "npy_suffix": ("S8", 2 * _BLOCK + _DIGITS),
        "preamble": (("u1", preamble), 3 * _BLOCK),
        "tokens": (("<u2", (n_px, n_px)), 3 * _BLOCK + preamble),
    }
    return np.dtype(
        {
            "names": list(fields),
            "formats": [kind for kind, _ in fields.values()],
            "offsets": [offset for _, offset in fields.values()],
            "itemsize": 3 * _BLOCK + -(-len(content) // _BLOCK) * _BLOCK,
        }
    )


# --------------------------------------------------------------------------------------------------- writing


def split_of(key: str, seed: int, val_fraction: float) -> str:
    """The split of an image by a hash of its key: it never changes when other images come or go."""
    digest = hashlib.sha256(f"{seed}/{key}".encode("utf-8", "surrogateescape")).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


def write_dataset(
    path: Path,
    source: Source,
    palette: Palette,
    n_px: int,
    *,
    val_fraction: float = 0.1,
    images_per_shard: int = IMAGES_PER_SHARD,
    seed: int = 0,
    resize_filter: str = DEFAULT_FILTER,
    name: str | None = None,
) -> dict[str, Any]:
    """Writes every image of the source, in its order, into a dataset directory that appears when it is complete.

    val_fraction of the images, chosen by `split_of`, become the split "val" (10 % for CIFAR, 4 % for ImageNet: paper 3.1); 0
    makes no such split. `name` is what tables and figures call the images; the directory's name when left out. Memory does not
    grow with the source. The same input gives the same bytes. Returns the index.

    Raises:
        ValueError: `path` exists already, a number is out of range, or a split would be empty.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be at least 0 and below 1")
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard={images_per_shard} must be at least 1")
    with atomic_dir(path) as partial, ExitStack() as stack:
        splits = SPLITS if val_fraction else SPLITS[:1]
        writers = {split: stack.enter_context(_SplitWriter(partial, split, palette, images_per_shard)) for split in splits}
        for key, image, label in tqdm(source, total=len(source), desc="shards", unit=" images", leave=False, disable=None):
            tokens = palette.encode(fit_to_square(image, n_px, resize_filter))
            writers[split_of(key, seed, val_fraction)].add(tokens, label)
        for split, writer in writers.items():
            if not writer.n_images:
                raise ValueError(
                    f"none of the {len(source)} images of {source.name} falls to {split}; change val_fraction={val_fraction}"
                )
        index = {
            "format": FORMAT,
            "version": VERSION,
            "name": name or path.resolve().name,
            "n_px": n_px,
            "n_vocab": len(palette),
            "palette": "palette.npy",
            "palette_hash": palette.hash,
            "filter": resize_filter,
            "source": source.name,
            "seed": seed,
            "val_fraction": val_fraction,
            "n_skipped": len(source.skipped),
            "classes": source.classes,
            "splits": {split: writer.finish() for split, writer in writers.items()},
        }
        save_palette(partial / "palette.npy", palette)
        write_json(partial / "index.json", index)
    return index


class _SplitWriter:
    """Writes the shards of one split, one after the other."""

    def __init__(self, directory: Path, split: str, palette: Palette, images_per_shard: int) -> None:
        self.n_images = 0
        self._directory, self._split, self._per_shard = directory, split, images_per_shard
        self._digest = hashlib.sha256(palette.hash.encode())
        self._shards: list[dict[str, Any]] = []
        self._open_shard: ExitStack | None = None
        self._tar: Any = None

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def add(self, tokens: np.ndarray, label: int) -> None:
        """Appends one image: uint16 [n_px, n_px] and its class index."""
        if self.n_images % self._per_shard == 0:
            self._next_shard()
        content = _npy(tokens)
        self._tar.write({"__key__": f"{self.n_images:0{_DIGITS}d}", "cls": str(label).encode(), "npy": content})
        self._digest.update(np.int64(label).astype("<i8").tobytes() + content)
        self._shards[-1]["n_images"] += 1
        self.n_images += 1

    def finish(self) -> dict[str, Any]:
        """Closes the last shard and describes the split. Its dataset_hash does not depend on how many images a shard holds."""
        self._close()
        for shard in self._shards:
            file = self._directory / shard["name"]
            shard.update(bytes=file.stat().st_size, sha256=sha256_file(file))
        return {"n_images": self.n_images, "dataset_hash": self._digest.hexdigest(), "shards": self._shards}

    def _next_shard(self) -> None:
        from webdataset import TarWriter  # lazily: only writing needs it

        self._close()
        name = f"{self._split}-{len(self._shards):06d}.tar"
        self._open_shard = ExitStack()
        file = self._open_shard.enter_context((self._directory / name).open("wb"))
        self._tar = self._open_shard.enter_context(TarWriter(file, mtime=0, encoder=False))
        self._shards.append({"name": name, "n_images": 0})

    def _close(self) -> None:
        if self._open_shard is not None:
            self._open_shard.close()
            self._open_shard = None


# --------------------------------------------------------------------------------------------------- reading


class ShardSet:
    """One split of a dataset directory, read by image id 0 .. n_images - 1 from memory maps.

    Attributes: name, path, split, n_images, n_px, n_vocab, classes, palette, palette_hash, dataset_hash.

    Raises:
        ValueError: no dataset directory, another format version, no such split, a torn shard, a palette of another hash.
    """

    def __init__(self, path: Path, split: str) -> None:
        index_file = path / "index.json"
        if not index_file.is_file():
            raise ValueError(f"{path} is no shard directory: it has no index.json; make one with tools/make_shards.py")
        index = read_json(index_file, "shard index")
        if not isinstance(index, dict) or (index.get("format"), index.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"shard index {index_file} is not {FORMAT} version {VERSION}; {_AGAIN}")
        try:
            self._open(path, split, index)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"shard index {index_file} is damaged ({type(error).__name__}: {error}); {_AGAIN}") from None

    def _open(self, path: Path, split: str, index: dict[str, Any]) -> None:
        if split not in index["splits"]:
            raise ValueError(f"{path} has no split {split!r}; it has {', '.join(index['splits'])}")
        about = index["splits"][split]
        self.path, self.split = path, split
        self.name: str = index["name"]
        self.n_px: int = index["n_px"]
        self.n_vocab: int = index["n_vocab"]
        self.classes: list[str] = index["classes"]
        self.palette_hash: str = index["palette_hash"]
        self.dataset_hash: str = about["dataset_hash"]
        self.palette = load_palette(path / index["palette"])
        if self.palette.hash != self.palette_hash:
            raise ValueError(f"{path / index['palette']} is not the palette that the shards were made with; {_AGAIN}")
        self._about: list[dict[str, Any]] = about["shards"]
        self._first = np.cumsum([0] + [shard["n_images"] for shard in self._about])  # id of each shard's first image
        self.n_images = int(self._first[-1])
        dtype = _record(self.n_px)
        self._preamble = np.frombuffer(_npy(np.zeros((self.n_px, self.n_px))), "u1", count=dtype["preamble"].itemsize)
        self._maps = []
        for shard in self._about:
            self._check_size(path / shard["name"], shard["bytes"], shard["n_images"] * dtype.itemsize)
            self._maps.append(np.memmap(path / shard["name"], dtype, mode="r", shape=shard["n_images"]))

    def _check_size(self, file: Path, expected: int, records: int) -> None:
        found = file.stat().st_size if file.is_file() else 0
        if found != expected or found < records:
            raise ValueError(f"shard {file} is missing or torn: {found} bytes, expected {max(expected, records)}; {_AGAIN}")

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        """The token grids of some images: int64 [B] -> uint16 [B, n_px, n_px].

        Raises:
            ValueError: what lies in the shard at an image's place is not that image.
        """
        tokens = np.empty((len(ids), self.n_px, self.n_px), dtype=np.uint16)
        for places, records in self._records(ids):
            tokens[places] = records["tokens"]
        return tokens

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """The class indices of some images: int64 [B] -> int64 [B]."""
        labels = np.empty(len(ids), dtype=np.int64)
        for places, records in self._records(ids):
            labels[places] = records["label"].astype(np.int64)
        return labels

    def _records(self, ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each shard concerned: the places in `ids` that it fills, and the checked records for them."""
        assert ((ids >= 0) & (ids < self.n_images)).all()
        shard_of = np.searchsorted(self._first, ids, side="right") - 1
        found = []
        for shard in np.unique(shard_of):
            places = np.flatnonzero(shard_of == shard)
            rows = ids[places] - self._first[shard]
            records = self._maps[shard][rows]
            good = self._is_image(records, ids[places])
            if not good.all():
                bad = int(rows[~good][0])
                where = f"{self.path / self._about[shard]['name']}: byte {bad * records.dtype.itemsize}"
                raise ValueError(f"{where} does not hold image {ids[places][~good][0]} of {self.split}; {_AGAIN}")
            found.append((places, records))
        return found

    def _is_image(self, records: np.ndarray, ids: np.ndarray) -> np.ndarray:
        digits = (ids[:, None] // _POWERS % 10 + ord("0")).astype(np.uint8)
        good = (records["cls_digits"] == digits).all(axis=1) & (records["npy_digits"] == digits).all(axis=1)
        good &= (records["cls_suffix"] == b".cls") & (records["npy_suffix"] == b".npy")
        good &= np.char.isdigit(records["label"]) & (records["tokens"] < self.n_vocab).all(axis=(1, 2))
        return good & (records["preamble"] == self._preamble).all(axis=1)

    def verify(self) -> None:
        """Reads every shard of the split once and compares its sha256 with the index.

        Raises:
            ValueError: a shard holds other bytes than were written.
        """
        for shard in tqdm(self._about, desc=f"verify {self.split}", unit=" shards", leave=False, disable=None):
            file = self.path / shard["name"]
            if sha256_file(file) != shard["sha256"]:
                raise ValueError(f"shard {file} has changed since it was written: its sha256 differs from the index; {_AGAIN}")
