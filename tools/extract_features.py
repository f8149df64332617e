"""Extracts features: the activations of each layer for every image, averaged over positions. All probes read them.

    python tools/extract_features.py --model models/s --data shards/cifar32 --out features/s
    python tools/extract_features.py --model models/s --untrained 0 --data shards/cifar32 --out features/untrained
    python tools/extract_features.py --pixels --data shards/cifar32 --out features/pixels
    python tools/extract_features.py --model models/s --images cat.jpg photos --out features/photos

The first command extracts from the trained model, the second from fresh weights in the same shape, the third takes the colours
alone. The last one reads image files; its features are the split "images", and class folders are labels.

Splits may come one after another: `--splits test` adds that split to the same --out later. Probes read train+val of both splits.

A bert model sees images through masks, as in training (paper 4.6): one mask for each image of train or --images, five for each
image of the other splits, so that five masks can vote. Other numbers, and whole images:

    python tools/extract_features.py --model models/b --data shards/cifar32 --mask_draws 1 10 --out features/b
    python tools/extract_features.py --model models/b --data shards/cifar32 --mask_draws 0 --out features/b_whole

The same command continues an interrupted extraction. On several GPUs or nodes, each process makes a part, and one process merges
the parts. --stream_layers is for a model that does not fit into memory: it reads one block at a time for many images together.

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
from igpt_ds.command_line import lazy
from igpt_ds.console import next_command
from igpt_ds.data.shards.dataset import ImageSet, ShardSet
from igpt_ds.data.shards.layout import WHOLE, Part
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.manifest import DTYPES, KINDS, PRECISIONS, read_feature_manifest
from igpt_ds.evaluate.features.merge import merge_parts
from igpt_ds.files import check_writable

with lazy.imports():
    from igpt_ds.api.found import model_dir
    from igpt_ds.evaluate.features.extract import Extraction, extract, extract_pixels
    from igpt_ds.evaluate.features.network import Network, model_images, open_model, pick_device


SPLITS = ["train", "val"]
say = partial(print, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Merges parts, or extracts the features of the shards."""
    args = parse(argv)
    lazy.load()
    args.model_dir = model_dir(args.model) if args.model else None
    check_writable(directories=[args.out])
    if args.merge:
        merged = merge_parts(args.out, args.merge).splits
        say(f"{args.out}: {sum(about.n_images for about in merged.values())} images of {args.merge} parts")
        say_next(args.out)
        return
    shard_sets = image_sets(args)
    start = time.perf_counter()
    if args.pixels:
        extract_pixels(args.out, shard_sets, dtype=args.dtype, report=say)
    else:
        from_model(args, shard_sets)
    seconds, images = time.perf_counter() - start, sum(shards.n_images for shards in shard_sets)
    if args.part != WHOLE:
        say(f"part {args.part.i}: {seconds:.1f} s")
        return
    say(f"{args.out}: {images} images in {seconds:.1f} s")
    if not args.images:
        say_next(args.out)


def say_next(out: Path) -> None:
    """Prints the command that probes these features: fitted on train and read on val, or on their first split and their last."""
    splits = list(read_feature_manifest(out).splits)
    if len(splits) < 2:  # others may follow
        return
    flags = [] if {"train", "val"} <= set(splits) else ["--train_split", splits[0], "--eval_split", splits[-1]]
    results = out.with_name("results.jsonl")
    say(next_command("python", "tools/linear_probe.py", "--features", out, *flags, "--out", results))


def image_sets(args: argparse.Namespace) -> Sequence[ImageSet]:
    """The splits of --data, or the images that the user names."""
    if not args.images:
        return [ShardSet(args.data, split) for split in args.splits]
    images = model_images(args.model_dir, args.images)
    images.print_left_out()
    return [images]


def from_model(args: argparse.Namespace, shard_sets: Sequence[ImageSet]) -> None:
    """Extracts from the model of the command line."""
    device = pick_device(args.device)
    model, origin = open_model(args.model_dir, shard_sets[0], args.untrained, blocks_elsewhere=bool(args.stream_layers))
    blocks = args.model_dir / "model.safetensors" if args.stream_layers else None
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
    parser.add_argument("--model", type=Path, help="model dir, run dir or checkpoint; required without --pixels and --merge")
    parser.add_argument(
        "--untrained", type=int, metavar="SEED", help="use fresh weights, drawn with this random seed, in the shape of --model"
    )
    parser.add_argument(
        "--pixels", action="store_true", help="write the palette colours of the images as features, without a model"
    )
    parser.add_argument("--data", type=Path, help="shard directory with the images; this, --images or --merge is required")
    parser.add_argument("--images", type=Path, nargs="+", metavar="PATH", help="image files or folders to extract from")
    parser.add_argument("--splits", "--split", nargs="+", default=SPLITS, help="splits of --data to extract, also one by one")
    parser.add_argument("--out", type=Path, required=True, help="feature directory to make")
    parser.add_argument("--layers", type=int, nargs="+", help="layers to extract, 0..n_layer (default: all)")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="features to extract: normed, after the layer norm; raw, before it",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=32,
        help="images per forward pass; on a CPU more than 32 are slower, because they exceed the caches",
    )
    cli.add_device(parser)
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="precision of the matrix products and their weights"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="precision of the feature files")
    draws = "bert models: masks that each image is seen through, one number or one for each split; 0: whole images"
    parser.add_argument("--mask_draws", type=int, nargs="+", help=f"{draws} (default: 1 for train, 5 for other splits)")
    parser.add_argument("--mask_seed", type=int, default=0, help="random seed of the masks")
    parser.add_argument(
        "--stream_layers",
        type=int,
        metavar="IMAGES",
        help=(
            "hold one block in memory at a time and read it from its file once per this many images (default: hold all blocks)"
        ),
    )
    parser.add_argument(
        "--part", type=part, default=WHOLE, metavar="I/N", help="extract only part I of N of the images, I from 0 to N-1"
    )
    parser.add_argument(
        "--merge", type=int, metavar="N", help="make --out of its N parts and remove the parts; needs no other flag"
    )
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
    """Refuses combinations of flags that have no meaning."""
    if args.merge is not None:
        if args.merge < 1:
            raise InputError(f"--merge {args.merge} must be at least 1")
        return
    if args.data is None and args.images is None:
        raise InputError("--data is missing; name the shards, or give --images or --merge")
    if args.images and (args.data or args.pixels):
        other, fix = ("--data", "give one of them") if args.data else ("--pixels", "take the pixels of shards")
        raise InputError(f"--images does not go with {other}; {fix}")
    for name in ("splits", "kinds"):
        if twice := [value for value in getattr(args, name) if getattr(args, name).count(value) > 1]:
            raise InputError(f"--{name} {' '.join(getattr(args, name))} names {twice[0]!r} twice; name each once")
    of_models = (args.model, args.untrained, args.layers, args.mask_draws)
    if args.pixels and (any(value is not None for value in of_models) or args.part != WHOLE):
        raise InputError("--pixels needs no model; leave out --model, --untrained, --layers, --mask_draws and --part")
    if not args.pixels and args.model is None:
        raise InputError("--model is missing; name a model dir, or give --pixels")
    if args.stream_layers is not None and (args.stream_layers < 1 or args.untrained is not None):
        wrong = "with --untrained" if args.untrained is not None else args.stream_layers
        raise InputError(f"--stream_layers {wrong}: name at least 1 image, and a trained model, whose blocks lie in a file")


if __name__ == "__main__":
    cli.run(main)
