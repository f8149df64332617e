"""Finds images of an evaluation set in a training set, and writes the list of training images to exclude.

    python tools/dedup_shards.py --train shards/imagenet32 --eval shards/cifar10_32 --eval_split test --out exclude.json
    python tools/dedup_shards.py --train shards/web --eval shards/cifar10_32 --out exclude.json --sheet pairs.png

Give the list to train.py --exclude. Perceptual hashes (phash, dhash; 64 bits per image) find copies of an image with another
resize, JPEG quality, palette or brightness, and mirrored copies. --method tokens finds images with equal tokens. No method finds
random crops. Flat images are not compared, because images with little contrast have similar hashes. Look at --sheet before you
trust a larger --max_distance.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from igpt_ds import cli
from igpt_ds.data.duplicates import METHODS, Found, find_duplicates
from igpt_ds.data.exclusion import ExclusionReason, write_exclusion
from igpt_ds.data.grids import Texts, cell_scale, save_grid
from igpt_ds.data.images import square
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.errors import InputError
from igpt_ds.files import check_writable

MAX_DISTANCE = 4  # CIFAR-10 in 512 colours: finds 97 % of images made JPEGs of quality 40, and one wrong pair in 400 million
SUSPICIOUS = 0.001  # share of the training set near a single evaluation image
PAIRS_A_ROW = 4


def main(argv: Sequence[str] | None = None) -> None:
    """Compares both sets, writes the list and the sheet, prints a summary."""
    args = parse(argv)
    check_writable(args.out, args.sheet)
    train, evaluated = ShardSet(args.train, args.train_split), ShardSet(args.eval, args.eval_split)
    start = time.perf_counter()
    found = find_duplicates(train, evaluated, args.method, args.max_distance, args.workers)
    seconds = time.perf_counter() - start
    n_shown = sheet(args.sheet, found, train, evaluated, args.pairs) if args.sheet and len(found.train_ids) else 0
    write_exclusion(args.out, train, found.train_ids, about(found, train, evaluated, args))
    n_train, n_found = train.n_images, len(found.train_ids)
    print(f"{n_train} training and {evaluated.n_images} evaluation images, {args.method}, at most {args.max_distance} bits apart")
    print(f"{seconds:.1f} s, {n_train / seconds:.0f} images/s, {found.n_pairs / seconds:.3g} pairs/s, mirror images included")
    print(f"flat, not compared: {found.flat_train} of the training and {found.flat_eval} of the evaluation set")
    print(
        f"{args.out}: {n_found} training images ({n_found / n_train:.4%}) are near {len(set(found.eval_ids))} evaluation images"
    )
    warn(found, n_train)
    if n_shown:
        print(f"{args.sheet}: {n_shown} pairs, the nearest first")
    elif args.sheet:
        print(f"{args.sheet} was not written: there is no pair to show")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--train", type=Path, required=True, help="shard directory of the training set")
    parser.add_argument("--eval", type=Path, required=True, help="shard directory of the evaluation set")
    parser.add_argument("--train_split", default="train", help="split of --train")
    parser.add_argument("--eval_split", default="test", help="split of --eval")
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON list of the training images to exclude, for train.py --exclude"
    )
    parser.add_argument(
        "--method", choices=METHODS, default="phash", help="how images are compared: by a hash, or by equal tokens"
    )
    parser.add_argument(
        "--max_distance",
        type=int,
        help=f"largest number of differing hash bits that counts as equal (default: {MAX_DISTANCE}; tokens: 0)",
    )
    parser.add_argument(
        "--sheet", type=Path, help="PNG of the found pairs, the training image left of the evaluation image (default: none)"
    )
    parser.add_argument("--pairs", type=int, default=64, help="pairs on --sheet, spread over all distances")
    parser.add_argument("--workers", type=int, help="processes (default: the number of cores)")
    args = parser.parse_args(argv)
    if args.method == "tokens" and args.max_distance:
        raise InputError(f"--max_distance {args.max_distance} has no meaning for --method tokens; omit it")
    if args.max_distance is None:
        args.max_distance = 0 if args.method == "tokens" else MAX_DISTANCE
    if args.workers is None:
        args.workers = cores
    if not 1 <= args.pairs <= 10_000:
        raise InputError(f"--pairs {args.pairs} must lie in 1..10000")
    return args


def about(found: Found, train: ShardSet, evaluated: ShardSet, args: argparse.Namespace) -> ExclusionReason:
    """What the list says of how it was made."""
    return ExclusionReason(
        reason=f"near an image of {evaluated.name} split {evaluated.split}",
        method=args.method,
        max_distance=args.max_distance,
        train=train.name,
        eval=evaluated.name,
        eval_split=evaluated.split,
        eval_dataset_hash=evaluated.dataset_hash,
        eval_images_found=len(set(found.eval_ids)),
        flat_train=found.flat_train,
        flat_eval=found.flat_eval,
    )


def warn(found: Found, n_train: int) -> None:
    """Warns if one evaluation image excludes very many training images: its hash may be too common."""
    images, counts = np.unique(found.eval_ids, return_counts=True)
    if len(counts) and counts.max() > max(10, SUSPICIOUS * n_train):
        worst = f"evaluation image {images[counts.argmax()]} alone excludes {counts.max()} training images"
        print(f"warning: {worst}; look at --sheet and use a smaller --max_distance if they differ", file=sys.stderr)


def sheet(path: Path, found: Found, train: ShardSet, evaluated: ShardSet, pairs: int) -> int:
    """Draws at most `pairs` pairs, evenly spread by distance; returns their number."""
    order = np.argsort(found.distances, kind="stable")
    shown = order[np.arange(min(pairs, len(order))) * len(order) // min(pairs, len(order))]
    n_px = max(train.n_px, evaluated.n_px)
    images, captions = [], []
    for place in shown:
        number, other = found.train_ids[[place]], found.eval_ids[[place]]
        images += [
            square(shards.palette.decode(shards.tokens(ids)[0]), n_px) for shards, ids in ((train, number), (evaluated, other))
        ]
        mirror = " mirror" if found.mirrored[place] else ""
        captions += [f"train {number[0]}", f"{other[0]}: {found.distances[place]} bits{mirror}"]
    save_grid(path, np.stack(images), 2 * PAIRS_A_ROW, cell_scale(n_px), Texts(captions))
    return len(shown)


if __name__ == "__main__":
    cli.run(main)
