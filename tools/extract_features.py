"""Extracts features: each layer's activations of every image, averaged over positions, once for all probes.

    python tools/extract_features.py --model models/s --data shards/cifar32 --out features/s
    python tools/extract_features.py --model models/s --untrained 0 --data shards/cifar32 --out features/untrained
    python tools/extract_features.py --pixels --data shards/cifar32 --out features/pixels

The first is of the trained model, the second of one of the same shape with fresh weights, the third of the colours alone.
Needs no GPU and no process group.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.data.shards import ShardSet
from igpt_ds.evaluate.features import (
    KINDS,
    PRECISIONS,
    check_layers,
    estimated_bytes,
    extract,
    extract_pixels,
    open_model,
    pick_device,
    span,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Opens the shards, says how much will be written, writes it."""
    args = parse(argv)
    shard_sets = [ShardSet(args.data, split) for split in args.splits]
    n_images = sum(shards.n_images for shards in shard_sets)
    start = time.perf_counter()
    if args.pixels:
        announce(args.out, n_images, 3 * shard_sets[0].n_px ** 2, [0], ["pixels"])
        extract_pixels(args.out, shard_sets)
    else:
        model, origin = open_model(args.model, shard_sets[0], args.untrained)
        layers = check_layers(args.layers, model.config.n_layer)
        announce(args.out, n_images, model.config.n_embd, layers, args.kinds)
        extract(
            args.out,
            shard_sets,
            model,
            origin,
            layers=layers,
            kinds=args.kinds,
            batch=args.batch,
            device=pick_device(args.device),
            precision=args.precision,
        )
    seconds = time.perf_counter() - start
    print(f"{args.out}: {n_images} images in {seconds:.1f} s, {n_images / seconds:.1f} images/s")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("--model", type=Path, help="model dir; needed unless --pixels")
    parser.add_argument("--untrained", type=int, metavar="SEED", help="fresh weights of this seed in the model's shape")
    parser.add_argument("--pixels", action="store_true", help="the palette colours themselves, without a model")
    parser.add_argument("--data", type=Path, required=True, help="shards to read")
    parser.add_argument("--splits", nargs="+", default=["train", "val"], help="splits of the shards")
    parser.add_argument("--out", type=Path, required=True, help="feature directory to make")
    parser.add_argument("--layers", type=int, nargs="+", help="layers 0..L; all when left out")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="after the layer norm, or before")
    parser.add_argument(
        "--batch", type=int, default=32, help="images at a time; more than 32 are slower on a CPU, whose caches they overflow"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the matrix products")
    args = parser.parse_args(argv)
    if args.pixels and (args.model is not None or args.untrained is not None or args.layers is not None):
        raise ValueError("--pixels needs no model; leave out --model, --untrained and --layers")
    if not args.pixels and args.model is None:
        raise ValueError("--model is missing; name a model dir, or give --pixels")
    return args


def announce(out: Path, n_images: int, n_features: int, layers: Sequence[int], kinds: Sequence[str]) -> None:
    """One line on what will be written."""
    mebibytes = estimated_bytes(n_images, n_features, len(layers), len(kinds)) / 2**20
    what = f"{n_images} images, layers {span(layers)}, {' and '.join(kinds)}, {n_features} features"
    print(f"{out}: {what}, {mebibytes:.1f} MiB", flush=True)


if __name__ == "__main__":
    cli.run(main)
