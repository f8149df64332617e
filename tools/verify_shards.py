"""Reads all shards of a dataset directory, compares them with the index and prints the damaged images.

    python tools/verify_shards.py --data shards/imagenet_32

Exit status: 0 if nothing is damaged, else 1.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from igpt_ds import cli
from igpt_ds.console import count
from igpt_ds.data.shards.index import SPLITS, read_index
from igpt_ds.data.shards.verify import all_damage
from igpt_ds.errors import InputError

NAMED = 20  # largest number of damages that are printed one by one


def main(argv: Sequence[str] | None = None) -> None:
    """Checks palette and shards, prints the damages and the speed."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, help="shard directory")
    parser.add_argument("--split", nargs="+", choices=SPLITS, help="splits to check (default: all)")
    parser.add_argument("--workers", type=int, help="shards that are read at once (default: the number of cores and a few more)")
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers {args.workers} must be at least 1")
    index, start = read_index(args.data), time.perf_counter()
    splits = args.split or list(index.splits)
    if missing := [split for split in splits if split not in index.splits]:
        raise InputError(f"{args.data} has no split {missing[0]!r}; it has {', '.join(index.splits)}")
    index.load_palette(args.data)

    shards = [shard for split in splits for shard in index.splits[split].shards]
    checks, n_damages = all_damage(args.data, shards, index.n_px, args.workers), 0
    for _, found in tqdm(checks, "verify", len(shards), unit=" shards", leave=False, disable=None):
        for damage in found[: max(0, NAMED - n_damages)]:
            tqdm.write(f"damaged: {damage}", file=sys.stderr)
        n_damages += len(found)
    size, seconds = sum(shard.bytes for shard in shards), time.perf_counter() - start
    n_images = sum(shard.n_images for shard in shards)
    checked = f"{count(len(shards), 'shard')} of {', '.join(splits)}"
    print(f"verified    {checked}: {n_images} images, {size / 1e6:.1f} MB")
    print(f"speed       {size / 1e6 / seconds:.0f} MB/s")
    print(f"damaged     {n_damages} images or byte ranges")
    if n_damages:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
