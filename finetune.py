"""Fine-tunes a pre-trained Image GPT to classify: the loop of train.py with another loss function, gen_loss + clf_loss.

    deepspeed finetune.py --model models/s --data shards/cifar10_32 --run_dir runs/s_cifar10 --augment_pad 4 --augment_flip

trains all weights and a class head on the mean of n^L (paper 2.3, 3.4): Adam as in pre-training, a rate that rises for an epoch
and stays, no cosine. After each epoch the validation images are classified; after --patience epochs without a new best the run
ends, and RUN_DIR/model is the best step's model dir with its class head. `--results results.jsonl` then reads the test split,
once, adds a row there, and writes RUN_DIR/confusion.json. `--untrained 0` is the same network from scratch.

Started as train.py is (`torchrun`, `srun python finetune.py`, plain `python`), stopped and resumed as it is: USR1, TERM, a file
STOP or --max_minutes end it with a checkpoint and status 85, `--resume auto` goes on. The rate is searched from large to small:

    python tools/sweep_lr.py --out runs/sweep -- deepspeed finetune.py --model models/s --data shards/cifar10_32
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from igpt_ds import cli, dist
from igpt_ds.data.loader import check_shards
from igpt_ds.data.mixture import Mixture, open_mixture
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.ds_config import Run, join, load_ds_config
from igpt_ds.evaluate.classification import result
from igpt_ds.evaluate.report.results import add_results, read_results
from igpt_ds.files import write_json
from igpt_ds.model.store import ModelInfo, read_info
from igpt_ds.plan.options import dry_run
from igpt_ds.train.checkpoint.consolidate import check_own, consolidate
from igpt_ds.train.checkpoint.manifest import choose_checkpoint
from igpt_ds.train.checkpoint.save_load import load_checkpoint
from igpt_ds.train.early import EarlyStop
from igpt_ds.train.engine import check_ds_config, start_ranks
from igpt_ds.train.finetune_flags import finetune_recipe, parse, starting_point
from igpt_ds.train.finetuning import finetuning_loss, measure
from igpt_ds.train.loop import Cadence, Session, fit
from igpt_ds.train.metrics import Metrics
from igpt_ds.train.safety.stops import Stop
from igpt_ds.train.session import engine_of_run, finish, introduce, manifest_facts, say, watch_over, watched
from igpt_ds.train.stream import batches


def main(argv: Sequence[str] | None = None) -> None:
    """The story: weights and labelled shards, engine, resume, loop, model dir, test split."""
    args = parse(__doc__ or "", argv)
    dist.map_environment(os.environ)
    images = open_mixture([args.data], None, args.exclude, args.on_bad, args.max_bad, args.train_split)
    start = starting_point(args)
    run = choose_run(args, start, images)
    recipe = run.recipe
    if args.dry_run:
        say(dry_run(run, args.ds_config.name, args.keep_last + 1, args.keep_every))
        return
    held_out = ShardSet(args.data, args.val_split)
    evaluated = ShardSet(args.data, args.eval_split) if args.results else None  # opened now, lest it be missing then
    check_start(args, start, images)

    stop = Stop(args.run_dir, args.max_minutes)
    stop.listen()
    watchdog = watched(args)
    device = start_ranks()
    facts = manifest_facts(run, images) | {"finetune": about(args, start, images)}
    pretrained = args.model if args.untrained is None else None
    n_kept = args.keep_last + 1  # the best one stays as well
    engine, found = engine_of_run(args, run, images, held_out, facts, watchdog, n_kept, pretrained)
    start_step = int(found.get("step", 0))
    peak = introduce(run, device)

    loader = batches(images, run, with_labels=True)
    validate = partial(measure, engine, recipe, held_out, run.micro_batch, args.val_images)
    last_step = min(recipe.steps, args.stop_at_step or recipe.steps)
    cadence = Cadence(args.log_every, args.val_every, args.save_every, args.keep_last, args.keep_every, last_step)
    metrics = Metrics(args.run_dir, run, start_step, peak, args.wandb)
    watch = watch_over(args, run, stop, watchdog, found, early_stop(args))
    loss = finetuning_loss(recipe)
    session = Session(engine, run, args.run_dir, facts, cadence, metrics, watch)
    why = fit(session, loader, loss, validate, start_step)
    metrics.close()
    finished = not why and (last_step == recipe.steps or watch.over)
    if finished:
        conclude(args, session, held_out, evaluated)
    finish(args.run_dir, finished, why, watchdog)


def choose_run(args: argparse.Namespace, start: ModelInfo, images: Mixture) -> Run:
    """What is learned, joined with how it fits the machines. Sets --val_every and --save_every to an epoch where left out."""
    ds_config = load_ds_config(args.ds_config)
    check_ds_config(ds_config, args.ds_config)
    recipe = finetune_recipe(args, start, images.n_images, len(images.classes))
    epoch = -(-images.n_images // recipe.batch_images)
    args.val_every = epoch if args.val_every is None else args.val_every
    args.save_every = args.val_every if args.save_every is None else args.save_every
    return join(recipe, ds_config, dist.world_size(), args.micro_batch, args.sequence_parallel)


def check_start(args: argparse.Namespace, start: ModelInfo, images: Mixture) -> None:
    """Refuses shards that do not fit the weights, and what would be in the way at the end.

    Raises:
        ValueError: another size or palette; --out is not empty, and not this run's own model; --results cannot be read.
    """
    check_shards(images, start.config)
    if args.untrained is None and images.palette_hash != start.palette_hash:
        raise ValueError(
            f"{args.data} has another palette than {args.model} was trained with; make the shards again with --palette "
            f"{args.model / 'palette.npy'}"
        )
    out = args.out or args.run_dir / "model"
    if args.resume == "auto" and (out / "config.json").exists():
        check_own(out, args.run_dir, ended=False)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists already; choose another name or remove it")
    if args.results:
        read_results(args.results)


def about(args: argparse.Namespace, start: ModelInfo, images: Mixture) -> dict[str, Any]:
    """What checkpoints say beyond those of a pre-training run, and the model dir afterwards."""
    return {
        "classes": images.classes,
        "dataset": images.shard_sets[0].name,
        "dataset_hash": images.dataset_hash,
        "train_split": args.train_split,
        "n_train": images.n_images,
        "start_step": start.step if args.untrained is None else 0,
    }


def early_stop(args: argparse.Namespace) -> EarlyStop:
    """By accuracy; by the loss where the class head learns nothing. Validation images that are trained on choose no step."""
    folded = args.val_split in args.train_split.split("+")
    return EarlyStop("val_loss" if args.loss == "gen" else "val_accuracy", args.patience, keep_best=not folded)


def why_kept(early: EarlyStop) -> str:
    """Why the model is that of its step, in words, with what was measured there."""
    if not early.best:
        return "the last step; no validation counted"
    return f"{'the best of the validations' if early.keep_best else 'the last validation'}: {json.dumps(early.best)}"


def conclude(args: argparse.Namespace, session: Session, held_out: ShardSet, evaluated: ShardSet | None) -> None:
    """The best step becomes a model dir; where a row is wanted, the test split is read by all ranks together."""
    engine, watch = session.engine, session.watch
    early, out = watch.early, args.out or args.run_dir / "model"
    assert early is not None
    watch.watchdog.alive("consolidate", watch.watchdog.step)
    if dist.from_rank_0(lambda: (out / "config.json").exists()):  # written before an interruption, or meanwhile by another run
        dist.from_rank_0(lambda: check_own(out, args.run_dir, ended=True))
    else:
        dist.from_rank_0(lambda: consolidate(args.run_dir, out, early.best_step))
    info = dist.from_rank_0(lambda: read_info(out))
    say(f"{out}: step {info.step}, {why_kept(early)}")
    if evaluated is None:
        return
    found = dist.from_rank_0(lambda: choose_checkpoint(args.run_dir, info.step))
    load_checkpoint(engine, *found, session.facts, verified=True)
    watch.watchdog.alive("evaluation", info.step)
    engine.eval()
    row, confusion = result(engine, info, held_out, evaluated, session.run.micro_batch, engine.device, args.mask_draws)
    dist.from_rank_0(lambda: write_json(args.run_dir / "confusion.json", confusion))
    dist.from_rank_0(lambda: add_results(args.results, [row]))
    words = f"held out {100 * row.held_out_accuracy:.2f} %, {args.eval_split} {100 * row.accuracy:.2f} %"
    say(f"{words} ({evaluated.n_images} images); row added to {args.results}")


if __name__ == "__main__":
    cli.run(main)
