"""Extracts features: each layer's activations of every image, averaged over positions, once for all probes.

    python tools/extract_features.py --model models/s --data shards/cifar32 --out features/s
    python tools/extract_features.py --model models/s --untrained 0 --data shards/cifar32 --out features/untrained
    python tools/extract_features.py --pixels --data shards/cifar32 --out features/pixels

The first is of the trained model, the second of one of the same shape with fresh weights, the third of the colours alone. A
bert model sees whole images, or through masks (paper 4.6); five masks of the images to evaluate on, and one of the others:

    python tools/extract_features.py --model models/b --data shards/cifar32 --mask_draws 1 5 --out features/b

Killed, it goes on where it was when it is given the same command again. On many GPUs or nodes, each makes a part, which one of
them merges in the end. A model that does not fit in memory has its blocks read one at a time for so many images together:

    python tools/extract_features.py --model models/xl --data shards/imagenet64 --precision bf16 --part 0/8 --out features/xl
    python tools/extract_features.py --merge 8 --out features/xl
    python tools/extract_features.py --model models/xl --data shards/imagenet64 --stream_layers 256 --out features/xl

Needs no GPU and no process group.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from igpt_ds import cli
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.layout import WHOLE, Part
from igpt_ds.evaluate.features.extract import Extraction, extract, extract_pixels
from igpt_ds.evaluate.features.files import merge_parts
from igpt_ds.evaluate.features.manifest import DTYPES
from igpt_ds.evaluate.features.network import KINDS, PRECISIONS, Network, open_model, pick_device

say = partial(print, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Merges parts, or opens the shards and writes their features."""
    args = parse(argv)
    if args.merge:
        images = sum(about.n_images for about in merge_parts(args.out, args.merge).splits.values())
        say(f"{args.out}: {images} images of {args.merge} parts")
        return
    shard_sets = [ShardSet(args.data, split) for split in args.splits]
    start = time.perf_counter()
    if args.pixels:
        extract_pixels(args.out, shard_sets, dtype=args.dtype, report=say)
    else:
        from_model(args, shard_sets)
    seconds, images = time.perf_counter() - start, sum(shards.n_images for shards in shard_sets)
    say(f"{args.out}: {images} images in {seconds:.1f} s" if args.part == WHOLE else f"part {args.part.i}: {seconds:.1f} s")


def from_model(args: argparse.Namespace, shard_sets: Sequence[ShardSet]) -> None:
    """Opens the model and extracts."""
    device = pick_device(args.device)
    model, origin = open_model(args.model, shard_sets[0], args.untrained, blocks_elsewhere=bool(args.stream_layers))
    blocks = args.model / "model.safetensors" if args.stream_layers else None
    extract(
        args.out,
        shard_sets,
        Network(model, device, args.precision, blocks, args.batch),
        origin,
        Extraction(args.layers, args.kinds, args.dtype, args.mask_draws, args.mask_seed, args.stream_layers, args.part),
        report=say,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("--model", type=Path, help="model dir; needed unless --pixels")
    parser.add_argument("--untrained", type=int, metavar="SEED", help="fresh weights of this seed in the model's shape")
    parser.add_argument("--pixels", action="store_true", help="the palette colours themselves, without a model")
    parser.add_argument("--data", type=Path, help="shards to read; needed unless --merge")
    parser.add_argument("--splits", nargs="+", default=["train", "val"], help="splits of the shards")
    parser.add_argument("--out", type=Path, required=True, help="feature directory to make")
    parser.add_argument("--layers", type=int, nargs="+", help="layers 0..L; all when left out")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="after the layer norm, or before")
    parser.add_argument(
        "--batch", type=int, default=32, help="images at a time; more than 32 are slower on a CPU, whose caches they overflow"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the matrix products and their weights")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the files")
    parser.add_argument(
        "--mask_draws", type=int, nargs="+", default=[0], help="masks of each image, one number or one a split; 0: whole images"
    )
    parser.add_argument("--mask_seed", type=int, default=0, help="of the masks")
    parser.add_argument(
        "--stream_layers", type=int, metavar="IMAGES", help="hold one block at a time, read anew for so many images together"
    )
    parser.add_argument("--part", type=part, default=WHOLE, metavar="I/N", help="this part of the images, for --merge N")
    parser.add_argument("--merge", type=int, metavar="N", help="make --out of its N parts and remove them; needs no other flag")
    args = parser.parse_args(argv)
    check(args)
    return args


def part(text: str) -> Part:
    """`0/4` -> Part(0, 4)."""
    first, slash, count = text.partition("/")
    if not (slash and first.isdigit() and count.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, as in 0/4")
    return Part(int(first), int(count))


def check(args: argparse.Namespace) -> None:
    """Refuses flags that do not go together."""
    if args.merge is not None:
        if args.merge < 1:
            raise ValueError(f"--merge {args.merge} must be at least 1")
        return
    if args.data is None:
        raise ValueError("--data is missing; name the shards, or give --merge")
    for name in ("splits", "kinds"):
        if twice := [value for value in getattr(args, name) if getattr(args, name).count(value) > 1]:
            raise ValueError(f"--{name} {' '.join(getattr(args, name))} names {twice[0]!r} twice; name each once")
    if args.pixels and (args.model is not None or args.untrained is not None or args.layers is not None or args.part != WHOLE):
        raise ValueError("--pixels needs no model; leave out --model, --untrained, --layers and --part")
    if not args.pixels and args.model is None:
        raise ValueError("--model is missing; name a model dir, or give --pixels")
    if args.stream_layers is not None and (args.stream_layers < 1 or args.untrained is not None):
        wrong = "with --untrained" if args.untrained is not None else args.stream_layers
        raise ValueError(f"--stream_layers {wrong}: name at least 1 image, and a trained model, whose blocks lie in a file")


if __name__ == "__main__":
    cli.run(main)
