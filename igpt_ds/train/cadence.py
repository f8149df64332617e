"""How often a run logs, validates and saves. In: flags. Out: a `Cadence`. Called by train/session.py and train/loop.py."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from igpt_ds.ds_config import Run

AUTO = "auto"
FAST_SHARE = 10  # saves into the fast directory for each into the run directory
SAVE_EVERY = 1000  # steps, the default of --save_every


@dataclass(frozen=True)
class Cadence:
    """How often things happen, in steps. 0 means never; the last step always logs, validates and saves."""

    log_every: int
    val_every: int
    save_every: int
    keep_last: int
    keep_every: int
    last_step: int
    keep_steps: tuple[int, ...] = ()  # are saved and kept
    auto_save: bool = False  # train/ledger/interval.py decides when to save
    norms_every: int = 0  # norms by layer
    replay_every: int = 0  # a micro batch is computed twice
    fast_save_every: int = 0  # into the fast directory, if there is one

    def due(self, every: int, step: int) -> bool:
        """Whether something that happens every `every` steps happens after this step."""
        return step == self.last_step or (every > 0 and step % every == 0)


def choose_cadence(args: argparse.Namespace, run: Run, n_images: int) -> Cadence:
    """The cadence that the flags ask for. --val_every defaults to an epoch of n_images, --save_every to --val_every."""
    recipe = run.recipe
    val_every = -(-n_images // recipe.batch_images) if args.val_every is None else args.val_every
    auto = args.save_every == AUTO
    save_every = val_every if args.save_every is None else 0 if auto else args.save_every
    last_step = min(recipe.steps, args.stop_at_step or recipe.steps)
    return Cadence(
        log_every=args.log_every,
        val_every=val_every,
        save_every=save_every,
        keep_last=args.keep_last,
        keep_every=args.keep_every,
        last_step=last_step,
        keep_steps=tuple(args.keep_steps),
        norms_every=args.norms_every,
        replay_every=args.replay_every,
        auto_save=auto,
        fast_save_every=args.fast_save_every or max(1, (save_every or SAVE_EVERY) // FAST_SHARE),
    )


def steps_or_auto(text: str) -> int | str:
    """The value of --save_every: a number of steps, or "auto".

    Raises:
        ArgumentTypeError: it is neither.
    """
    if text == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of steps nor {AUTO}") from None
