"""Draws images of a shard directory as one PNG, each with its id and class: the images that the model sees.

    python tools/show_shards.py --data shards/cifar10_32 --split val --out sheet.png

Tokens become the colours of the palette. The images are evenly spread over the split. --seed chooses random images, --first the
first images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from igpt_ds import cli
from igpt_ds.console import count
from igpt_ds.data.grids import CELL, Texts, cell_scale, save_grid
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.errors import InputError

MOST_IMAGES = 10_000  # a sheet of more is no sheet to look at, and fills the memory
NAMED = 12  # classes that are printed


def main(argv: Sequence[str] | None = None) -> None:
    """Opens the split, picks, decodes, writes the PNG."""
    args = parse(argv)
    shards = ShardSet(args.data, args.split)
    ids = pick(shards.n_images, args)
    tokens, labels = shards.tokens(ids), shards.labels(ids)
    names = [shards.classes[label] if 0 <= label < len(shards.classes) else f"label {label}" for label in labels]
    captions = [f"{number}: {name}" for number, name in zip(ids, names, strict=True)]
    save_grid(args.out, shards.palette.decode(tokens), args.columns, args.scale or cell_scale(shards.n_px), Texts(captions))
    print(f"{args.data} split {args.split!r}: {shards.n_images} images, n_px {shards.n_px}, {shards.n_vocab} colours")
    shown = sorted(set(names))
    listed = ", ".join(shown[:NAMED]) + (", ..." if len(shown) > NAMED else "")
    print(f"{len(ids)} shown, {len(shown)} of {count(len(shards.classes), 'class', 'classes')}: {listed}")
    print(args.out)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, help="shard directory")
    parser.add_argument("--split", default="val", help="split of --data: train, val, test or train+val")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--images", type=int, default=64, help="largest number of images to show")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seed", type=int, help="random seed that chooses the images (default: evenly spread over the split)")
    which.add_argument("--first", action="store_true", help="show the first images of the split")
    parser.add_argument("--columns", type=int, default=8, help="images per row")
    parser.add_argument(
        "--scale", type=int, help=f"screen pixels per image pixel (default: images of at least {CELL} screen pixels)"
    )
    args = parser.parse_args(argv)
    for name in ("images", "columns", "scale"):
        if getattr(args, name) is not None and not 1 <= getattr(args, name) <= MOST_IMAGES:
            raise InputError(f"--{name} {getattr(args, name)} must lie in 1..{MOST_IMAGES}")
    if args.seed is not None and args.seed < 0:
        raise InputError(f"--seed {args.seed} must be at least 0")
    return args


def pick(n_images: int, args: argparse.Namespace) -> np.ndarray:
    """The ids to show, int64, rising."""
    n = min(args.images, n_images)
    if args.first:
        return np.arange(n)
    if args.seed is not None:
        return np.sort(np.random.default_rng(args.seed).choice(n_images, n, replace=False))
    return np.arange(n) * n_images // n


if __name__ == "__main__":
    cli.run(main)
