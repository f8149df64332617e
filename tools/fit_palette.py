"""Fits a palette to the pixels of a source by k-means (paper 3.2) and writes it as .npy, float32 [n_colors, 3] in [-1, 1].

All images of the source count, each made n_px x n_px first when --n_px is given, as the shards will be.

    python tools/fit_palette.py --source imagefolder:cifar/train --n_px 32 --n_colors 512 --out palette.npy
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from igpt_ds import cli
from igpt_ds.data.images import DEFAULT_FILTER, FILTERS, fit_to_square
from igpt_ds.data.palette import ColorCounts, fit_colors, save_palette
from igpt_ds.data.sources import DEFAULT_MAX_BAD, open_source


def main(argv: Sequence[str] | None = None) -> None:
    """Counts colours, clusters them, writes the palette, prints what it is worth."""
    parser = cli.parser(__doc__)
    parser.add_argument("--source", required=True, help="digits: or imagefolder:DIR")
    parser.add_argument("--out", type=Path, required=True, help="the palette file, .npy")
    parser.add_argument("--n_colors", type=int, default=512, help="colours of the palette, the model's n_vocab")
    parser.add_argument("--n_px", type=int, help="make the images n_px x n_px first; as they are when left out")
    parser.add_argument("--filter", choices=list(FILTERS), default=DEFAULT_FILTER, help="resizing filter")
    parser.add_argument("--max_pixels", type=int, default=1_000_000, help="cluster at most this many pixels, drawn from all")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn pixels and of the first centres")
    parser.add_argument("--max_bad", type=float, default=DEFAULT_MAX_BAD, help="fraction of images that may be unreadable")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise ValueError(f"{args.out} exists already; choose another name or remove it")
    if args.max_pixels < 1:
        raise ValueError(f"max_pixels={args.max_pixels} must be at least 1")

    source = open_source(args.source, args.max_bad)
    counts, start = ColorCounts(), time.perf_counter()
    for _, image, _ in tqdm(source, total=len(source), desc="colours", unit=" images", leave=False, disable=None):
        counts.add(fit_to_square(image, args.n_px, args.filter) if args.n_px is not None else image)
    counted = time.perf_counter()
    palette, report = fit_colors(*counts.weighted(args.max_pixels, args.seed), args.n_colors, args.seed)
    save_palette(args.out, palette)

    n_images = len(source) - len(source.skipped)
    print(f"images      {n_images} at {n_images / (counted - start):.0f}/s, {len(source.skipped)} unreadable")
    print(f"pixels      {report['n_pixels']} of {counts.n_pixels} clustered, {report['n_unique']} different colours")
    print(f"palette     {len(palette)} colours in {time.perf_counter() - counted:.1f} s: {args.out}")
    print(f"inertia     {report['inertia']:.6g} (model space)   PSNR {report['psnr']:.2f} dB")
    print(f"hash        {palette.hash}")


if __name__ == "__main__":
    cli.run(main)
