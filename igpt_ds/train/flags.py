"""The command line of train.py. In: words. Out: checked values and a recipe.

Every knob of Recipe and ModelConfig is a flag of the same name. The other flags give paths, intervals and limits; finetune.py
shares most of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from igpt_ds import cli
from igpt_ds.config import INITS, ModelConfig, Recipe, get_recipe, override
from igpt_ds.data.mixture import MAX_BAD, ON_BAD
from igpt_ds.ds_config import SHIPPED
from igpt_ds.errors import InputError
from igpt_ds.plan.costs import KEEP_LAST
from igpt_ds.train import run_dir

DS_CONFIG = SHIPPED / "zero3_bf16.json"
KNOBS = {  # help texts
    "batch_images": "images per step, over all ranks",
    "steps": "number of optimizer steps",
    "lr": "peak learning rate",
    "warmup_steps": "steps with a rising learning rate, before the cosine",
    "mask_prob": "probability that bert hides a pixel, between 0 and 1",
    "init": "how fresh weights are drawn",
    "betas": "the two decay rates of Adam",
    "eps": "epsilon of Adam",
    "spike_window": "number of recent normal losses that the spike guard compares with",
    "spike_sigmas": "standard deviations above their mean at which a loss is an outlier; 0 disables",
    "spike_patience": "outliers in a row that count as a spike",
    "clip": "largest gradient norm; 0 disables clipping",
    "augment_pad": "pixels of reflection padding before a random crop; 0 disables",
    "augment_flip": "mirror a random half of the images",
    "seed": "random seed for weights, order of images, augmentation and masks",
    "n_layer": "number of transformer blocks",
    "n_head": "number of attention heads",
    "n_embd": "width of the transformer",
    "n_px": "width and height of an image in pixels",
    "n_vocab": "number of palette colours",
}
LEAST = {
    "sequence_parallel": 1,
    "val_images": 1,
    "val_every": 0,
    "save_every": 0,
    "log_every": 0,
    "keep_last": 1,
    "keep_every": 0,
    "stop_at_step": 1,
    "seed": 0,
    "spike_skip_images": 1,
    "max_rollbacks": 0,
}


def parse(
    description: str, argv: Sequence[str] | None, add_more: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """Parses and checks the command line.

    Args:
        add_more: adds the flags of a program that extends train.py.

    Raises:
        ValueError: a value is out of range, or flags exclude each other.
    """
    parser = cli.parser(description)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="name of the recipe to train")
    what.add_argument("--config", type=Path, help="run.json of another run, or a recipe in JSON, to take the recipe from")
    parser.add_argument("--data", type=Path, nargs="+", help="directories of token shards; validation uses the first one")
    weights = "relative sampling frequency of each --data directory (default: proportional to its number of images)"
    parser.add_argument("--data_weights", type=float, nargs="+", help=weights)
    add_image_flags(parser)
    stream = "URL of training shards to read in sequence, with {shard} for the shard's name (default: the shards in --data)"
    parser.add_argument("--stream", metavar="URL", help=stream)
    parser.add_argument("--run_dir", type=Path, help="directory for checkpoints, curves and everything else that the run writes")
    add_machine_flags(parser)
    add_cadence_flags(parser)
    add_guard_flags(parser)
    warmup = (
        "epochs of the training shards with a rising learning rate; replaces --warmup_steps (default: the recipe's warmup_steps)"
    )
    parser.add_argument("--warmup_epochs", type=float, help=warmup)
    knobs = parser.add_argument_group("knobs of the recipe (default: the recipe's value)")
    for field in knob_fields():
        _add_knob(knobs, field.name)
    if add_more is not None:
        add_more(parser)
    args = parser.parse_args(argv)
    _check(args)
    return args


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    """Which training images are left out."""
    parser.add_argument("--exclude", type=Path, nargs="+", default=[], help="files that list training images to leave out")
    bad = "what to do about a damaged training image: stop the run, or skip the image and train on the next one"
    parser.add_argument("--on_bad", choices=ON_BAD, default="stop", help=bad)
    most = "largest fraction of a dataset's images that --on_bad skip may skip"
    parser.add_argument("--max_bad", type=float, default=MAX_BAD, help=most)


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """How the run fits the machines, and how it starts and ends."""
    ds_config = f"DeepSpeed configuration: ZeRO stage, precision, offload (default: ds_configs/{DS_CONFIG.name})"
    parser.add_argument("--ds_config", type=Path, default=DS_CONFIG, help=ds_config)
    micro_batch = "images per rank and micro_step (default: the ds_config's, else all of the rank's share of a step)"
    parser.add_argument("--micro_batch", type=int, help=micro_batch)
    parser.add_argument("--sequence_parallel", type=int, help="ranks that share each image (default: the ds_config's, else 1)")
    resume = "auto continues from the newest complete checkpoint; never refuses a run directory that holds a run"
    parser.add_argument("--resume", choices=("never", "auto"), default="never", help=resume)
    parser.add_argument("--dry_run", action="store_true", help="print the estimated memory, time and cost, and exit")
    last = "step to stop at, with a checkpoint; the learning rate follows the full schedule (default: the last step)"
    parser.add_argument("--stop_at_step", type=int, help=last)
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher and ignored; LOCAL_RANK counts")


def add_cadence_flags(parser: argparse.ArgumentParser, val_every: int | None = 1000, save_every: int | None = 1000) -> None:
    """How often the run validates, saves and logs, and on which images it validates.

    Args:
        val_every: the default; None for an epoch.
        save_every: the default; None for that of val_every.
    """
    verify = "before the first step, compare every shard's sha256 with the index"
    parser.add_argument("--verify_shards", action=argparse.BooleanOptionalAction, default=True, help=verify)
    parser.add_argument("--val_split", default="val", help="split that validation uses")
    images = "number of validation images, evenly spread over the split (default: all)"
    parser.add_argument("--val_images", type=int, help=images)
    validate = "steps between validations; 0: only before the first step and after the last"
    validate += " (default: an epoch)" if val_every is None else ""
    parser.add_argument("--val_every", type=int, default=val_every, help=validate)
    save = "steps between checkpoints; 0 saves only at the end" + (" (default: --val_every)" if save_every is None else "")
    parser.add_argument("--save_every", type=int, default=save_every, help=save)
    parser.add_argument("--keep_last", type=int, default=KEEP_LAST, help="number of newest checkpoints to keep")
    keep_every = "keep every checkpoint whose step is a multiple of this number; 0 disables"
    parser.add_argument("--keep_every", type=int, default=0, help=keep_every)
    parser.add_argument("--log_every", type=int, default=10, help="steps between rows of train.jsonl; 0 logs only the last step")


def add_guard_flags(parser: argparse.ArgumentParser) -> None:
    """What may stop the run, and where else its curves are shown."""
    limit = "minutes after which the run saves a checkpoint and exits with status 85 (default: no limit)"
    parser.add_argument("--max_minutes", type=float, help=limit)
    hang = "minutes without progress before the run writes all stacks to RUN_DIR/stacks and exits with status 86; 0 disables"
    parser.add_argument("--hang_minutes", type=float, default=20.0, help=hang)
    spike = "what to do when the loss diverges: stop with suggestions, or roll back to the last good checkpoint and skip images"
    parser.add_argument("--on_spike", choices=("stop", "rollback"), default="stop", help=spike)
    skip = "number of most recent images that a rollback skips, rounded up to batches (default: all since the checkpoint)"
    parser.add_argument("--spike_skip_images", type=int, help=skip)
    parser.add_argument("--max_rollbacks", type=int, default=3, help="number of rollbacks in this run before it stops")
    wandb = "project in Weights and Biases that also shows the curves (default: none)"
    parser.add_argument("--wandb", metavar="PROJECT", help=wandb)


def _check(args: argparse.Namespace) -> None:
    if not args.dry_run and (args.data is None or args.run_dir is None):
        raise InputError("--data and --run_dir are required, except with --dry_run")
    check_numbers(args)
    if args.warmup_epochs is not None and (args.warmup_steps is not None or args.data is None):
        raise InputError(f"--warmup_epochs {args.warmup_epochs:g} needs --data to count, and no --warmup_steps beside it")
    if args.stream and (len(args.data or ()) > 1 or args.exclude or args.data_weights or args.on_bad == "skip"):
        raise InputError("--stream takes one --data as it is, without --data_weights, --exclude and --on_bad skip")


def check_numbers(args: argparse.Namespace) -> None:
    """Checks the flags that train.py and finetune.py share.

    Raises:
        ValueError: a value is out of range, or flags exclude each other.
    """
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name} {value} must be at least {least}")
    for name in ("max_minutes", "hang_minutes"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"--{name} {value:g} must be a number of minutes, at least 0")
    if args.spike_skip_images is not None and args.on_spike != "rollback":
        raise InputError(f"--spike_skip_images {args.spike_skip_images} needs --on_spike rollback")
    if args.wandb is not None:
        require_wandb()
    if not 0 <= args.max_bad < 1:
        raise InputError(f"--max_bad {args.max_bad:g} must be at least 0 and below 1")


def require_wandb() -> None:
    """Refuses --wandb before anything starts if the package is missing.

    Raises:
        ValueError: wandb is not installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise InputError("--wandb needs the package wandb, which is not installed: pip install wandb, or leave --wandb out")


def knob_fields() -> list[dataclasses.Field[Any]]:
    """The fields of Recipe and ModelConfig that a flag may change. The objective is the recipe's, because its lr fits it."""
    fields = [*dataclasses.fields(Recipe), *dataclasses.fields(ModelConfig)]
    return [field for field in fields if field.name not in ("name", "model", "objective", "finetune")]


def _add_knob(group: argparse._ArgumentGroup, name: str) -> None:
    flag, text = f"--{name}", KNOBS[name]
    if name == "betas":
        group.add_argument(flag, type=float, nargs=2, help=text)
    elif name == "augment_flip":
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif name == "init":
        group.add_argument(flag, choices=INITS, help=text)
    else:
        group.add_argument(flag, type=float if name in ("lr", "eps", "clip", "mask_prob", "spike_sigmas") else int, help=text)


def choose_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe of --recipe or --config, changed by the knobs on the command line."""
    recipe = get_recipe(args.recipe) if args.recipe else run_dir.read_recipe(args.config)
    given = {field.name: getattr(args, field.name) for field in knob_fields() if getattr(args, field.name) is not None}
    return override(recipe, **given | ({"betas": tuple(given["betas"])} if "betas" in given else {}))
