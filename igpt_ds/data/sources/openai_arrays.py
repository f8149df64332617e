"""`openai:PREFIX`: the token arrays of OpenAI's image-gpt release, `PREFIX_trX.npy`, `PREFIX_trY.npy`, and so for va and te.

In: PREFIX is `DIR/imagenet` or `DIR/cifar10`, or DIR if it holds one data set. Out: a source of tokens, not pixels. X is integers
[N, n_px x n_px] in 0..511, colours of the released palette. Y is the classes, one-hot [N, K] or integers [N]. The files are
mapped, never read whole. Each split is optional: the test files alone suffice to check the published likelihoods.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from igpt_ds.data.left_out import Tally
from igpt_ds.data.palette import OPENAI_PALETTE_HASH, Palette
from igpt_ds.data.sources.base import UNLABELLED, VAL_FRACTION, Entry
from igpt_ds.data.sources.imagenet import ImageNet
from igpt_ds.errors import InputError
from igpt_ds.npy import read_npy

N_COLORS = 512  # of the released palette
_SPLITS = {"tr": "train", "va": "val", "te": "test"}
_AGAIN = "download it again"
_ROWS = 4096  # labels checked at once
_CLASSES = 1 << 16  # more are damage


def find_prefix(where: str) -> Path:
    """`DIR/imagenet` for itself, or for DIR if that holds the arrays of one data set.

    Raises:
        ValueError: there are no arrays, or those of several data sets.
    """
    path = Path(where)
    found = sorted({file.name[: -len("_trX.npy")] for part in _SPLITS for file in path.glob(f"*_{part}X.npy")})
    if len(found) > 1:
        raise InputError(f"{path} holds arrays of {', '.join(found)}; name one, openai:{path / found[0]}")
    return path / found[0] if found else path


class OpenAIArrays:
    """Keys are `train/0000000`, `val/0000000`, `test/0000000`, numbers in the order of the arrays.

    n_px: side of the images.

    Raises:
        ValueError: a file is missing, or the dtype or shape of an array is wrong. Listing raises it if a row is not one-hot or a
            label is negative, reading if a token is no colour.
    """

    left_out = Tally()  # nothing: its files are those of the publisher

    def __init__(self, where: str, labels: str = "use") -> None:
        self._prefix, self.labels = find_prefix(where), labels
        self.name = f"openai:{self._prefix}"
        self._tokens = {split: self._map(part + "X") for part, split in _SPLITS.items() if self._file(part + "X").exists()}
        if not self._tokens:
            files = " or ".join(self._file(part + "X").name for part in _SPLITS)
            raise InputError(f"{self._prefix} does not exist as token arrays; expected {files}")
        sides = {split: self._side(split) for split in self._tokens}
        self.n_px = next(iter(sides.values()))
        if other := next((split for split in sides if sides[split] != self.n_px), None):
            first = next(iter(sides))
            raise InputError(
                f"{self._where(other)} has {sides[other]}x{sides[other]} pixels, {self._where(first)} {self.n_px}x{self.n_px}"
            )
        self._labels = {split: self._label_array(split) for split in self._tokens} if labels == "use" else {}
        own = ImageNet.val_fraction if self._prefix.name == "imagenet" else VAL_FRACTION
        self.val_fraction = own if "val" not in self._tokens and "train" in self._tokens else 0.0

    def preparation(self, palette: Palette, n_px: int, given: bool) -> dict[str, str | None]:
        """The crop and the filter that the tokens were made with, after checks. The filter is not known.

        Args:
            palette: that of the shards. n_px: of the shards. given: whether a crop or a filter is asked for.

        Raises:
            ValueError: the palette is not that of the tokens, or the images would change.
        """
        if palette.hash != OPENAI_PALETTE_HASH:
            fix = "use kmeans_centers.npy of the same release"
            raise InputError(f"{self.name} holds tokens of OpenAI's palette, and --palette is {palette.name}; {fix}")
        if n_px != self.n_px:
            raise InputError(f"{self.name} holds tokens of {self.n_px}x{self.n_px} pixels; use --n_px {self.n_px}, not {n_px}")
        if given:
            raise InputError(f"{self.name} holds tokens, which are cropped and resized already; omit --crop and --filter")
        return {"crop": "center" if self._prefix.name == "imagenet" else "none", "filter": None}

    @cached_property
    def classes(self) -> list[str]:
        """The numbers of the classes. The release names none.

        Raises:
            ValueError: the label arrays have different numbers of classes.
        """
        if not self._labels:
            return UNLABELLED
        found = {split: Y.shape[1] if Y.ndim == 2 else int(Y.max()) + 1 for split, Y in self._labels.items()}
        hot = [Y.shape[1] for Y in self._labels.values() if Y.ndim == 2]
        K = min(hot[0] if hot else max(found.values()), _CLASSES)
        for split, n in found.items():
            if n > K or (n < K and self._labels[split].ndim == 2):
                raise InputError(f"{self._where(split, 'Y')} has {n} classes, expected {K}; {_AGAIN}")
        return [str(label) for label in range(K)]

    def entries(self) -> Iterator[Entry]:
        """The rows of each array."""
        for split, tokens in self._tokens.items():
            for start in range(0, len(tokens), _ROWS):
                labels = self._read_labels(split, start) if self._labels else [0] * min(_ROWS, len(tokens) - start)
                for row, label in enumerate(labels, start):
                    yield Entry(split, f"{split}/{row:07d}", label, [split, row])

    def read(self, entries: Sequence[Entry]) -> Iterator[np.ndarray]:
        """The tokens of each entry, uint16 [n_px, n_px]."""
        for entry in entries:
            split, row = entry.place
            if split not in self._tokens or row >= len(self._tokens[split]):
                raise InputError(f"{self._where(split)} was listed with {entry.key} but ends before; list it again")
            tokens = self._tokens[split][row]
            if tokens.min() < 0 or tokens.max() >= N_COLORS:
                wrong = tokens[(tokens < 0) | (tokens >= N_COLORS)][0]
                raise InputError(f"{self._where(split)} row {row} holds {wrong}; tokens lie in 0..{N_COLORS - 1}; {_AGAIN}")
            yield tokens.astype(np.uint16).reshape(self.n_px, self.n_px)

    def _file(self, name: str) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}_{name}.npy")

    def _where(self, split: str, part: str = "X") -> Path:
        return self._file(next(word for word, known in _SPLITS.items() if known == split) + part)

    def _map(self, name: str) -> np.ndarray:
        return read_npy(self._file(name), "token array" if name.endswith("X") else "label array", _AGAIN, mapped=True)

    def _side(self, split: str) -> int:
        X = self._tokens[split]
        side = math.isqrt(X.shape[1]) if X.ndim == 2 else 0
        if X.dtype.kind not in "iu" or not X.size or not side or side**2 != X.shape[-1]:
            raise InputError(f"{self._where(split)} is {X.dtype} {list(X.shape)}, expected integers [N, n_px x n_px]; {_AGAIN}")
        return side

    def _label_array(self, split: str) -> np.ndarray:
        file, n = self._where(split, "Y"), len(self._tokens[split])
        if not file.exists():
            raise InputError(f"{file} does not exist; download it, or add --labels ignore")
        Y = self._map(file.name.rpartition("_")[2].removesuffix(".npy"))
        if Y.ndim not in (1, 2) or len(Y) != n or (Y.ndim == 1 and Y.dtype.kind not in "iu"):
            raise InputError(f"{file} is {Y.dtype} {list(Y.shape)}, expected one-hot [{n}, K] or integers [{n}]; {_AGAIN}")
        return Y

    def _read_labels(self, split: str, start: int) -> list[int]:
        Y = self._labels[split][start : start + _ROWS]
        labels = Y if Y.ndim == 1 else Y.argmax(axis=1)
        good = labels >= 0 if Y.ndim == 1 else (Y.max(axis=1) == 1) & ((Y != 0).sum(axis=1) == 1)
        if not good.all():
            raise InputError(
                f"{self._where(split, 'Y')} row {start + int(good.argmin())} is no class or no one-hot vector; {_AGAIN}"
            )
        return [int(label) for label in labels]
