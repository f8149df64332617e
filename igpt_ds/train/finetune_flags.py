"""The command line of finetune.py. In: words. Out: checked values, of which train/finetuning.py makes a recipe.

train/flags.py adds the flags that finetune.py shares with train.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.command_line.parser import switch
from igpt_ds.config import GEN_SCALES, LOSSES, get_recipe
from igpt_ds.data.subsets import SUBSETS
from igpt_ds.errors import InputError
from igpt_ds.train.checkpoint.flags import add_checkpoint_flags
from igpt_ds.train.flags import (
    add_data_flags,
    add_machine_flags,
    add_recipe_flags,
    add_run_flags,
    add_safety_flags,
    check_numbers,
)
from igpt_ds.train.sweep import add_search_flag, take_search

EPOCHS, LR = 20, 0.0003
LABEL_STEPS = 400  # of a run with few labels, whose epochs are of a step or two


def parse(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the command line.

    Raises:
        ValueError: a value is out of range, or flags exclude each other.
    """
    parser = cli.parser(description)
    _add_learning_flags(parser)
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, metavar="DIR", required=True, help="directory of labelled token shards")
    labels = "fine-tune on a random balanced subset of this many labels, the same as a low_data probe's (default: all; paper 4.7)"
    data.add_argument("--labels", type=int, metavar="LABELS", help=labels)
    subsets = f"number of random subsets of --labels, one run each, with the mean in --results (default: {SUBSETS})"
    data.add_argument("--subsets", type=int, metavar="SUBSETS", help=subsets)
    add_data_flags(data, val_images="all")
    add_run_flags(parser, val_every=None, required=True)
    result = parser.add_argument_group("result")
    result.add_argument("--out", type=Path, metavar="DIR", help="model dir to write the best step to (default: RUN_DIR/model)")
    results = "results.jsonl that gets a row with the accuracy on --eval_split, measured once at the end (default: no row)"
    result.add_argument("--results", type=Path, metavar="FILE", help=results)
    evaluated = "split that the accuracy in --results is measured on"
    result.add_argument("--eval_split", metavar="SPLIT", default="test", help=evaluated)
    draws = "bert: masks per image that vote at the end (paper 4.6)"
    result.add_argument("--mask_draws", type=int, metavar="MASKS", default=5, help=draws)
    add_checkpoint_flags(parser, save_every=None)
    add_safety_flags(parser)
    add_machine_flags(parser)
    args = parser.parse_args(argv)
    _take_search(args)
    _check(args)
    return args


def _take_search(args: argparse.Namespace) -> None:
    """The learning rate of --search; if no images are left to validate on, also how many steps are best."""
    result = take_search(args)
    if result is None:
        args.lr = LR if args.lr is None else args.lr
    elif args.steps is None and args.val_split in args.train_split.split("+"):
        if result.step is None:
            raise InputError(f"--search {args.search} is of an earlier version and has no best step; give --steps")
        args.steps = result.step


def _add_learning_flags(parser: argparse.ArgumentParser) -> None:
    start = parser.add_argument_group("what training starts from")
    fresh = "whose shape and objective are trained from scratch; needs --untrained"
    config = f"run.json of another run, or a recipe in JSON, {fresh}"
    what = add_recipe_flags(start, f"a recipe {fresh}", config)
    what.add_argument("--model", type=Path, metavar="DIR", help="model dir whose weights training starts from")
    untrained = "train fresh weights in the model's shape, as a baseline, with this random seed instead of --seed"
    start.add_argument("--untrained", type=int, metavar="SEED", help=untrained)
    knobs = parser.add_argument_group("what is learned")
    loss = "loss to minimise; joint is gen_loss + clf_loss (default: joint, paper 2.3; with --untrained clf, paper 4.5)"
    knobs.add_argument("--loss", choices=LOSSES, help=loss)
    scale = "gen_loss per token, as in the released code, or summed over an image's tokens, as in the paper's formula"
    knobs.add_argument("--gen_scale", choices=GEN_SCALES, default="mean", help=scale)
    layer = "layer that the class head reads: n^l for l in 0..n_layer (default: n_layer, the output of ln_f)"
    reads = knobs.add_mutually_exclusive_group()
    reads.add_argument("--layer", type=int, metavar="LAYER", help=layer)
    best = "results.jsonl of tools/linear_probe.py: the class head reads the layer with --model's best probe (paper 4.5)"
    reads.add_argument("--layer_from", type=Path, metavar="FILE", help=best)
    lr = "peak learning rate of Adam; often a tenth of pre-training's, tools/sweep_lr.py searches it"
    knobs.add_argument("--lr", type=float, metavar="RATE", help=f"{lr} (default: {LR:g})")
    add_search_flag(knobs, ", and with --train_split train+val its number of steps to the best validation")
    batch = "images per step, over all ranks; the paper uses 64 for XL"
    knobs.add_argument("--batch_images", type=int, metavar="IMAGES", default=128, help=batch)
    epochs = f"largest number of epochs; one has each training image once (default: {EPOCHS}, with --labels at least "
    knobs.add_argument("--epochs", type=float, metavar="EPOCHS", help=f"{epochs}{LABEL_STEPS} steps)")
    steps = "largest number of optimizer steps (default: --epochs decides)"
    knobs.add_argument("--steps", type=int, metavar="STEPS", help=steps)
    warmup = (
        "epochs with a rising learning rate, constant later (default: 1; a twentieth of a run that is shorter or has --labels)"
    )
    knobs.add_argument("--warmup_epochs", type=float, metavar="EPOCHS", help=warmup)
    patience = "validations in a row without a new best before the run ends; 0 disables"
    knobs.add_argument("--patience", type=int, metavar="VALIDATIONS", default=5, help=patience)
    pad = "pixels of reflection padding before a random crop; 0 disables, 4 is the paper's for CIFAR at 32x32 (3.1), 2 at 16x16"
    knobs.add_argument("--augment_pad", type=int, metavar="PIXELS", default=0, help=pad)
    flip = "mirror a random half of the images"
    switch(knobs, "--augment_flip", False, f"{flip} (default: no)")
    knobs.add_argument("--clip", type=float, metavar="NORM", default=1.0, help="largest gradient norm; 0 disables clipping")
    drop = "probability that dropout zeroes a number of the embeddings or of a block's two outputs; 0 disables"
    knobs.add_argument("--dropout", type=float, metavar="PROBABILITY", default=0.0, help=f"{drop} (paper 4.5: from scratch)")
    decay = "decoupled weight decay (AdamW) of all matrices; 0 disables"
    knobs.add_argument("--weight_decay", type=float, metavar="DECAY", default=0.0, help=decay)
    head = "standard deviation of the fresh class head, and from scratch of the pixels' head; 0: zeros"
    knobs.add_argument("--head_std", type=float, metavar="DEVIATION", default=0.0, help=head)
    spike = "standard deviations above the mean of recent losses at which a loss is an outlier; 0 disables"
    knobs.add_argument("--spike_sigmas", type=float, metavar="DEVIATIONS", default=6.0, help=spike)
    seed = "random seed for the order of images, augmentation and masks"
    knobs.add_argument("--seed", type=int, metavar="SEED", default=0, help=seed)


def _check(args: argparse.Namespace) -> None:
    if args.recipe is not None:
        get_recipe(args.recipe)
    check_numbers(args)
    if args.model is None and args.untrained is None:
        named = f"--recipe {args.recipe}" if args.recipe else f"--config {args.config}"
        raise InputError(f"{named} has no weights; add --untrained SEED for fresh weights, or choose a --model")
    if args.untrained is not None and args.untrained < 0:
        raise InputError(f"--untrained {args.untrained} must be at least 0")
    if args.layer_from is not None and args.untrained is not None:
        raise InputError(f"--layer_from {args.layer_from} is of trained weights; leave it out with --untrained, or give --layer")
    if args.loss == "gen" and args.results:
        raise InputError(
            f"--results {args.results} needs an accuracy, and --loss gen trains no class head; leave out one of them"
        )
    if args.subsets is not None and args.labels is None:
        raise InputError(f"--subsets {args.subsets} needs --labels, the number of labels in each")
    if args.labels is not None and (args.out is not None or args.loss == "gen"):
        wrong = f"--out {args.out}" if args.out else "--loss gen"
        why = "each subset has its model in RUN_DIR/subset-N/model" if args.out else "it uses no labels"
        raise InputError(f"{wrong} does not go with --labels {args.labels}: {why}; leave it out")
    for name, least in (("patience", 0), ("mask_draws", 1), ("batch_images", 1), ("labels", 1), ("subsets", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)} must be at least {least}")
    for name in ("epochs", "warmup_epochs"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name):g} must be a number of at least 0")
