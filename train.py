"""Pre-trains an Image GPT on token shards under DeepSpeed ZeRO-3.

    deepspeed train.py --recipe igpt_s_ar_32 --data shards/imagenet_32 --run_dir runs/s --ds_config zero3_bf16

starts one rank on every GPU of this machine; `deepspeed --num_gpus 2` starts two ranks, on CPUs if there is no GPU. `torchrun`,
`srun python train.py`, `mpirun -np 2 python train.py` and plain `python train.py` work as well. After an interruption, the same
command with `--resume auto` continues from the newest complete checkpoint. `--dry_run` prints the estimated memory, time and
cost of the run, or with `--gpu h100-80g --gpus 64` that of a cluster, and exits; `--list_recipes` lists the recipes. In bash,
`source tools/completion.sh` completes flags and values by Tab.

Each knob of the recipe is a flag (`--lr 0.001 --n_layer 12`), except the objective: `igpt_s_ar_32` predicts each pixel from the
previous ones, `igpt_s_bert_32` predicts hidden pixels from all others.

Several `--data` directories are mixed by `--data_weights`; the validation loss is measured on the first. If training shards
cannot be mapped into memory, `--stream 'pipe:curl -sf https://host/{shard}'` reads them in sequence. `--train_split train+val`
trains on the validation images too, as the paper's final run (3.1); nothing is validated then.

USR1, TERM, Ctrl-C, a file STOP in the run directory (removed at the next start) and --max_minutes end the run with a checkpoint
and exit status 85. If the loss diverges, training stops with suggestions. If a rank hangs, its stacks are dumped; exit status 86.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial

from igpt_ds import cli, launcher
from igpt_ds.command_line import lazy
from igpt_ds.config import with_warmup_epochs
from igpt_ds.console import next_command
from igpt_ds.data.mixture import Mixture, open_mixture
from igpt_ds.ds_config import Run, join, load_ds_config
from igpt_ds.files import check_writable
from igpt_ds.plan.command import dry_run
from igpt_ds.train.flags import choose_recipe, named_recipe, parse
from igpt_ds.train.run_dir import number_validated
from igpt_ds.train.schedule import warmup_note

with lazy.imports():
    from igpt_ds import dist
    from igpt_ds.data.loader import check_shards
    from igpt_ds.data.streaming import ShardStream
    from igpt_ds.train.engine import check_ds_config
    from igpt_ds.train.loop import fit, pretraining_loss
    from igpt_ds.train.session import Session, open_session
    from igpt_ds.train.stream import batches
    from igpt_ds.train.validation import validation_batch, validation_images, validation_loss


def main(argv: Sequence[str] | None = None) -> None:
    """Trains: opens the images, joins the run, opens a session, runs the loop."""
    args = parse(__doc__ or "", argv)
    lazy.load()
    launcher.map_environment(os.environ)
    images = None if args.dry_run and args.warmup_epochs is None else open_images(args)
    run = choose_run(args, images)
    note = warmup_note(args, named_recipe(args).warmup_steps, run.recipe)
    if args.dry_run or images is None:
        dist.say("\n".join(filter(None, [dry_run(run, args), note])))
        return
    recipe, val_shards = run.recipe, validation_images(args.data[0], args.val_split, args.train_split)
    check_writable(directories=[args.run_dir])
    check_shards(images, recipe.model)
    args.val_images = number_validated(args)
    with open_session(args, run, images, val_shards, note=note) as session:
        validate = None
        if val_shards is not None:
            batch = validation_batch(run, val_shards, args.val_images)
            validate = partial(validation_loss, session.engine, recipe, val_shards, batch, args.val_images)
        fit(session, batches(images, run), pretraining_loss(recipe), validate)
    dist.say(next_step(session))


def next_step(session: Session) -> str:
    """The command that follows this one."""
    if not session.finished:  # --stop_at_step ended it
        return session.resume
    return next_command("python", "tools/consolidate.py", "--run_dir", session.run_dir, "--out", session.run_dir / "model")


def choose_run(args: argparse.Namespace, images: Mixture | ShardStream | None) -> Run:
    """The recipe joined with the ds_config. --warmup_epochs counts the images."""
    recipe, ds_config = choose_recipe(args), load_ds_config(args.ds_config)
    check_ds_config(ds_config, args.ds_config)
    if images is not None and args.warmup_epochs is not None:
        recipe = with_warmup_epochs(recipe, args.warmup_epochs, images.n_originals)
    return join(recipe, ds_config, args.gpus or dist.world_size(), args.micro_batch, args.sequence_parallel)


def open_images(args: argparse.Namespace) -> Mixture | ShardStream:
    """The training images: mapped shards, or a stream with --stream."""
    if args.stream:
        return ShardStream(args.data[0], args.stream, args.train_split)
    return open_mixture(args.data, args.data_weights, args.exclude, args.on_bad, args.max_bad, args.train_split)


if __name__ == "__main__":
    cli.run(main, ranks=True)
