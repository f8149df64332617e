"""The command line of finetune.py: words enter, checked values and a recipe leave.

What it shares with train.py is train/flags.py's: how often things happen, guards, stops.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.config import GEN_SCALES, LOSSES, Finetune, Recipe, get_recipe
from igpt_ds.data.mixture import MAX_BAD, ON_BAD
from igpt_ds.model.store import ModelInfo, read_info
from igpt_ds.train.flags import DS_CONFIG, add_cadence_flags, add_guard_flags, check_numbers
from igpt_ds.train.run_dir import read_recipe


def parse(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of finetune.py.

    Raises:
        ValueError: a value that cannot be, or flags that do not go together.
    """
    parser = cli.parser(description)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", type=Path, help="model dir to begin with")
    start.add_argument("--recipe", help="name of the recipe whose shape and objective to train from scratch; needs --untrained")
    start.add_argument("--config", type=Path, help="the same, from a run.json or a recipe in JSON; needs --untrained")
    fresh = "the baseline from scratch: fresh weights in the model's shape; SEED takes the place of --seed"
    parser.add_argument("--untrained", type=int, metavar="SEED", help=fresh)
    parser.add_argument("--data", type=Path, required=True, help="directory of labelled token shards")
    parser.add_argument("--run_dir", type=Path, required=True, help="where everything is written")
    parser.add_argument("--out", type=Path, help="the model dir to make of the best step; RUN_DIR/model when left out")
    parser.add_argument("--results", type=Path, help="results.jsonl: read --eval_split once, at the end, and add a row here")
    parser.add_argument("--eval_split", default="test", help="split that the row's accuracy is measured on")
    parser.add_argument("--mask_draws", type=int, default=5, help="bert: masks that vote on each image in the end (paper 4.6)")
    _add_machine_flags(parser)
    add_cadence_flags(parser)
    parser.set_defaults(val_every=None, save_every=None)  # an epoch
    add_guard_flags(parser)
    _add_learning_flags(parser)
    args = parser.parse_args(argv)
    _check(args)
    return args


def _add_machine_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ds_config", type=Path, default=DS_CONFIG, help="how it fits the machines")
    parser.add_argument("--micro_batch", type=int, help="images per rank and micro_step, instead of the ds_config's")
    parser.add_argument("--sequence_parallel", type=int, help="ranks that share an image, instead of the ds_config's")
    parser.add_argument("--resume", choices=("never", "auto"), default="never", help="auto: from the newest complete checkpoint")
    parser.add_argument("--dry_run", action="store_true", help="print what the run would cost, and stop")
    parser.add_argument("--stop_at_step", type=int, help="stop here, with a checkpoint")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment says the same")
    parser.add_argument("--exclude", type=Path, nargs="+", default=[], help="lists of training images to leave out")
    bad = "skip: take the next image for a damaged one, and say so"
    parser.add_argument("--on_bad", choices=ON_BAD, default="stop", help=bad)
    parser.add_argument("--max_bad", type=float, default=MAX_BAD, help="fraction of the images that may be skipped")


def _add_learning_flags(parser: argparse.ArgumentParser) -> None:
    knobs = parser.add_argument_group("what is learned")
    knobs.add_argument("--loss", choices=LOSSES, default="joint", help="joint: gen_loss + clf_loss (paper 2.3); or one alone")
    scale = "gen_loss per token, as the released code, or summed over an image's tokens, as the paper's formula"
    knobs.add_argument("--gen_scale", choices=GEN_SCALES, default="mean", help=scale)
    knobs.add_argument("--layer", type=int, help="the class head's layer: n^l, 0..L; the last, ln_f's, when left out")
    knobs.add_argument("--lr", type=float, default=0.0003, help="search it (tools/sweep_lr.py): often a tenth of pre-training's")
    knobs.add_argument("--batch_images", type=int, default=128, help="images a step; the paper's 128, with XL 64")
    knobs.add_argument("--epochs", type=float, default=20.0, help="of the training images, at most")
    knobs.add_argument("--steps", type=int, help="at most so many, instead of --epochs")
    knobs.add_argument("--warmup_epochs", type=float, default=1.0, help="with a rising rate; it stays constant afterwards")
    knobs.add_argument("--patience", type=int, default=5, help="validations without a new best that end the run; 0: none do")
    knobs.add_argument("--train_split", default="train", help="train+val folds the validation images in: the last step is kept")
    pad = "reflect-pad by so many pixels, then crop a random window; 4 on CIFAR (paper 3.1)"
    knobs.add_argument("--augment_pad", type=int, default=0, help=pad)
    flip = "mirror half of the images"
    knobs.add_argument("--augment_flip", action=argparse.BooleanOptionalAction, default=False, help=flip)
    knobs.add_argument("--clip", type=float, default=1.0, help="gradient norm; 0: no limit")
    spike = "deviations above the mean that make a loss an outlier; 0 watches for none"
    knobs.add_argument("--spike_sigmas", type=float, default=6.0, help=spike)
    knobs.add_argument("--seed", type=int, default=0, help="of the order of images, augmentation and masks")


def _check(args: argparse.Namespace) -> None:
    check_numbers(args)
    if args.model is None and args.untrained is None:
        named = f"--recipe {args.recipe}" if args.recipe else f"--config {args.config}"
        raise ValueError(f"{named} has no weights; add --untrained SEED for fresh ones, or name a --model")
    if args.untrained is not None and args.untrained < 0:
        raise ValueError(f"--untrained {args.untrained} must be at least 0")
    if args.loss == "gen" and args.results:
        raise ValueError(
            f"--results {args.results} takes an accuracy, and --loss gen trains no class head; leave out one of them"
        )
    for name, least in (("patience", 0), ("mask_draws", 1), ("batch_images", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least {least}")
    for name in ("epochs", "warmup_epochs"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"--{name} {getattr(args, name):g} must be a number of at least 0")


def starting_point(args: argparse.Namespace) -> ModelInfo:
    """The shape and objective to begin with: those of --model, or of --recipe or --config, whose model_hash is "".

    Raises:
        ValueError: no such model dir or recipe, or a file that holds none.
    """
    if args.model is not None:
        return read_info(args.model)
    recipe = get_recipe(args.recipe) if args.recipe else read_recipe(args.config)
    return ModelInfo(recipe.model, recipe.objective, "", 0, 0, "", recipe.mask_prob, recipe.init)


def finetune_recipe(args: argparse.Namespace, info: ModelInfo, n_images: int, n_classes: int) -> Recipe:
    """What is learned.

    Args:
        info: of `starting_point`.
        n_images: of the training split. Where each image was stored as several crops, each crop counts.

    Raises:
        ValueError: values that no recipe takes; shards without classes.
    """
    steps = math.ceil(args.epochs * n_images / args.batch_images) if args.steps is None else args.steps
    layer = info.config.n_layer if args.layer is None else args.layer
    start = info.model_hash if args.untrained is None else ""
    recipe = Recipe(
        "finetune",
        info.config,
        args.batch_images,
        steps,
        args.lr,
        min(steps, math.ceil(args.warmup_epochs * n_images / args.batch_images)),
        info.objective,
        init=info.init,
        spike_sigmas=args.spike_sigmas,
        clip=args.clip,
        augment_pad=args.augment_pad,
        augment_flip=args.augment_flip,
        seed=args.seed if args.untrained is None else args.untrained,
        finetune=Finetune(n_classes, layer, start, args.loss, args.gen_scale),
    )
    return recipe if info.mask_prob is None else dataclasses.replace(recipe, mask_prob=info.mask_prob)
