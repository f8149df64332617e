"""Fine-tunes a pre-trained Image GPT to classify: the loop of train.py with another loss function, gen_loss + clf_loss.

    deepspeed finetune.py --model models/s --data shards/cifar10_32 --run_dir runs/s_cifar10 --augment_pad 4 --augment_flip

trains all weights and a class head on the mean of n^L (paper 2.3, 3.4), with Adam as in pre-training and a learning rate that
rises for an epoch and stays constant. Each epoch ends with a validation. After --patience epochs without a new best the run ends,
and RUN_DIR/model is the model dir of the best step, with its class head. `--results results.jsonl` then evaluates the test split
once, adds a row to that file and writes RUN_DIR/confusion.json. `--untrained 0` trains from scratch.

It starts, stops and resumes as train.py does: `torchrun`, `srun python finetune.py`, `mpirun` and plain `python` work as well.
USR1, TERM, Ctrl-C, a file STOP and --max_minutes end the run with a checkpoint and status 85; `--resume auto` continues. To
search the learning rate:

    python tools/sweep_lr.py --out runs/sweep -- deepspeed finetune.py --model models/s --data shards/cifar10_32
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from functools import partial

from igpt_ds import cli, launcher
from igpt_ds.command_line import lazy
from igpt_ds.console import next_command
from igpt_ds.data.mixture import Mixture, open_mixture
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.index import read_index
from igpt_ds.ds_config import Run, join, load_ds_config
from igpt_ds.errors import InputError
from igpt_ds.evaluate.report.results import add_results, read_results
from igpt_ds.files import check_writable
from igpt_ds.plan.command import dry_run
from igpt_ds.train.checkpoint.directory import choose_checkpoint
from igpt_ds.train.checkpoint.manifest import FinetuneFacts
from igpt_ds.train.early import EarlyStop
from igpt_ds.train.finetune_flags import parse
from igpt_ds.train.schedule import warmup_note

with lazy.imports():
    from igpt_ds import dist
    from igpt_ds.data.loader import check_shards
    from igpt_ds.evaluate.classification import result, write_confusion
    from igpt_ds.model.store import ModelInfo, read_info
    from igpt_ds.train.checkpoint.consolidate import check_own, consolidate
    from igpt_ds.train.checkpoint.save_load import load_checkpoint
    from igpt_ds.train.engine import check_ds_config
    from igpt_ds.train.finetuning import finetune_recipe, finetuning_loss, measure, starting_point
    from igpt_ds.train.loop import fit
    from igpt_ds.train.session import FinetuneStart, Session, open_session
    from igpt_ds.train.stream import batches


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tunes: images and weights, run, session, loop; then the model dir and the test split."""
    args = parse(__doc__ or "", argv)
    lazy.load()
    launcher.map_environment(os.environ)
    images = open_mixture([args.data], None, args.exclude, args.on_bad, args.max_bad, args.train_split)
    start = starting_point(args)
    run = choose_run(args, start, images)
    note = warmup_note(args, math.ceil(images.n_images / args.batch_images), run.recipe)
    if args.dry_run:
        dist.say("\n".join(filter(None, [dry_run(run, args, models=1), note])))
        return
    recipe, held_out = run.recipe, ShardSet(args.data, args.val_split)
    evaluated = ShardSet(args.data, args.eval_split) if args.results else None  # a missing split is an error now, not at the end
    check_start(args, start, images)
    with open_session(args, run, images, held_out, finetune_start(args, start, images), note) as session:
        validate = partial(measure, session.engine, recipe, held_out, run.micro_batch, args.val_images)
        fit(session, batches(images, run, with_labels=True), finetuning_loss(recipe), validate)
        if session.finished:
            conclude(args, session, held_out, evaluated)
    dist.say(next_step(args, session))


def next_step(args: argparse.Namespace, session: Session) -> str:
    """The command that follows this one."""
    if not session.finished:  # --stop_at_step ended it
        return session.resume
    if args.results:
        return next_command("python", "tools/tables.py", "--results", args.results)
    model, evaluated = args.out or args.run_dir / "model", args.eval_split
    if evaluated not in read_index(args.data).splits:
        evaluated = args.val_split
    splits = ("--val_split", args.val_split, "--eval_split", evaluated)
    return next_command("python", "tools/evaluate_classifier.py", "--model", model, "--data", args.data, *splits)


def choose_run(args: argparse.Namespace, start: ModelInfo, images: Mixture) -> Run:
    """The recipe joined with the ds_config."""
    ds_config = load_ds_config(args.ds_config)
    check_ds_config(ds_config, args.ds_config)
    recipe = finetune_recipe(args, start, images.n_images, len(images.classes))
    return join(recipe, ds_config, args.gpus or dist.world_size(), args.micro_batch, args.sequence_parallel)


def check_start(args: argparse.Namespace, start: ModelInfo, images: Mixture) -> None:
    """Checks that the shards fit the weights, and that the results can be written.

    Raises:
        ValueError: the shards have another size or palette; --out holds anything but this run's model; --results cannot be read.
    """
    check_shards(images, start.config)
    if args.untrained is None and images.palette_hash != start.palette_hash:
        raise InputError(
            f"{args.data} and {args.model} have different palettes; make the shards again with --palette "
            f"{args.model / 'palette.npy'}"
        )
    out = args.out or args.run_dir / "model"
    if args.resume == "auto" and (out / "config.json").exists():
        check_own(out, args.run_dir, ended=False)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} exists already; choose another name or remove it")
    if args.results:
        read_results(args.results)
    check_writable(args.results, directories=[args.run_dir, out])


def finetune_start(args: argparse.Namespace, start: ModelInfo, images: Mixture) -> FinetuneStart:
    """What fine-tuning adds to a session: facts for manifests and the model dir, the weights to start from, early stopping."""
    facts = FinetuneFacts(
        classes=tuple(images.classes),
        dataset=images.shard_sets[0].name,
        dataset_hash=images.dataset_hash,
        train_split=args.train_split,
        n_train=images.n_images,
        start_step=start.step if args.untrained is None else 0,
    )
    return FinetuneStart(facts, args.model if args.untrained is None else None, early_stop(args))


def early_stop(args: argparse.Namespace) -> EarlyStop:
    """Early stopping by accuracy, or by the loss without a class head; the last step is kept if training sees --val_split."""
    folded = args.val_split in args.train_split.split("+")
    return EarlyStop("val_loss" if args.loss == "gen" else "val_accuracy", args.patience, keep_best=not folded)


def why_kept(early: EarlyStop) -> str:
    """Why the model's step was chosen, with its validation."""
    if not early.best:
        return "the last step, without a validation"
    measured = ", ".join(f"{name} {value:.4f}" for name, value in early.best.items())
    return f"{'the best validation' if early.keep_best else 'the last validation'}: {measured}"


def conclude(args: argparse.Namespace, session: Session, held_out: ShardSet, evaluated: ShardSet | None) -> None:
    """Makes a model dir of the best step. With --results, all ranks together evaluate it on the test split."""
    engine, watch = session.engine, session.watch
    early, out = watch.early, args.out or args.run_dir / "model"
    assert early is not None
    watch.watchdog.alive("consolidate", watch.watchdog.step)
    if dist.from_rank_0(lambda: (out / "config.json").exists()):  # an interrupted start wrote it, or another run did meanwhile
        dist.from_rank_0(lambda: check_own(out, args.run_dir, ended=True))
    else:
        dist.from_rank_0(lambda: consolidate(args.run_dir, out, early.best_step))
    info = dist.from_rank_0(lambda: read_info(out))
    dist.say(f"{out}: step {info.step}, {why_kept(early)}")
    if evaluated is None:
        return
    found = dist.from_rank_0(lambda: choose_checkpoint(args.run_dir, info.step))
    load_checkpoint(engine, found, session.facts, verified=True)
    watch.watchdog.alive("evaluation", info.step)
    engine.eval()
    row, confusion = result(engine, info, held_out, evaluated, session.run.micro_batch, engine.device, args.mask_draws)
    dist.from_rank_0(lambda: write_confusion(args.run_dir / "confusion.json", confusion))
    dist.from_rank_0(lambda: add_results(args.results, [row]))
    words = f"held out {100 * row.held_out_accuracy:.2f} %, {args.eval_split} {100 * row.accuracy:.2f} %"
    dist.say(f"{words} ({evaluated.n_images} images); row added to {args.results}")


if __name__ == "__main__":
    cli.run(main, ranks=True)
