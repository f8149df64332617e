"""The flags of checkpoints, which train.py and finetune.py share. Called by train/flags.py and train/finetune_flags.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from igpt_ds.errors import InputError
from igpt_ds.plan.costs import KEEP_LAST
from igpt_ds.train.cadence import FAST_SHARE, SAVE_EVERY, steps_or_auto


def add_checkpoint_flags(parser: argparse.ArgumentParser, save_every: int | None = SAVE_EVERY) -> None:
    """How often the run saves, and what it keeps. save_every is the default; None for that of --val_every."""
    group = parser.add_argument_group("checkpoints")
    save = (
        "steps between checkpoints; 0 saves only at the end; auto measures the cost of a save, and saves at least every 2 hours"
    )
    save += " (default: --val_every)" if save_every is None else ""
    group.add_argument("--save_every", type=steps_or_auto, metavar="STEPS", default=save_every, help=save)
    how = "async: training goes on while a checkpoint is written, from a copy in host memory; sync: it waits (default: async, or"
    group.add_argument("--save", choices=("async", "sync"), help=f"{how} sync where a node has too little memory for the copy)")
    fast = "local disk or /dev/shm that takes saves more often; --resume auto continues from the newest state (default: none)"
    group.add_argument("--fast_dir", type=Path, metavar="DIR", help=fast)
    often = (
        f"steps between saves into --fast_dir (default: --save_every / {FAST_SHARE}; {SAVE_EVERY // FAST_SHARE} with auto and 0)"
    )
    group.add_argument("--fast_save_every", type=int, metavar="STEPS", help=often)
    copies = "each node keeps a copy of its neighbour's saves in --fast_dir, so that a lost node costs no steps"
    group.add_argument("--fast_copies", action="store_true", help=copies)
    last = "number of newest checkpoints to keep"
    group.add_argument("--keep_last", type=int, metavar="CHECKPOINTS", default=KEEP_LAST, help=last)
    keep_every = "keep every checkpoint whose step is a multiple of this number; 0 disables"
    group.add_argument("--keep_every", type=int, metavar="STEPS", default=0, help=keep_every)
    keep_steps = "steps whose checkpoints are saved and kept, beside all others (default: none)"
    group.add_argument("--keep_steps", type=int, nargs="+", metavar="STEP", default=[], help=keep_steps)


def check_checkpoint_flags(args: argparse.Namespace) -> None:
    """Checks their values.

    Raises:
        ValueError: a value is out of range, or needs another flag.
    """
    if args.keep_steps and min(args.keep_steps) < 1:
        raise InputError(f"--keep_steps {min(args.keep_steps)} must be at least 1")
    if args.fast_save_every is not None and args.fast_dir is None:
        raise InputError(f"--fast_save_every {args.fast_save_every} needs --fast_dir")
    if args.fast_copies and args.fast_dir is None:
        raise InputError("--fast_copies needs --fast_dir, on a disk of each node or in /dev/shm")
