"""Makes token shards: every image becomes n_px x n_px pixels, every pixel becomes the nearest colour of the palette.

    python tools/make_shards.py --source cifar10:cifar-10-python.tar.gz --palette palette.npy --n_px 32 --out shards/cifar10_32
    python tools/make_shards.py --source imagenet:ILSVRC2012 --crop random --palette palette.npy --n_px 64 --out shards/in64

Sources: digits:, imagefolder:DIR, imagenet:DIR, cifar10:PATH, cifar100:PATH, stl10:PATH, webdataset:TARS, openai:PREFIX (the
token arrays PREFIX_trX.npy ... of OpenAI's release). A source may have test images of its own; others come from another folder,
imagefolder:DIR,test=DIR2, or are split off by --test_fraction.
The tool writes OUT.making and renames it to OUT when all shards exist. The same command continues after an interruption. To share
the work among machines, run `--stage list` once, then `--stage write --part 0/16` to `15/16`, then `--stage merge`, with the same
other flags.
"""

from __future__ import annotations

import os
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.config import RECIPES
from igpt_ds.console import count, next_command
from igpt_ds.data.images import CROPS, DEFAULT_FILTER, FILTERS
from igpt_ds.data.left_out import print_left_out
from igpt_ds.data.palette import load_palette
from igpt_ds.data.shards.build import check_work, list_images, write_shards
from igpt_ds.data.shards.index import ShardIndex
from igpt_ds.data.shards.layout import IMAGES_PER_SHARD, WHOLE, Part, ShardOptions
from igpt_ds.data.shards.merge import DEFAULT_MAX_BAD, finish_begun, making, merge_shards
from igpt_ds.data.sources import LABELS, dataset_name, open_source
from igpt_ds.errors import InputError
from igpt_ds.files import check_writable

CROP_HELP = (
    "none: the shorter side to n_px, then the central square; center: the shorter side to 224, the central 224x224, then n_px; "
    "random: the shorter side to 256..384, a random 224x224, then n_px, and center for validation and test images (paper 3.1)"
)
LABELS_HELP = "ignore: images need no labels, and those of imagefolder: and imagenet: may lie at any depth"
STAGES = ("all", "list", "write", "merge")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the stages of --stage and prints the result."""
    parser = cli.parser(__doc__ or "")
    add_flags(parser)
    args = parser.parse_args(argv)
    if args.part != WHOLE and args.stage != "write":
        raise InputError(f"--part belongs to --stage write, not {args.stage}")

    check_work(args.part, args.workers, args.max_bad)
    check_writable(directories=[args.out])
    source, palette, start = open_source(args.source, args.labels), load_palette(args.palette), time.perf_counter()
    shape = args.filter, args.crop, args.views, args.max_pixels
    options = ShardOptions(args.n_px, args.val_fraction, args.images_per_shard, args.seed, *shape, args.test_fraction)
    settings = options.settings(source, palette)
    if index := finish_begun(args.out, settings):
        print_index(args.out, index)
        return
    if args.stage in ("write", "merge") and not args.out.exists() and not (making(args.out) / "plan").is_dir():
        raise InputError(f"{args.out} has no list of images; run --stage list before {args.stage}")
    plan = list_images(args.out, source, palette, settings, args.max_bad)
    counts = ", ".join(f"{count} {split}" for split, count in plan.counts.items() if count)
    print(f"listed      {counts} images of {source.name}")
    if args.stage == "list":
        print_left_out(plan.left_out)
    if args.stage in ("all", "write"):
        made = write_shards(args.out, source, part=args.part, workers=args.workers, max_bad=args.max_bad)
        seconds = time.perf_counter() - start
        workers = count(args.workers, "process", "processes")
        print(f"made        {made} images at {made / seconds:.0f}/s by {workers}: part {args.part}")
    if args.stage in ("all", "merge"):
        index = merge_shards(args.out, args.name or dataset_name(args.source), args.max_bad)
        print_index(args.out, index)
        print(next_command(*next_step(args.out, index)))


def next_step(out: Path, index: ShardIndex) -> list[str]:
    """The command for these shards: training, or the likelihood of a model where there is nothing to train on."""
    if "train" not in index.splits:
        split = list(index.splits)[-1]  # test, if there is one
        return ["python", "tools/evaluate.py", "--model", "MODEL_DIR", "--data", str(out), "--split", split]
    launch = ["deepspeed", "train.py"] if has_gpu() else ["deepspeed", "--num_gpus", "2", "train.py", "--ds_config", "zero3_fp32"]
    return [*launch, *train_flags(index), "--data", str(out), "--run_dir", f"{out}_run"]


def has_gpu() -> bool:
    """Whether this machine shows a GPU of NVIDIA or AMD."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))


def train_flags(index: ShardIndex) -> list[str]:
    """The flags of train.py that fit these shards: a recipe of their size, or a small one with their size and colours."""
    known = [recipe for recipe in RECIPES.values() if recipe.objective == "ar"]
    recipe = next((recipe for recipe in known if recipe.model.n_px == index.n_px), RECIPES["cifar10_nano_ar_16"])
    flags = ["--recipe", recipe.name]
    for name in ("n_px", "n_vocab"):
        if getattr(index, name) != getattr(recipe.model, name):
            flags += [f"--{name}", str(getattr(index, name))]
    return flags if "val" in index.splits else [*flags, "--val_split", next(iter(index.splits))]


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this tool."""
    parser.add_argument("--source", required=True, help="images to read, as KIND:WHERE, see above")
    parser.add_argument("--labels", choices=LABELS, default="use", help=LABELS_HELP)
    parser.add_argument("--palette", type=Path, required=True, help="palette file, .npy")
    parser.add_argument("--n_px", type=int, required=True, help="side of the square images in pixels")
    parser.add_argument("--out", type=Path, required=True, help="dataset directory to make, new or empty")
    parser.add_argument("--name", help="name of the images in tables and figures (default: the folder's, or the data set's)")
    what = "share of the training images for validation; 0: no validation split (default: imagenet 0.04, others 0.1; paper 3.1)"
    parser.add_argument("--val_fraction", type=float, help=what)
    what = "share of the training images for testing, where the source has no test images (default: none)"
    parser.add_argument("--test_fraction", type=float, help=what)
    parser.add_argument("--crop", choices=CROPS, default="none", help=CROP_HELP)
    parser.add_argument("--views", type=int, default=1, help="random crops of each training image")
    parser.add_argument("--filter", choices=list(FILTERS), default=DEFAULT_FILTER, help="resizing filter")
    parser.add_argument("--images_per_shard", type=int, default=IMAGES_PER_SHARD, help="images in one tar file")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the validation split and the random crops")
    parser.add_argument("--max_bad", type=float, default=DEFAULT_MAX_BAD, help="largest share of images that may be unreadable")
    what = "largest number of pixels of an image (default: PIL's limit against decompression bombs, 89478485)"
    parser.add_argument("--max_pixels", type=int, help=what)
    parser.add_argument("--workers", type=int, default=cores(), help="processes that make images")
    parser.add_argument("--stage", choices=STAGES, default="all", help="what to do now")
    parser.add_argument("--part", type=part, default=WHOLE, metavar="I/N", help="with --stage write: this part of the shards")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def part(text: str) -> Part:
    """`3/16` -> Part(3, 16)."""
    number, _, total = text.partition("/")
    return Part(int(number), int(total))


def print_index(out: Path, index: ShardIndex) -> None:
    """Prints what the dataset directory holds."""
    for split, about in index.splits.items():
        made = f"{about.n_images} images in {count(len(about.shards), 'shard')}"
        print(f"{split:<11} {made}, dataset hash {about.dataset_hash[:16]}")
    print(f"unreadable  {index.n_unreadable} images")
    print_left_out(index.left_out or [])
    print(f"palette     {index.load_palette(out).name.removeprefix('palette ')}")
    classes = count(len(index.classes), "class", "classes")
    print(f"shards      {index.n_px}x{index.n_px}, {index.n_vocab} colours, {classes}: {out}")


if __name__ == "__main__":
    cli.run(main)
