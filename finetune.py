"""Fine-tunes a pre-trained Image GPT to classify: the loop of train.py with another loss function, gen_loss + clf_loss.

    deepspeed finetune.py --model models/s --data shards/cifar10_32 --run_dir runs/s_cifar10 --augment_pad 4 --augment_flip

trains all weights and a class head on the mean of n^L (paper 2.3, 3.4), with Adam as in pre-training and a learning rate that
rises for an epoch and stays constant. Each epoch ends with a validation. After --patience epochs without a new best the run ends,
and RUN_DIR/model is the model dir of the best step, with its class head. `--results results.jsonl` then evaluates the test split
once, adds a row to that file and writes RUN_DIR/confusion.json. `--untrained 0` trains from scratch, on the class loss alone
(paper 4.5). `--labels 40 --subsets 5` trains on five random subsets of 40 labels, for a row with mean and deviation (4.7).

It starts, stops and resumes as train.py does: `torchrun`, `srun python finetune.py`, `mpirun` and plain `python` work as well.
USR1, TERM, Ctrl-C, a file STOP and --max_minutes end the run with a checkpoint and status 85; `--resume auto` continues. To
search the learning rate:

    python tools/sweep_lr.py --out runs/sweep -- deepspeed finetune.py --model models/s --data shards/cifar10_32
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from igpt_ds import cli, launcher
from igpt_ds.command_line import lazy
from igpt_ds.console import count, next_command
from igpt_ds.data.mixture import Mixture, open_mixture
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.index import folded, read_index
from igpt_ds.data.subsets import SUBSETS, few
from igpt_ds.ds_config import Run, join, load_ds_config
from igpt_ds.errors import InputError
from igpt_ds.evaluate.report.results import add_results, read_results
from igpt_ds.evaluate.report.row_types import FinetuneRow
from igpt_ds.evaluate.report.single_layers import best_layer
from igpt_ds.files import check_writable
from igpt_ds.plan.command import dry_run
from igpt_ds.train.checkpoint.directory import choose_checkpoint
from igpt_ds.train.checkpoint.manifest import FinetuneFacts
from igpt_ds.train.early import EarlyStop
from igpt_ds.train.finetune_flags import parse
from igpt_ds.train.run_dir import check_same, has_checkpoints, number_validated, write_finished
from igpt_ds.train.schedule import warmup_note

with lazy.imports():
    from igpt_ds import dist
    from igpt_ds.data.loader import check_shards
    from igpt_ds.evaluate.classification import over_subsets, result, write_confusion
    from igpt_ds.model.store import ModelInfo, read_info
    from igpt_ds.train.checkpoint.consolidate import check_own, consolidate
    from igpt_ds.train.checkpoint.load import load_checkpoint
    from igpt_ds.train.engine import check_ds_config, start_ranks
    from igpt_ds.train.finetuning import (
        finetune_recipe,
        finetuning_loss,
        measure,
        of_subset,
        starting_point,
        validations,
    )
    from igpt_ds.train.loop import fit
    from igpt_ds.train.session import FinetuneStart, Session, open_session
    from igpt_ds.train.stream import batches
    from igpt_ds.train.validation import validation_batch, validation_images


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tunes on all labels, or on random subsets of them."""
    args = parse(__doc__ or "", argv)
    lazy.load()
    launcher.map_environment(os.environ)
    images = open_mixture([args.data], None, args.exclude, args.on_bad, args.max_bad, args.train_split, one_view=True)
    start = starting_point(args)
    if args.layer_from is not None:
        args.layer = best_layer(args.layer_from, start.model_hash)
    if args.labels is not None:
        few_labels(args, start, images)
        return
    if next(args.run_dir.glob("subset-*/run.json"), None):
        raise InputError(f"--run_dir {args.run_dir} holds runs of --labels, one for each subset; choose another directory")
    run = choose_run(args, start, images)
    shortened = run.recipe.warmup_steps < run.recipe.steps  # a run of an earlier version may warm up to its end
    note = warmup_note(args, math.ceil(images.n_originals / args.batch_images), run.recipe) if shortened else ""
    if args.dry_run:
        dist.say("\n".join(filter(None, [dry_run(run, args, 1, validations(args, images.n_originals)), note])))
        return
    session, _ = tune(args, start, images, run, note)
    dist.say(next_step(args, session))


def tune(
    args: argparse.Namespace, start: ModelInfo, images: Mixture, run: Run, note: str = "", stop_in: Path | None = None
) -> tuple[Session, FinetuneRow | None]:
    """One fine-tuning: run, session, loop; then the model dir and the test split, whose row it returns if it was evaluated."""
    recipe, held_out = run.recipe, validation_images(args.data, args.val_split, args.train_split)
    held_out = None if held_out is None else held_out.one_view()
    evaluated = ShardSet(args.data, args.eval_split).one_view() if args.results else None  # a missing split is an error now
    check_start(args, start, images)
    row, validate = None, None
    begin = finetune_start(args, start, images, stop_in or args.run_dir)
    args.val_images = number_validated(args, default=None)  # all: they choose the step, and an epoch lies between two validations
    with open_session(args, run, images, held_out, begin, note) as session:
        if held_out is not None:
            batch = validation_batch(run, held_out, args.val_images)
            validate = partial(measure, session.engine, recipe, held_out, batch, args.val_images)
        fit(session, batches(images, run, with_labels=True), finetuning_loss(recipe), validate)
        if session.finished:
            row = conclude(args, session, held_out, evaluated)
    return session, row


def few_labels(args: argparse.Namespace, start: ModelInfo, pool: Mixture) -> None:
    """Fine-tunes on random subsets of the labels, one after another, each in its own RUN_DIR/subset-N (paper 4.7).

    The subsets are those of the low_data probes with the same seed. `--resume auto` skips the finished ones. --results gets one
    row with mean and deviation.
    """
    began, shards = time.monotonic(), pool.shard_sets[0]
    parts = [few(pool, args.labels, args.seed, number) for number in range(args.subsets or SUBSETS)]
    if args.dry_run:
        run = choose_run(of_subset(args, 0, parts[0]), start, parts[0])
        plan = dry_run(run, args, 1, validations(args, args.labels))
        dist.say(f"{plan}\n{len(parts)} such runs, one for each subset; the disk holds all of them")
        return
    if (args.run_dir / "run.json").exists():
        raise InputError(f"--run_dir {args.run_dir} holds a run with all labels; choose another for --labels {args.labels}")
    each = [of_subset(args, number, images) for number, images in enumerate(parts)]
    if args.resume != "auto" and any(has_checkpoints(one.run_dir) for one in each):
        raise InputError(f"{args.run_dir} already holds subsets; continue them with --resume auto or choose another --run_dir")
    known = [finished_row(one, start, images) for one, images in zip(each, parts, strict=True)]
    check_writable(args.results)
    if args.results:
        read_results(args.results)  # finds a damaged file before the first step
    rows = []
    for number, (one, images, row) in enumerate(zip(each, parts, known, strict=True)):
        if row is None:
            dist.say(f"subset {number + 1} of {len(parts)}: {args.labels} labels, in {one.run_dir}")
            if args.max_minutes is not None:
                one.max_minutes = max(0.0, args.max_minutes - (time.monotonic() - began) / 60)
            session, row = tune(one, start, images, choose_run(one, start, images), stop_in=args.run_dir)
            if not session.finished:  # --stop_at_step ended it
                dist.say(session.resume)
                return
            go_on(session, last=number == len(parts) - 1)
        rows += [] if row is None else [row]
    start_ranks()  # nothing else has joined them if every subset was finished
    if rows:
        joined = over_subsets(rows, shards, pool.n_originals, args.seed)
        dist.from_rank_0(lambda: add_results(args.results, [joined]))
        spread = "" if joined.deviation is None else f" +- {100 * joined.deviation:.2f}"
        dist.say(
            f"{args.eval_split} {100 * joined.accuracy:.2f} %{spread} over {count(len(rows), 'subset')} of {args.labels} labels"
        )
        dist.say(next_command("python", "tools/tables.py", "--results", args.results))
    dist.from_rank_0(lambda: write_finished(args.run_dir))


def finished_row(args: argparse.Namespace, start: ModelInfo, images: Mixture) -> FinetuneRow | None:
    """The row of a subset's run that an earlier start has finished; None if there is something left to do.

    Raises:
        ValueError: the directory holds another run.
    """
    if args.resume != "auto" or args.results is None or not (args.run_dir / "FINISHED").exists():
        return None
    check_same(args.run_dir, choose_run(args, start, images), images.facts())
    own = read_info(args.run_dir / "model").model_hash
    found = [row for row in read_results(args.results) if isinstance(row, FinetuneRow) and row.model_hash == own]
    same = [row for row in found if row.eval_split == args.eval_split and row.n_masks in (None, args.mask_draws)]
    return same[-1] if same else None


def go_on(session: Session, last: bool) -> None:
    """Frees the engine of a finished subset, for the next one.

    Raises:
        SystemExit: STOPPED, if something stops the run now and it is not the last subset.
    """
    if not last and session.watch.stop.now(session.engine.device):
        dist.say(f"stopped by {session.watch.stop.reason}; continue with: {session.watch.stop.resume}")
        raise SystemExit(cli.STOPPED)
    session.engine.destroy()


def next_step(args: argparse.Namespace, session: Session) -> str:
    """The command that follows this one."""
    if not session.finished:  # --stop_at_step ended it
        return session.resume
    if args.results:
        return next_command("python", "tools/tables.py", "--results", args.results)
    model, evaluated = args.out or args.run_dir / "model", args.eval_split
    if evaluated not in read_index(args.data).splits:
        if folded(args.val_split, args.train_split):  # all images are trained on
            return next_command("python", "tools/model_card.py", "--model", model, "--run_dir", args.run_dir)
        evaluated = args.val_split
    splits = ("--val_split", args.val_split, "--eval_split", evaluated)
    return next_command("python", "tools/evaluate_classifier.py", "--model", model, "--data", args.data, *splits)


def choose_run(args: argparse.Namespace, start: ModelInfo, images: Mixture) -> Run:
    """The recipe joined with the ds_config."""
    ds_config = load_ds_config(args.ds_config)
    check_ds_config(ds_config, args.ds_config)
    recipe = finetune_recipe(args, start, images.n_originals, len(images.classes))
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


def finetune_start(args: argparse.Namespace, start: ModelInfo, images: Mixture, stop_in: Path) -> FinetuneStart:
    """What fine-tuning adds to a session: facts for manifests and the model dir, the weights to start from, early stopping."""
    facts = FinetuneFacts(
        classes=tuple(images.classes),
        dataset=images.shard_sets[0].name,
        dataset_hash=images.dataset_hash,
        train_split=args.train_split,
        n_train=images.n_originals,
        start_step=start.step if args.untrained is None else 0,
    )
    return FinetuneStart(facts, args.model if args.untrained is None else None, early_stop(args), stop_in)


def early_stop(args: argparse.Namespace) -> EarlyStop | None:
    """Early stopping by accuracy, or by the loss without a class head; None if no images are left to validate on.

    The last step is kept if --val_split is --train_split itself.
    """
    if folded(args.val_split, args.train_split):
        return None
    seen = args.val_split == args.train_split
    return EarlyStop("val_loss" if args.loss == "gen" else "val_accuracy", args.patience, keep_best=not seen)


def why_kept(early: EarlyStop | None) -> str:
    """Why the model's step was chosen, with its validation."""
    if early is None or not early.best:
        return "the last step, without a validation"
    measured = ", ".join(f"{name} {value:.4f}" for name, value in early.best.items())
    return f"{'the best validation' if early.keep_best else 'the last validation'}: {measured}"


def conclude(
    args: argparse.Namespace, session: Session, held_out: ShardSet | None, evaluated: ShardSet | None
) -> FinetuneRow | None:
    """Makes a model dir of the best step. With --results, all ranks together evaluate it on the test split; the row."""
    engine, watch = session.engine, session.watch
    early, out = watch.early, args.out or args.run_dir / "model"
    watch.watchdog.alive("consolidate", watch.watchdog.step)
    if dist.from_rank_0(lambda: (out / "config.json").exists()):  # an interrupted start wrote it, or another run did meanwhile
        dist.from_rank_0(lambda: check_own(out, args.run_dir, ended=True))
    else:
        dist.from_rank_0(lambda: consolidate(args.run_dir, out, watch.best_step))
    info = dist.from_rank_0(lambda: read_info(out))
    dist.say(f"{out}: step {info.step}, {why_kept(early)}")
    if evaluated is None:
        return None
    found = dist.from_rank_0(lambda: choose_checkpoint(args.run_dir, info.step, verify=False))
    load_checkpoint(engine, found, session.facts)
    watch.watchdog.alive("evaluation", info.step)
    engine.eval()
    row, confusion = result(engine, info, held_out, evaluated, session.run.micro_batch, engine.device, args.mask_draws)
    dist.from_rank_0(lambda: write_confusion(args.run_dir / "confusion.json", confusion))
    dist.from_rank_0(lambda: add_results(args.results, [row]))
    chosen = "" if row.held_out_accuracy is None else f"held out {100 * row.held_out_accuracy:.2f} %, "
    seen = ", which were trained on" if folded(args.eval_split, args.train_split) else ""
    words = f"{chosen}{args.eval_split} {100 * row.accuracy:.2f} %"
    dist.say(f"{words} ({evaluated.n_images} images){seen}; row added to {args.results}")
    return row


if __name__ == "__main__":
    cli.run(main, ranks=True)
