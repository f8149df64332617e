"""Measures a model's likelihood on images: nats and bits per token, bits per sub-pixel, each with its standard error.

    python tools/evaluate.py --model models/s --data shards/imagenet_32 --split test --out likelihood.json
    torchrun --nproc_per_node 8 tools/evaluate.py --model models/s --data shards/imagenet_32 --split test
    python tools/evaluate.py --model models/bert --data shards/imagenet_32 --mask_draws 5
    python tools/evaluate.py --model models/s --images cat.jpg photos

Bits per sub-pixel are bits per token / 3, because one token stands for three colour values. They describe palette colours and do
not compare with the bits per dimension of raw 8-bit images. For an auto-regressive model on --data the published likelihood is
printed too, if it compares. With --images, the nats per token of each image are printed too. Under a launcher the ranks share the
images; the result is bit-identical for any number of ranks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.console import count
from igpt_ds.data.shards.dataset import ImageSet, ShardSet
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.manifest import PRECISIONS
from igpt_ds.evaluate.report.results import add_results, likelihood_row, read_results
from igpt_ds.files import check_writable
from igpt_ds.paper.published import FIGURE_3_NATS
from igpt_ds.provenance import git_commit

with lazy.imports():
    from igpt_ds import dist
    from igpt_ds.api.found import model_dir
    from igpt_ds.data.given_images import GivenImages
    from igpt_ds.evaluate import likelihood
    from igpt_ds.evaluate.features.network import model_images, open_model, pick_device
    from igpt_ds.model.store import ModelInfo, read_info


BERT_FLAGS = ("mask_draws", "mask_prob", "seed")
UNITS = {"nats_per_token": "nats per token", "bits_per_token": "bits per token", "bits_per_sub_pixel": "bits per sub-pixel"}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures on all ranks; rank 0 prints and writes."""
    args = parse(argv)
    lazy.load()
    args.model_dir = model_dir(args.model)
    device = pick_device(args.device)
    if args.results:
        read_results(args.results)  # finds a damaged file before the measurement
    check_writable(args.out, args.results)
    info = read_info(args.model_dir)
    if given := [f"--{name}" for name in BERT_FLAGS if getattr(args, name) is not None and info.objective != "bert"]:
        raise InputError(
            f"{given[0]} is for BERT models, and {args.model} was trained with objective {info.objective!r}; omit it"
        )
    shards: ShardSet | GivenImages = model_images(args.model_dir, args.images) if args.images else ShardSet(args.data, args.split)
    masks = {name: getattr(args, name) for name in ("mask_draws", "seed") if getattr(args, name) is not None}
    settings = likelihood.LikelihoodSettings(args.batch, args.precision, mask_prob=mask_prob(args.mask_prob, info), **masks)
    ids = likelihood.choose_ids(shards.n_images, args.limit)
    model, _ = open_model(args.model_dir, shards)
    nats = likelihood.shard_nats(model.to(likelihood.join_ranks(device)), shards, ids, settings)
    if dist.rank():
        return
    measured = likelihood.summarise(nats)
    size, failing = None, ["the images are named by the user"]
    if isinstance(shards, ShardSet):
        size, failing = likelihood.compare_published(info.config, info.objective, shards, len(ids))
    drawn = likelihood.MaskSettings(settings.mask_draws, settings.mask_prob, settings.seed)
    found = likelihood.Likelihood(
        commit=git_commit(),
        model_hash=info.model_hash,
        objective=info.objective,
        step=info.step,
        dataset=shards.name,
        dataset_hash=shards.dataset_hash,
        palette_hash=shards.palette_hash,
        split=shards.split,
        n_px=shards.n_px,
        n_images=len(ids),
        precision=settings.precision,
        batch=settings.batch,
        masks=drawn if info.objective == "bert" else None,
        summary=measured,
        published=FIGURE_3_NATS[size] if size else None,
        published_does_not_apply=failing,
    )
    if args.out:
        likelihood.LIKELIHOOD.write(args.out, found.to_dict())
    if args.results:
        add_results(args.results, [likelihood_row(found, info.config)])
    if isinstance(shards, GivenImages):
        shards.print_left_out()
        print_each(shards.keys_of(ids), nats)
    report(args, info, shards, settings, measured, len(ids))
    if not args.images:
        print_published(found, failing, size)


def print_published(found: likelihood.Likelihood, failing: Sequence[str], size: str | None) -> None:
    """The measured nats beside OpenAI's, or all that differs, in one line."""
    if size:
        published = FIGURE_3_NATS[size]
        here = found.summary.nats_per_token.mean - published
        print(f"published: {published} nats per token for iGPT-{size} after 1M steps (OpenAI's README); here {here:+.4f}")
    elif found.objective == "ar":
        known, sizes = " / ".join(map(str, FIGURE_3_NATS.values())), " / ".join(FIGURE_3_NATS)
        print(f"published: {known} nats per token for {sizes} do not apply: {'; '.join(failing)}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="model dir, run dir or checkpoint")
    parser.add_argument("--data", type=Path, help="shard directory with the images; this or --images is required")
    parser.add_argument("--images", type=Path, nargs="+", metavar="PATH", help="image files or folders to measure")
    parser.add_argument("--split", default="val", help="split of --data: train, val, test or train+val")
    parser.add_argument("--limit", type=int, help="number of images to measure, evenly spread over the split (default: all)")
    parser.add_argument("--batch", type=int, default=32, help="images per forward pass")
    cli.add_device(parser)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="precision of the matrix products")
    parser.add_argument(
        "--mask_draws", type=int, help="BERT: masks drawn for each image, over which the nats are averaged (default: 1)"
    )
    parser.add_argument(
        "--mask_prob", type=float, help="BERT: probability that a pixel is masked (default: that of the model's training)"
    )
    parser.add_argument("--seed", type=int, help="BERT: random seed of the masks (default: 0)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: none)")
    parser.add_argument("--results", type=Path, help="results.jsonl to add a row to, for Figure 3 (default: none)")
    parser.add_argument(
        "--local_rank", type=int, help="set by the deepspeed launcher and ignored; the environment has the same number"
    )
    args = parser.parse_args(argv)
    if bool(args.data) == bool(args.images):
        raise InputError("--data and --images both give images; give one of them" if args.data else "give --data or --images")
    if args.images and args.results:
        raise InputError("--results is for rows of data sets; give --data, or omit it")
    return args


def mask_prob(asked: float | None, info: ModelInfo) -> float:
    """The given value, else that of the model's training, else the paper's."""
    trained = likelihood.LikelihoodSettings.mask_prob if info.mask_prob is None else info.mask_prob
    return trained if asked is None else asked


def print_each(files: Sequence[str], nats: np.ndarray) -> None:
    """A line for each image."""
    width = max(map(len, [*files, "file"]))
    print(f"{'file'.ljust(width)}  nats per token")
    for file, value in zip(files, nats, strict=True):
        print(f"{file.ljust(width)}  {value:.4f}")


def report(
    args: argparse.Namespace,
    info: ModelInfo,
    shards: ImageSet,
    settings: likelihood.LikelihoodSettings,
    measured: likelihood.Summary,
    n_images: int,
) -> None:
    """Prints the model, the images and one line for each unit."""
    masks = f", {count(settings.mask_draws, 'mask')} of {settings.mask_prob:g}" if info.objective == "bert" else ""
    where = "" if args.images else f"{args.data} split {args.split}: "
    print(f"{args.model} (step {info.step}) on {where}{count(n_images, 'image')}{masks}, {args.precision}")
    for unit, words in UNITS.items():
        mean, error = getattr(measured, unit).mean, getattr(measured, unit).standard_error
        print(f"{words:<18} {mean:.4f}" + ("" if error is None else f" +- {error:.4f}"))
    print(f"uniform guess      {math.log(shards.n_vocab):.4f} nats per token, ln {shards.n_vocab}")


if __name__ == "__main__":
    cli.run(main, ranks=True)
