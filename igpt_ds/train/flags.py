"""The command line of train.py: words enter, checked values and a recipe leave.

Every field of Recipe and ModelConfig is a flag of the same name; the other flags say where things lie and how often they happen.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from igpt_ds import cli
from igpt_ds.config import INITS, ModelConfig, Recipe, get_recipe, override
from igpt_ds.data.mixture import MAX_BAD, ON_BAD
from igpt_ds.plan.costs import KEEP_LAST
from igpt_ds.train import run_dir
from igpt_ds.train.metrics import require_wandb

DS_CONFIG = Path(__file__).resolve().parents[2] / "ds_configs" / "zero3_bf16.json"
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
    """The command line; every field of Recipe and ModelConfig is a flag of the same name.

    Args:
        add_more: adds flags of a program that takes those of train.py and some of its own.

    Raises:
        ValueError: a value that cannot be, or flags that do not go together.
    """
    parser = cli.parser(description)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="name of a recipe")
    what.add_argument("--config", type=Path, help="a run.json (or a recipe in JSON) to take the recipe from")
    _add_data_flags(parser)
    parser.add_argument("--run_dir", type=Path, help="where everything is written")
    parser.add_argument("--ds_config", type=Path, default=DS_CONFIG, help="how it fits the machines")
    parser.add_argument("--micro_batch", type=int, help="images per rank and micro_step, instead of the ds_config's")
    parser.add_argument("--sequence_parallel", type=int, help="ranks that share an image, instead of the ds_config's")
    parser.add_argument("--resume", choices=("never", "auto"), default="never", help="auto: from the newest complete checkpoint")
    parser.add_argument("--dry_run", action="store_true", help="print what the run would cost, and stop")
    add_cadence_flags(parser)
    add_guard_flags(parser)
    parser.add_argument("--stop_at_step", type=int, help="stop here, with a checkpoint; the schedule stays the recipe's")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment says the same")
    warmup = "warm up for so many epochs of the training shards, counted in batches, instead of the recipe's warmup_steps"
    parser.add_argument("--warmup_epochs", type=float, help=warmup)
    knobs = parser.add_argument_group("knobs of the recipe (default: the recipe's value)")
    for field in knob_fields():
        knobs.add_argument(f"--{field.name}", **_flag_type(field.name))
    if add_more is not None:
        add_more(parser)
    args = parser.parse_args(argv)
    _check(args)
    return args


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, nargs="+", help="directories of token shards; validation is on the first one's")
    parser.add_argument(
        "--data_weights", type=float, nargs="+", help="how often each of --data is seen; default: by their images"
    )
    parser.add_argument("--exclude", type=Path, nargs="+", default=[], help="lists of training images to leave out")
    parser.add_argument(
        "--on_bad", choices=ON_BAD, default="stop", help="skip: take the next image for a damaged one, and say so"
    )
    parser.add_argument("--max_bad", type=float, default=MAX_BAD, help="fraction of a dataset's images that may be skipped")
    parser.add_argument("--stream", metavar="URL", help="read training shards in sequence from URL with {shard} for their names")


def add_cadence_flags(parser: argparse.ArgumentParser) -> None:
    """How often things happen, and to which images."""
    verify = "compare every shard's sha256 with its index before the first step"
    parser.add_argument("--verify_shards", action=argparse.BooleanOptionalAction, default=True, help=verify)
    parser.add_argument("--val_split", default="val", help="split that the validation loss is measured on")
    parser.add_argument("--val_images", type=int, help="how many of its images, evenly spread; all when left out")
    parser.add_argument("--val_every", type=int, default=1000, help="steps between validation losses")
    parser.add_argument("--save_every", type=int, default=1000, help="steps between checkpoints")
    parser.add_argument("--keep_last", type=int, default=KEEP_LAST, help="how many of the newest checkpoints to keep")
    parser.add_argument("--keep_every", type=int, default=0, help="keep checkpoints at multiples of this step for ever; 0: none")
    parser.add_argument("--log_every", type=int, default=10, help="steps between rows of train.jsonl")


def add_guard_flags(parser: argparse.ArgumentParser) -> None:
    """Who may interrupt a run, and what then."""
    parser.add_argument("--max_minutes", type=float, help="stop after so many, with a checkpoint and exit status 85")
    hang = "end with the stacks of all threads in RUN_DIR/stacks and status 86 after so long without a sign of life; 0: never"
    parser.add_argument("--hang_minutes", type=float, default=20.0, help=hang)
    spike = "what to do when the loss is lost: stop with advice, or go back to the last good checkpoint and leave images out"
    parser.add_argument("--on_spike", choices=("stop", "rollback"), default="stop", help=spike)
    skip = "rollback: leave out so many of the last images seen, in whole batches; all since the checkpoint when left out"
    parser.add_argument("--spike_skip_images", type=int, help=skip)
    parser.add_argument("--max_rollbacks", type=int, default=3, help="rollback: so many in this run, then stop")
    parser.add_argument("--wandb", metavar="PROJECT", help="show the curves in this project of Weights and Biases too")


def _check(args: argparse.Namespace) -> None:
    if not args.dry_run and (args.data is None or args.run_dir is None):
        raise ValueError("--data and --run_dir are needed, except with --dry_run")
    check_numbers(args)
    if args.warmup_epochs is not None and (args.warmup_steps is not None or args.data is None):
        raise ValueError(f"--warmup_epochs {args.warmup_epochs:g} needs --data to count, and no --warmup_steps beside it")
    if args.stream and (len(args.data or ()) > 1 or args.exclude or args.data_weights or args.on_bad == "skip"):
        raise ValueError("--stream takes one --data as it is, without --data_weights, --exclude and --on_bad skip")


def check_numbers(args: argparse.Namespace) -> None:
    """Checks the flags that train.py and finetune.py share.

    Raises:
        ValueError: a value that cannot be, or flags that do not go together.
    """
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} must be at least {least}")
    for name in ("max_minutes", "hang_minutes"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"--{name} {value:g} must be a number of minutes, at least 0")
    if args.spike_skip_images is not None and args.on_spike != "rollback":
        raise ValueError(f"--spike_skip_images {args.spike_skip_images} means nothing without --on_spike rollback")
    if args.wandb is not None:
        require_wandb()
    if not 0 <= args.max_bad < 1:
        raise ValueError(f"--max_bad {args.max_bad:g} must be at least 0 and below 1")


def knob_fields() -> list[dataclasses.Field[Any]]:
    """The fields of Recipe and ModelConfig that a flag may change; the objective is said by the recipe's name, with its lr."""
    fields = [*dataclasses.fields(Recipe), *dataclasses.fields(ModelConfig)]
    return [field for field in fields if field.name not in ("name", "model", "objective", "finetune")]


def _flag_type(name: str) -> dict[str, Any]:
    if name == "betas":
        return {"type": float, "nargs": 2}
    if name == "augment_flip":
        return {"action": argparse.BooleanOptionalAction, "default": None}
    if name == "init":
        return {"choices": INITS}
    return {"type": float if name in ("lr", "eps", "clip", "mask_prob", "spike_sigmas") else int}


def choose_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe named or read, with the knobs that were given."""
    recipe = get_recipe(args.recipe) if args.recipe else run_dir.read_recipe(args.config)
    given = {field.name: getattr(args, field.name) for field in knob_fields() if getattr(args, field.name) is not None}
    return override(recipe, given | ({"betas": tuple(given["betas"])} if "betas" in given else {}))
