"""Fits a palette to the pixels of a source by k-means (paper 3.2) and writes it as .npy, float32 [n_colors, 3] in [-1, 1].

It reads only the train images of the source. With --n_px each image is cropped and resized as for the shards. A report beside the
palette (palette.json for palette.npy) has the hash, the inertia, the PSNR and the fitted images.

    python tools/fit_palette.py --source cifar10:cifar-10-batches-py --n_px 32 --n_colors 512 --out palette.npy
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from igpt_ds import cli
from igpt_ds.console import next_command
from igpt_ds.data.grids import Texts, save_grid
from igpt_ds.data.images import CROPS, DEFAULT_FILTER, FILTERS, decode_image, square
from igpt_ds.data.left_out import Tally, print_left_out, reason_of
from igpt_ds.data.palette import ColorCounts, Palette, color_codes, fit_colors, report_path, save_palette
from igpt_ds.data.shards.layout import MAX_PX
from igpt_ds.data.shards.merge import DEFAULT_MAX_BAD
from igpt_ds.data.sources import LABELS, Entry, OpenAIArrays, Source, open_source
from igpt_ds.data.workers import process_pool
from igpt_ds.errors import InputError
from igpt_ds.files import check_writable, reserved

_BATCH = 64  # images per job of a worker
_SWATCH_COLUMNS, _N_PREVIEW, _PREVIEW_PX = 32, 12, 64


def main(argv: Sequence[str] | None = None) -> None:
    """Counts and clusters colours, writes the palette and its pictures, prints its quality."""
    args = _arguments(argv)
    check_writable(args.swatch, args.preview)
    with reserved(args.out, report_path(args.out)):
        _fit(args)


def _fit(args: argparse.Namespace) -> None:
    source = open_source(args.source, args.labels)
    if isinstance(source, OpenAIArrays):
        raise InputError(f"{source.name} holds tokens, not pixels; their palette is kmeans_centers.npy of the same release")
    entries = _chosen(source.entries(), args.max_images, args.seed)
    counts, start, n_images, bad = ColorCounts(), time.perf_counter(), 0, Tally()
    worst = ""
    how = _How(source.name, args.labels, args.n_px, args.crop, args.filter, args.seed, args.max_image_pixels)
    jobs = ((how, batch) for batch in _batches(entries))
    with tqdm(desc="colours", unit=" images", leave=False, disable=None) as bar:
        for codes, number, n, errors in _results(_count, jobs, args.workers):
            counts.add_codes(codes, number)
            n_images += n
            worst = worst or next(iter(errors), ("",))[0]
            for _, key, reason, ending in errors:
                bad.add(key, reason, ending=ending)
            bar.update(n + len(errors))
    n_bad = bad.n_lost
    if n_bad > args.max_bad * (n_images + n_bad):
        raise InputError(
            f"{n_bad} of {n_images + n_bad} images are unreadable, more than --max_bad {args.max_bad:g}; first error: {worst}"
        )
    left_out = Tally([*source.left_out.rows(), *bad.rows()])
    left_out.check(source.name, n_images, args.max_bad)
    if not n_images:
        raise InputError(f"source {args.source} lists no train images to fit a palette to")
    counted = time.perf_counter()
    palette, report = fit_colors(*counts.weighted(args.max_pixels, args.seed), args.n_colors, args.seed)
    made = {"seed": args.seed, "source": source.name, "n_px": args.n_px, "crop": args.crop, "filter": args.filter}
    fitted = time.perf_counter()
    if args.swatch:
        save_grid(args.swatch, palette.decode(np.arange(len(palette)))[:, None, None], _SWATCH_COLUMNS, scale=16)
    if args.preview:
        _preview(args, source, how, palette)
    save_palette(args.out, palette, replace(report, **made, n_images=n_images))  # last: who finds it finds all

    print(f"images      {n_images} at {n_images / (counted - start):.0f}/s, {n_bad} unreadable")
    print_left_out(left_out.rows())
    print(f"pixels      {report.n_pixels} of {counts.n_pixels} clustered, {report.n_unique} different colours")
    print(f"inertia     {report.inertia:.6g} (model space)   PSNR {report.psnr:.2f} dB")
    print(f"hash        {palette.hash}")
    print(f"palette     {len(palette)} colours in {fitted - counted:.1f} s: {args.out}, {report_path(args.out).name}")
    how_made = [] if args.crop == "none" else ["--crop", args.crop]
    how_made += [] if args.labels == "use" else ["--labels", args.labels]
    n_px, shards = str(args.n_px or 32), args.out.with_name(f"{args.out.stem}_shards")
    words = ("--source", args.source, "--palette", args.out, "--n_px", n_px, *how_made, "--out", shards)
    print(next_command("python", "tools/make_shards.py", *words))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--source",
        required=True,
        help="images to fit, as KIND:WHERE: cifar10:PATH, imagenet:DIR, imagefolder:DIR, digits: and others",
    )
    parser.add_argument("--out", type=Path, required=True, help="palette file to write, .npy")
    parser.add_argument("--labels", choices=LABELS, default="use", help="ignore: takes the images that make_shards.py then takes")
    parser.add_argument("--n_colors", type=int, default=512, help="number of colours, the model's n_vocab")
    parser.add_argument("--n_px", type=int, help="resize images to n_px x n_px before fitting (default: original size)")
    parser.add_argument("--crop", choices=CROPS, default="none", help="how an image becomes a square (paper 3.1)")
    parser.add_argument("--filter", choices=FILTERS, default=DEFAULT_FILTER, help="resizing filter")
    parser.add_argument(
        "--max_images", type=int, help="largest number of images to read, chosen by a hash of their keys (default: all)"
    )
    parser.add_argument(
        "--max_pixels", type=int, default=1_000_000, help="largest number of pixels to cluster, drawn from all images"
    )
    parser.add_argument("--max_image_pixels", type=int, help="largest image to read, as --max_pixels of make_shards.py")
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the chosen images and pixels, the random crops and the first centres"
    )
    parser.add_argument("--max_bad", type=float, default=DEFAULT_MAX_BAD, help="largest share of images that may be unreadable")
    parser.add_argument("--workers", type=int, default=1, help="processes that read images")
    parser.add_argument("--swatch", type=Path, help="PNG of the colours in their order (default: none)")
    parser.add_argument("--preview", type=Path, help="PNG of some images before and after (default: none)")
    args = parser.parse_args(argv)
    if args.out.suffix != ".npy":
        raise InputError(f"out={args.out} must end in .npy")
    for name in ("max_pixels", "max_images", "max_image_pixels", "n_px", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    if args.n_px is not None and args.n_px > MAX_PX:
        raise InputError(f"n_px={args.n_px} must be at most {MAX_PX}")
    if args.seed < 0:
        raise InputError(f"seed={args.seed} must be at least 0")
    if args.n_px is None and args.crop != "none":
        raise InputError(f"crop={args.crop} needs --n_px")
    return args


def _chosen(entries: Iterator[Entry], max_images: int | None, seed: int) -> Iterator[Entry]:
    """The train entries, in their order; at most max_images of them, those whose keys hash lowest."""
    train = (entry for entry in entries if entry.split == "train")
    if max_images is None:
        return train

    def rank(item: tuple[int, Entry]) -> bytes:
        return hashlib.sha256(json.dumps([seed, item[1].key]).encode()).digest()

    return iter([entry for _, entry in sorted(heapq.nsmallest(max_images, enumerate(train), key=rank), key=lambda item: item[0])])


def _batches(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    while batch := list(itertools.islice(entries, _BATCH)):
        yield batch


_opened = lru_cache(maxsize=1)(open_source)  # once per process: archives are slow to open


class _How(NamedTuple):
    """How images are read: the source, and the arguments of `square` and `decode_image`."""

    source: str
    labels: str
    n_px: int | None
    crop: str
    resize_filter: str
    seed: int
    max_pixels: int | None


def _read(how: _How, entries: list[Entry]) -> Iterator[Any]:
    """Each image as uint8 [h, w, 3], or the ValueError with the reason why it is unreadable."""
    for entry, result in zip(entries, _opened(how.source, how.labels).read(entries), strict=True):
        try:
            if isinstance(result, ValueError):
                raise result
            image = decode_image(result, entry.key, how.max_pixels) if isinstance(result, bytes) else result
        except ValueError as error:
            yield error
            continue
        if how.n_px is not None:
            image = square(image, how.n_px, crop=how.crop, resize_filter=how.resize_filter, seed=how.seed, key=entry.key)
        yield image


def _count(job: tuple[_How, list[Entry]]) -> tuple[np.ndarray, np.ndarray, int, list[tuple[str, str, str, str]]]:
    """In a worker: the colour codes of a batch of images, their counts, the number of images, (error, key, reason, ending)."""
    images = list(_read(*job))
    errors = [
        (str(image), entry.key, reason_of(image), entry.kind)
        for image, entry in zip(images, job[1], strict=True)
        if isinstance(image, ValueError)
    ]
    codes = [color_codes(image).ravel() for image in images if not isinstance(image, ValueError)]
    if not codes:
        return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64), 0, errors
    return (*np.unique(np.concatenate(codes), return_counts=True), len(codes), errors)


def _results(function: Callable[[Any], Any], jobs: Iterator[Any], workers: int) -> Iterator[Any]:
    """function(job) for each job, in order; only a few jobs are in flight, so that memory stays flat."""
    if workers == 1:
        yield from map(function, jobs)
        return
    with process_pool(workers) as pool:
        yield from _in_order(pool, function, jobs, 4 * workers)


def _in_order(pool: Executor, function: Callable[[Any], Any], jobs: Iterator[Any], ahead: int) -> Iterator[Any]:
    waiting = deque(pool.submit(function, job) for job in itertools.islice(jobs, ahead))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(pool.submit(function, job) for job in itertools.islice(jobs, 1))


def _preview(args: argparse.Namespace, source: Source, how: _How, palette: Palette) -> None:
    """Draws pairs: an image, and the same image in the colours of the palette."""
    n_px = args.n_px or _PREVIEW_PX
    entries = list(_chosen(source.entries(), _N_PREVIEW, args.seed))
    images, captions = [], []
    for entry, image in zip(entries, _read(how._replace(n_px=n_px), entries), strict=True):
        if isinstance(image, ValueError):
            continue
        after = palette.decode(palette.encode(image))
        error = float(((image.astype(np.float64) - after) ** 2).mean())
        images += [image, after]
        captions += [entry.key, f"{10 * np.log10(255**2 / error):.1f} dB" if error else "equal"]
    if images:
        save_grid(args.preview, np.stack(images), columns=6, scale=max(1, 128 // n_px), texts=Texts(captions))


if __name__ == "__main__":
    cli.run(main)
