"""Rows of a feature array that is larger than memory, in a random order that depends only on the place in the stream.

In: a memory map [N, C], the rows to use, a seed. Out: batches from any step on, and column moments. Called by `sgd_search.py`;
`FiniteRows` also by `linear.py`.

Rows are read in blocks of neighbours. An epoch is a permutation of the blocks. As many blocks as fit into `window_bytes` make a
window; its rows are shuffled, and it is read while the previous window is used. The order depends only on (seed, epoch, window),
so a stream can start at any step. The more blocks a window holds, the closer the order is to a shuffle of all rows.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from igpt_ds.counter_random import random_words
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.files import FeatureSet
from igpt_ds.evaluate.features.manifest import EXTRACT_AGAIN

BLOCK_BYTES = 1 << 18  # of neighbouring rows: large enough for a disk, small enough to mix
_READERS = min(8, os.cpu_count() or 1)  # threads: a disk and a network are faster when several reads are under way
_ORDER = 31  # purpose of random words


class FiniteRows:
    """One layer of a feature set, or several layers side by side: an array [N, C] of float32, checked to be finite.

    Rows are read from the files when they are needed. A map would read more than these rows from a disk, and would keep them in
    the memory of the process. Several layers equal the array of their concatenation, which is never made.

    Raises:
        ValueError: as `FeatureSet.layer`; when rows are read, with the first image that is not finite.
    """

    def __init__(self, features: FeatureSet, layers: int | Sequence[int], kind: str, mask: int = 0) -> None:
        names = [layers] if isinstance(layers, int) else list(layers)
        self._layers = {layer: _RowFile(features.layer(layer, kind, mask)) for layer in names}
        of_mask = f" mask {mask}" if features.mask_draws else ""
        self._name = f"{features.path} split {features.split!r}: layer {{}} {kind}{of_mask}"
        self.shape = (len(features.labels), sum(one.array.shape[1] for one in self._layers.values()))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        numbers = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        ends = [] if isinstance(rows, slice) or not len(rows) else np.flatnonzero(np.diff(numbers) != 1).tolist()
        runs = list(itertools.pairwise([0, *(end + 1 for end in ends), len(numbers)]))
        values, first = np.empty((len(numbers), self.shape[1]), dtype=np.float32), 0
        for layer, file in self._layers.items():
            part = values[:, first : first + file.array.shape[1]]
            # torch casts, and the check is in float32, because numpy is seven times slower on float16.
            torch.from_numpy(part).copy_(torch.from_numpy(file.read(numbers, runs)))
            if not np.isfinite(part).all():
                image, name = numbers[~np.isfinite(part).all(1)][0], self._name.format(layer)
                raise InputError(f"{name} is not finite for image {image}; extract the features again with --dtype fp32")
            first += part.shape[1]
        return values


class _RowFile:
    """Reads rows of a memory map from its file, neighbours at once; several threads may read."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self._file: int | None = None  # None: no file, or one in another order
        if isinstance(array, np.memmap) and array.flags.c_contiguous:
            self._file, self._start = os.open(str(array.filename), os.O_RDONLY), array.offset
            weakref.finalize(self, os.close, self._file)

    def read(self, numbers: np.ndarray, runs: Iterable[tuple[int, int]]) -> np.ndarray:
        """The rows of these numbers as they are stored, [n, C]. `runs` are the places of neighbours in `numbers`."""
        if self._file is None:
            return np.array(self.array[numbers])
        found = np.empty((len(numbers), self.array.shape[1]), dtype=self.array.dtype)
        for first, end in runs:
            piece = found[first:end]
            if not piece.size:
                continue
            if os.preadv(self._file, [piece.data], self._start + int(numbers[first]) * found.strides[0]) != piece.nbytes:
                raise InputError(f"a file of features ended before row {numbers[end - 1]}; {EXTRACT_AGAIN}")
        return found


class Blocks:
    """The training rows of a feature array, read window by window in an order that depends on (seed, position).

    Args:
        values: float [N, C], a memory map for example.
        keep: bool [N], the rows to use; None: all.
        window_bytes: size of a window as float32; two windows are in memory.
        standard: mean and 1 / deviation of each column, float64 [C]; None leaves the rows as they are.
    """

    def __init__(
        self,
        values: np.ndarray | FiniteRows,
        keep: np.ndarray | None,
        seed: int,
        window_bytes: int,
        standard: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        row_bytes = 4 * values.shape[1]
        self.standard = standard
        self.values, self.keep, self.seed = values, keep, seed
        self.rows = max(1, BLOCK_BYTES // row_bytes)
        self.starts = np.arange(0, len(values), self.rows)
        self.per_window = max(1, window_bytes // (self.rows * row_bytes))
        kept = np.ones(len(values), dtype=np.int64) if keep is None else keep.astype(np.int64)
        self.counts = np.add.reduceat(kept, self.starts)
        self.n_rows = int(self.counts.sum())

    def batches(self, step: int, steps: int, batch: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of steps step .. steps - 1: float32 [batch, C] and their row numbers int64 [batch], on the device."""
        begun: list[tuple[Tensor, Tensor]] = []
        missing = batch
        for values, ids in self._windows(step * batch, steps * batch, device):
            start = 0
            while len(ids) - start >= missing and step < steps:
                part = slice(start, start + missing)
                begun.append((values[part], ids[part]))
                yield begun[0] if len(begun) == 1 else (torch.cat([x for x, _ in begun]), torch.cat([i for _, i in begun]))
                start, begun, missing, step = part.stop, [], batch, step + 1
            if start < len(ids):
                begun.append((values[start:].clone(), ids[start:]))  # the window's memory is free for the next one
                missing -= len(ids) - start

    def _windows(self, position: int, end: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled rows and their numbers from a position of the endless stream on, the next window read meanwhile."""
        with ThreadPoolExecutor(1) as reader:
            jobs = self._plan(position, end)
            reading = [reader.submit(self._read, *job) for job in itertools.islice(jobs, 1)]
            while reading:
                values, ids = reading.pop().result()
                reading = [reader.submit(self._read, *job) for job in itertools.islice(jobs, 1)]
                yield standardised(torch.from_numpy(values).to(device), self.standard), torch.from_numpy(ids).to(device)

    def _plan(self, position: int, end: int) -> Iterator[tuple[int, int, np.ndarray, int]]:
        """Epoch, window, its blocks, and how many of its rows come before the position."""
        while position < end:
            epoch, place = divmod(position, self.n_rows)
            order = self._random(epoch, 0).permutation(len(self.starts))
            for number, first in enumerate(range(0, len(order), self.per_window)):
                blocks = order[first : first + self.per_window]
                size = int(self.counts[blocks].sum())
                if place < size and position < end:
                    yield epoch, number, blocks, place
                    position += size - place
                place = max(0, place - size)

    def _read(self, epoch: int, number: int, blocks: np.ndarray, skip: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.concatenate([np.arange(self.starts[b], min(self.starts[b] + self.rows, len(self.values))) for b in blocks])
        if self.keep is not None:
            ids = ids[self.keep[ids]]
        order = self._random(epoch, 1 + number).permutation(len(ids))
        place = np.empty(len(ids), dtype=np.int64)
        place[order] = np.arange(len(ids))
        out = np.empty((len(ids), self.values.shape[1]), dtype=np.float32)

        def read(block: int, places: np.ndarray) -> None:  # reads a block at once and puts its rows into the shuffled places
            rows = slice(self.starts[block], self.starts[block] + self.rows)
            piece = self.values[rows]
            out[places] = piece if self.keep is None else piece[self.keep[rows]]

        with ThreadPoolExecutor(_READERS) as readers:
            for _ in readers.map(read, blocks, np.split(place, np.cumsum(self.counts[blocks])[:-1])):
                pass
        return out[skip:], ids[order][skip:]

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([int(random_words(self.seed, _ORDER, np.array([epoch]))[0]), stream])


def standardised(values: Tensor, standard: tuple[np.ndarray, np.ndarray] | None) -> Tensor:
    """The same tensor [N, C], standardised in place; unchanged if `standard` is None."""
    if standard is None:
        return values
    mean, scale = (torch.from_numpy(numbers).to(values) for numbers in standard)
    return values.sub_(mean).mul_(scale)


def moments(values: np.ndarray | FiniteRows, keep: np.ndarray | None, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and 1 / deviation of each column over the kept rows, float64 [C], in one pass; 0 for a constant column."""
    n, total, squares, shift = 0, 0.0, 0.0, np.asarray(values[:1][0], dtype=np.float64)
    for start in range(0, len(values), rows):
        part = np.asarray(values[start : start + rows], dtype=np.float64)
        part = (part if keep is None else part[keep[start : start + rows]]) - shift
        n, total, squares = n + len(part), total + part.sum(0), squares + np.square(part).sum(0)
    mean = total / n
    deviation = np.sqrt(np.maximum(squares / n - mean**2, 0))
    constant = deviation <= np.finfo(np.float32).eps * np.abs(mean + shift)
    return mean + shift, np.divide(1.0, deviation, out=np.zeros_like(deviation), where=~constant)
