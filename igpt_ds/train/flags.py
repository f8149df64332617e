"""The command line of train.py. In: words. Out: checked values and a recipe.

Every knob of Recipe and ModelConfig is a flag of the same name. The other flags give paths, intervals and limits; finetune.py
shares most of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from igpt_ds import cli
from igpt_ds.command_line.parser import Print, completing, switch
from igpt_ds.config import INITS, KNOBS, RECIPES, ModelConfig, Recipe, get_recipe, override
from igpt_ds.data.mixture import MAX_BAD, ON_BAD
from igpt_ds.data.shards.verified import MODES
from igpt_ds.ds_config import SHIPPED, load_ds_config
from igpt_ds.errors import InputError
from igpt_ds.plan.command import CLUSTER_FLAGS, add_cluster_flags, add_ds_config_flag, read_cluster
from igpt_ds.plan.costs import VAL_EVERY, VAL_IMAGES
from igpt_ds.plan.recipes import recipe_table
from igpt_ds.plan.shipped import ds_config_names
from igpt_ds.train import run_dir
from igpt_ds.train.checkpoint.flags import add_checkpoint_flags, check_checkpoint_flags
from igpt_ds.train.health.flags import LEAST as HEALTH_LEAST
from igpt_ds.train.health.flags import add_health_flags
from igpt_ds.train.schedule import shorter_warmup
from igpt_ds.train.sweep import add_search_flag, take_search

_FLOATS = ("lr", "eps", "clip", "mask_prob", "spike_sigmas", "dropout", "weight_decay", "head_std")
DS_CONFIG = SHIPPED / "zero3_bf16.json"
LEAST = {
    "sequence_parallel": 1,
    "val_images": 1,
    "val_every": 0,
    "save_every": 0,
    "fast_save_every": 1,
    "log_every": 0,
    "keep_last": 1,
    "keep_every": 0,
    "stop_at_step": 1,
    "seed": 0,
    "spike_skip_images": 1,
    "max_rollbacks": 0,
    **HEALTH_LEAST,
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
    _add_knobs(parser, _named_early(sys.argv[1:] if argv is None else argv))
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, nargs="+", metavar="DIR", help="directories of token shards; validation uses the first"
    )
    weights = "sampling frequency of each --data directory (default: proportional to its number of images, stored views count)"
    data.add_argument("--data_weights", type=float, nargs="+", metavar="WEIGHT", help=weights)
    stream = "URL of training shards to read in sequence, with {shard} for the shard's name (default: the shards in --data)"
    data.add_argument("--stream", metavar="URL", help=stream)
    add_data_flags(data)
    add_run_flags(parser)
    add_checkpoint_flags(parser)
    add_safety_flags(parser)
    add_machine_flags(parser)
    if add_more is not None:
        add_more(parser)
    args = parser.parse_args(argv)
    take_search(args)
    _check(args)
    return args


def add_recipe_flags(group: argparse._ArgumentGroup, use: str, config: str) -> argparse._MutuallyExclusiveGroup:
    """--list_recipes, and the required choice of a --recipe or a --config, to which a program may add more choices."""
    text = "print the recipes with their shape, batch, steps and time on one H100, and exit"
    group.add_argument("--list_recipes", action=Print, table=recipe_table, help=text)
    what = group.add_mutually_exclusive_group(required=True)
    completing(what.add_argument("--recipe", metavar="NAME", help=f"name of {use}; --list_recipes shows all"), RECIPES)
    what.add_argument("--config", type=Path, metavar="FILE", help=config)
    return what


def add_data_flags(group: argparse._ArgumentGroup, val_images: str = f"{VAL_IMAGES:,}") -> None:
    """Which images training reads and leaves out, and which images validation reads.

    Args:
        val_images: the default of --val_images in words.
    """
    split = "split to train on; train+val adds the validation images, so that nothing is validated and the last step counts"
    group.add_argument("--train_split", metavar="SPLIT", default="train", help=split)
    group.add_argument(
        "--exclude", type=Path, nargs="+", metavar="FILE", default=[], help="files that list training images to leave out"
    )
    bad = "what to do about a damaged training image: stop the run, or skip the image and train on the next one"
    group.add_argument("--on_bad", choices=ON_BAD, default="stop", help=bad)
    most = "largest fraction of a dataset's images that --on_bad skip may skip"
    group.add_argument("--max_bad", type=float, metavar="FRACTION", default=MAX_BAD, help=most)
    group.add_argument("--val_split", metavar="SPLIT", default="val", help="split that validation uses")
    images = f"number of validation images, evenly spread over the split; a smaller split is read whole (default: {val_images})"
    group.add_argument("--val_images", type=int, metavar="IMAGES", help=images)
    verify = (
        "when shards are compared with the sha256 in their index before the first step, each by one rank. once: a later start "
        "reads only shards whose size, time or index changed; it does not notice bytes that changed under the same size and "
        "time before it reads the image. always: every start reads all. never: the sizes alone are checked"
    )
    group.add_argument("--verify_shards", choices=MODES, default="once", help=verify)


def add_run_flags(parser: argparse.ArgumentParser, val_every: int | None = VAL_EVERY, required: bool = False) -> None:
    """Where the run writes, how it starts and ends, and how often it validates and logs.

    Args:
        val_every: the default; None for an epoch.
        required: whether even --dry_run needs a --run_dir.
    """
    group = parser.add_argument_group("this run")
    directory = "directory for checkpoints, curves and everything else that the run writes"
    group.add_argument("--run_dir", type=Path, metavar="DIR", required=required, help=directory)
    resume = "auto continues from the newest complete checkpoint; never refuses a run directory that holds a run"
    group.add_argument("--resume", choices=("never", "auto"), default="never", help=resume)
    group.add_argument("--dry_run", action="store_true", help="print the estimated memory, time and cost, and exit")
    last = "step to stop at, with a checkpoint; the learning rate follows the full schedule (default: the last step)"
    group.add_argument("--stop_at_step", type=int, metavar="STEP", help=last)
    limit = "minutes after which the run saves a checkpoint and exits with status 85 (default: no limit)"
    group.add_argument("--max_minutes", type=float, metavar="MINUTES", help=limit)
    validate = "steps between validations; 0: only before the first step and after the last"
    validate += " (default: an epoch)" if val_every is None else ""
    group.add_argument("--val_every", type=int, metavar="STEPS", default=val_every, help=validate)
    log = "steps between rows of train.jsonl; 0 logs only the last step"
    group.add_argument("--log_every", type=int, metavar="STEPS", default=10, help=log)
    wandb = "project in Weights and Biases that also shows the curves (default: none)"
    group.add_argument("--wandb", metavar="PROJECT", help=wandb)


def add_safety_flags(parser: argparse.ArgumentParser) -> None:
    """What is done about a rank that hangs and a loss that diverges."""
    group = parser.add_argument_group("safety")
    hang = "minutes without progress before the run writes all stacks to RUN_DIR/stacks and exits with status 86; 0 disables"
    group.add_argument("--hang_minutes", type=float, metavar="MINUTES", default=20.0, help=hang)
    spike = "what to do when the loss diverges: stop with suggestions, or roll back to the last good checkpoint and skip images"
    group.add_argument("--on_spike", choices=("stop", "rollback"), default="stop", help=spike)
    skip = "number of most recent images that a rollback skips, rounded up to batches (default: all since the checkpoint)"
    group.add_argument("--spike_skip_images", type=int, metavar="IMAGES", help=skip)
    most = "number of rollbacks in this run before it stops"
    group.add_argument("--max_rollbacks", type=int, metavar="ROLLBACKS", default=3, help=most)
    add_health_flags(group)


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """How the run fits the machines, and the machines that --dry_run plans for."""
    group = parser.add_argument_group("machines")
    text = f"DeepSpeed configuration: ZeRO stage, precision, offload; a file, or one of {', '.join(ds_config_names())}"
    add_ds_config_flag(group, f"{text} (default: {DS_CONFIG.stem})", DS_CONFIG)
    micro_batch = "images per rank and micro_step (default: the ds_config's, else all of the rank's share of a step)"
    group.add_argument("--micro_batch", type=int, metavar="IMAGES", help=micro_batch)
    parts = "ranks that share each image (default: the ds_config's, else 1)"
    group.add_argument("--sequence_parallel", type=int, metavar="RANKS", help=parts)
    group.add_argument("--local_rank", type=int, help="set by the deepspeed launcher and ignored; LOCAL_RANK counts")
    add_cluster_flags(parser.add_argument_group("machines that --dry_run plans for, from any machine"))


def _check(args: argparse.Namespace) -> None:
    choose_recipe(args)
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
        if isinstance(value, int) and value < least:
            raise InputError(f"--{name} {value} must be at least {least}")
    for name in ("max_minutes", "hang_minutes"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"--{name} {value:g} must be a number of minutes, at least 0")
    if args.spike_skip_images is not None and args.on_spike != "rollback":
        raise InputError(f"--spike_skip_images {args.spike_skip_images} needs --on_spike rollback")
    check_checkpoint_flags(args)
    if args.wandb is not None:
        require_wandb()
    if not 0 <= args.max_bad < 1:
        raise InputError(f"--max_bad {args.max_bad:g} must be at least 0 and below 1")
    if args.dry_run:
        read_cluster(args)
    elif planned := [f"--{name} {getattr(args, name)}" for name in CLUSTER_FLAGS if getattr(args, name) is not None]:
        fix = f"; deepspeed --num_gpus {args.gpus} {cli.program()} starts as many ranks" if args.gpus else ""
        raise InputError(f"{planned[0]} is only for --dry_run{fix}")
    load_ds_config(args.ds_config)


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


def _named_early(words: Sequence[str]) -> Recipe | None:
    """The recipe that a command line names, for its help; None if it names none that exists."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="?")
    return RECIPES.get(parser.parse_known_args(words)[0].recipe)


def _add_knobs(parser: argparse.ArgumentParser, recipe: Recipe | None) -> None:
    """The recipe, and a flag for each of its values; the help shows the values of `recipe`."""
    values = f"values of {recipe.name}" if recipe else "default: the recipe's value; --recipe NAME --help shows it"
    group = parser.add_argument_group(f"what is learned ({values})")
    add_recipe_flags(group, "the recipe to train", "run.json of another run, or a recipe in JSON, to take the recipe from")
    for field in knob_fields():
        _add_knob(group, field.name, recipe)
    warmup = "epochs of the training images with a rising learning rate; replaces --warmup_steps"
    group.add_argument("--warmup_epochs", type=float, metavar="EPOCHS", help=warmup)
    add_search_flag(group)


def _add_knob(group: argparse._ArgumentGroup, name: str, recipe: Recipe | None) -> None:
    flag, (metavar, text) = f"--{name}", KNOBS[name]
    if recipe:
        value = getattr(recipe, name) if hasattr(recipe, name) else getattr(recipe.model, name)
        shown = " ".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)
        text += f" ({recipe.name}: {'no' if value is False else 'yes' if value is True else shown})"
    if name == "mask_prob" and recipe and recipe.objective != "bert":
        text = text.replace(f": {recipe.mask_prob})", ": has none)")
    if name == "betas":
        group.add_argument(flag, type=float, nargs=2, metavar=metavar, help=text)
    elif name in ("augment_flip", "tied_embeddings"):
        switch(group, flag, None, text)
    elif name == "init":
        group.add_argument(flag, choices=INITS, help=text)
    else:
        kind = float if name in _FLOATS else int
        group.add_argument(flag, type=kind, metavar=metavar, help=text)


def choose_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe of --recipe or --config, changed by the knobs on the command line. Fewer --steps may shorten the warm-up."""
    recipe = named_recipe(args)
    given = {field.name: getattr(args, field.name) for field in knob_fields() if getattr(args, field.name) is not None}
    if args.steps is not None and args.warmup_steps is None:
        given["warmup_steps"] = shorter_warmup(recipe.warmup_steps, args.steps, recipe.steps)
    return override(recipe, **given | ({"betas": tuple(given["betas"])} if "betas" in given else {}))


def named_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe of --recipe or --config, unchanged."""
    return get_recipe(args.recipe) if args.recipe is not None else run_dir.read_recipe(args.config)
