"""Makes token shards of a source: every image becomes n_px x n_px, every pixel the nearest colour of the palette.

python tools/make_shards.py --source imagefolder:cifar/train --palette palette.npy --n_px 32 --out shards/cifar32
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.data.images import DEFAULT_FILTER, FILTERS
from igpt_ds.data.palette import load_palette
from igpt_ds.data.shards import IMAGES_PER_SHARD, write_dataset
from igpt_ds.data.sources import DEFAULT_MAX_BAD, open_source


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the palette, writes the dataset directory, prints what is in it."""
    parser = cli.parser(__doc__)
    parser.add_argument("--source", required=True, help="digits: or imagefolder:DIR")
    parser.add_argument("--palette", type=Path, required=True, help="the palette file, .npy")
    parser.add_argument("--n_px", type=int, required=True, help="side of the square images")
    parser.add_argument("--out", type=Path, required=True, help="the dataset directory, new or empty")
    parser.add_argument("--name", help="what tables and figures call these images; the name of --out when left out")
    parser.add_argument("--val_fraction", type=float, default=0.1, help="of the images, for validation; 0 makes no such split")
    parser.add_argument("--images_per_shard", type=int, default=IMAGES_PER_SHARD, help="images in one tar file")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--filter", choices=list(FILTERS), default=DEFAULT_FILTER, help="resizing filter")
    parser.add_argument("--max_bad", type=float, default=DEFAULT_MAX_BAD, help="fraction of images that may be unreadable")
    args = parser.parse_args(argv)

    palette = load_palette(args.palette)
    source = open_source(args.source, args.max_bad)
    start = time.perf_counter()
    index = write_dataset(
        args.out,
        source,
        palette,
        args.n_px,
        val_fraction=args.val_fraction,
        images_per_shard=args.images_per_shard,
        seed=args.seed,
        resize_filter=args.filter,
        name=args.name,
    )
    seconds = time.perf_counter() - start

    for name, split in index["splits"].items():
        print(
            f"{name:<11} {split['n_images']} images in {len(split['shards'])} shards, dataset hash {split['dataset_hash'][:16]}"
        )
    n_images = sum(split["n_images"] for split in index["splits"].values())
    print(f"shards      {args.n_px}x{args.n_px}, {len(palette)} colours, {len(index['classes'])} classes: {args.out}")
    print(f"images      {n_images} at {n_images / seconds:.0f}/s, {index['n_skipped']} unreadable")
    print(f"palette     {palette.hash}")


if __name__ == "__main__":
    cli.run(main)
