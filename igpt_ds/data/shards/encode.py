"""Encodes listed images as tokens, on several processes, in order.

In: chunks of a source's entries. Out: token grids, labels, and the images that cannot be read. Called by `build.py`.
A worker process gets entries, reads and decodes the images, and returns tokens: 2 KiB for an image of 32x32.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from igpt_ds.data.images import decode_image, square
from igpt_ds.data.left_out import LeftOut, Tally, reason_of
from igpt_ds.data.palette import Palette, load_palette
from igpt_ds.data.sources import Entry, Source, open_source
from igpt_ds.data.workers import process_pool
from igpt_ds.errors import InputError

CHUNK = 256  # images per task: a fraction of a second of work
_NAMED = 5  # unreadable images that are named in messages
_AHEAD = 3  # tasks waiting or running per process


@dataclass(frozen=True)
class CropSpec:
    """How an image is cropped and resized: see `data/images.square`."""

    n_px: int
    crop: str
    resize_filter: str | None  # None: the source's images are not resized here
    seed: int
    views: int
    max_pixels: int | None = None  # see `data/images.decode_image`


@dataclass(frozen=True)
class Bad:
    """An image that cannot be read: its key, the error, the reason to count it by, the ending of its name, its label."""

    key: str
    error: str
    reason: str
    ending: str
    label: int


class Task(NamedTuple):
    """Consecutive images of one shard; `first` is the number of the first image in its split."""

    shard: str
    first: int
    entries: Sequence[Entry]
    spec: CropSpec


class Prepared(NamedTuple):
    """The result of a task. An image that cannot be read leaves a gap in the names, not in the arrays."""

    shard: str
    n_entries: int
    names: np.ndarray  # int64 [N]: number in the split x views + view
    tokens: np.ndarray  # uint16 [N, n_px, n_px]
    labels: np.ndarray  # int64 [N]
    unreadable: list[Bad]


class Unreadable:
    """Counts images that cannot be read, and stops if there are too many."""

    def __init__(self, source: str, n_entries: int, max_bad: float, left_out: Sequence[LeftOut] = ()) -> None:
        """`left_out` is what the listing left out, which --max_bad limits too."""
        self.count = 0
        self.tally = Tally(left_out)
        self.by_label: Counter[int] = Counter()
        self._source, self._max_bad = source, max_bad
        self._n_lost, self._n_images = self.tally.n_lost, n_entries + self.tally.n_lost
        self._named: list[str] = []

    def add(self, images: Sequence[Bad], say: bool = False) -> None:
        """Adds images; `say` prints them on stderr."""
        named = [bad.error for bad in images[: _NAMED - len(self._named)]]
        for error in named if say else []:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
        self._named += named
        self.count += len(images)
        for bad in images:
            self.tally.add(bad.key, bad.reason, ending=bad.ending)
            self.by_label[bad.label] += 1
        if self.tally.n_lost > self._max_bad * self._n_images:
            before = f" and {self._n_lost} left out" if self._n_lost else ""
            allowed = f"more than the {self._max_bad:g} of {self._n_images} images that --max_bad allows"
            which = "; ".join(self._named or map(str, self.tally.rows()[:_NAMED]))
            fix = "repair the files or raise --max_bad"
            raise InputError(f"{self._source}: {self.count} unreadable{before}, {allowed}: {which}; {fix}")


def prepare(source: Source, palette: Palette, task: Task) -> Prepared:
    """Reads, decodes, crops, resizes and quantises the images of a task. Tokens of a source pass unchanged."""
    names: list[int] = []
    images: list[np.ndarray] = []
    labels: list[int] = []
    unreadable: list[Bad] = []
    for place, (entry, raw) in enumerate(zip(task.entries, source.read(task.entries), strict=True), start=task.first):
        try:
            views = _views(entry, raw, task.spec)
        except ValueError as error:
            unreadable.append(Bad(entry.key, str(error), reason_of(error), entry.kind, entry.label))
            continue
        images += views
        names += range(place * task.spec.views, place * task.spec.views + len(views))
        labels += [entry.label] * len(views)
    n_px = task.spec.n_px
    stacked = np.stack(images) if images else np.empty((0, n_px, n_px), dtype=np.uint16)
    tokens = stacked if stacked.dtype == np.uint16 else palette.encode(stacked)
    arrays = np.array(names, dtype=np.int64), tokens, np.array(labels, dtype=np.int64)
    return Prepared(task.shard, len(task.entries), *arrays, unreadable)


def _views(entry: Entry, raw: bytes | np.ndarray | ValueError, spec: CropSpec) -> list[np.ndarray]:
    if isinstance(raw, ValueError):
        raise raw
    image = decode_image(raw, entry.key, spec.max_pixels) if isinstance(raw, bytes) else raw
    if image.dtype == np.uint16:  # tokens
        return [image]
    assert spec.resize_filter is not None
    return [
        square(image, spec.n_px, crop=spec.crop, resize_filter=spec.resize_filter, seed=spec.seed, key=entry.key, view=view)
        for view in range(spec.views)
    ]


def prepared(tasks: Iterable[Task], source: Source, palette_file: Path, workers: int) -> Iterator[Prepared]:
    """The result of every task, in order. Uses `workers` more processes, or this one alone if it is 1.

    Raises:
        ValueError: a process died, or an error of the source.
    """
    if workers == 1:
        palette = load_palette(palette_file)
        yield from (prepare(source, palette, task) for task in tasks)
        return
    context = multiprocessing.get_context("forkserver")  # a fork would copy the locks of this process's threads
    context.set_forkserver_preload([__name__])
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # workers inherit it: only this process reacts to Ctrl-C
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    ahead: deque[Future[Prepared]] = deque()
    with process_pool(workers, begin=_begin, words=(source.name, source.labels, palette_file)) as pool:
        for task in tasks:
            ahead.append(pool.submit(_work, task))
            if len(ahead) >= _AHEAD * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


_worker: dict[str, tuple[Source, Palette]] = {}  # in a worker process: what it opened at its start


def _begin(source_name: str, labels: str, palette_file: Path) -> None:
    import torch  # its threads would compete with the other processes

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker["opened"] = open_source(source_name, labels), load_palette(palette_file)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # a killed parent cannot end its workers
    os._exit(1)


def _work(task: Task) -> Prepared:
    return prepare(*_worker["opened"], task)
