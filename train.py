"""Pre-trains an Image GPT on token shards under DeepSpeed ZeRO-3.

    deepspeed train.py --recipe igpt_s_ar_32 --data shards/imagenet_32 --run_dir runs/s --ds_config ds_configs/zero3_bf16.json

starts it on every GPU of this machine; `deepspeed --num_gpus 2` on two, or on two CPU processes where there is no GPU.
`torchrun`, `srun python train.py` and plain `python train.py` work as well. After an interruption the same command with
`--resume auto` goes on from the newest complete checkpoint as if nothing had happened. `--dry_run` prints what the run
would cost and stops. Any knob of the recipe can be set by its name (`--lr 0.001 --n_layer 12`). The objective is said by the
recipe alone: `igpt_s_ar_32` predicts each pixel from those before it, `igpt_s_bert_32` hidden pixels from all others.

Several directories after `--data` are mixed in one order, by `--data_weights`. The validation loss is that of the first one.
Where training shards cannot be mapped, `--stream 'pipe:curl -sf https://host/{shard}'` reads them in sequence.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_ds import cli, dist, plan
from igpt_ds.config import INITS, ModelConfig, Recipe, get_recipe, override
from igpt_ds.data.loader import Batches, Loader, check_shards
from igpt_ds.data.mixture import MAX_BAD, ON_BAD, Mixture, open_mixture
from igpt_ds.data.shards import ShardSet
from igpt_ds.data.streaming import LIMITS, ShardStream, StreamLoader
from igpt_ds.ds_config import Run, join, load_ds_config, run_to_dict
from igpt_ds.files import atomic_file
from igpt_ds.model.transformer import attention_backend
from igpt_ds.train import run_dir
from igpt_ds.train.checkpoint import load_checkpoint, newest_checkpoint, set_aside_newer
from igpt_ds.train.engine import build_engine, start_ranks
from igpt_ds.train.loop import Cadence, fit, pretraining_loss, validation_loss
from igpt_ds.train.metrics import Metrics, peak_of_all_ranks

DS_CONFIG = Path(__file__).resolve().parent / "ds_configs" / "zero3_bf16.json"
LEAST = {
    "val_images": 1,
    "val_every": 0,
    "save_every": 0,
    "log_every": 0,
    "keep_last": 1,
    "keep_every": 0,
    "stop_at_step": 1,
    "seed": 0,
}


def main(argv: Sequence[str] | None = None) -> None:
    """The story: recipe and ds_config, shards, engine, resume, loop."""
    args = parse(argv)
    dist.map_environment(os.environ)
    recipe = choose_recipe(args)
    run = join(recipe, load_ds_config(args.ds_config), dist.world_size(), args.micro_batch)
    if args.dry_run:
        print(
            plan.describe(recipe, run.world_size, run.micro_batch, run.accumulation, run.precision, run.activation_checkpointing)
        )
        return
    images, val_shards = open_images(args), ShardSet(args.data[0], args.val_split)
    check_shards(images, recipe.model)
    check_shards(val_shards, recipe.model)

    device = start_ranks()
    data = images.facts()
    facts = {"recipe": run_to_dict(run)["recipe"], "data": data, "precision": run.precision}
    palette, checkpoints = args.data[0] / "palette.npy", args.run_dir / "checkpoints"
    dist.from_rank_0(lambda: run_dir.check(args.run_dir, run, data, palette, args.resume == "auto"))
    if args.verify_shards:
        verify(images, val_shards)
    say(json.dumps(run_to_dict(run), indent=1))
    engine = build_engine(run)
    start_step = resume(engine, checkpoints, facts) if args.resume == "auto" else 0
    dist.from_rank_0(lambda: run_dir.record(args.run_dir, run, data, palette))
    peak, source = peak_of_all_ranks(device, run.precision)
    weights = plan.parameters(recipe.model, recipe.objective)
    attention = attention_backend(
        recipe.model, recipe.objective == "ar", device, torch.bfloat16 if run.precision == "bf16" else torch.float32
    )
    speed = f"{peak / 1e12:.2f} TFLOP/s over {run.world_size} ranks ({source})"
    say(f"{weights:,} parameters; {speed}; attention by torch's {attention} kernel on {device.type}")

    loader = batches(images, run)
    validate = partial(validation_loss, engine, recipe, val_shards, run.micro_batch, args.val_images)
    last_step = min(recipe.steps, args.stop_at_step or recipe.steps)
    cadence = Cadence(args.log_every, args.val_every, args.save_every, args.keep_last, args.keep_every, last_step)
    metrics = Metrics(args.run_dir, run, start_step, peak)
    fit(engine, run, loader, pretraining_loss(recipe), validate, metrics, cadence, checkpoints, facts, start_step)
    metrics.close()
    finish(args.run_dir, last_step == recipe.steps)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; every field of Recipe and ModelConfig is a flag of the same name."""
    parser = cli.parser(__doc__ or "")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="name of a recipe")
    what.add_argument("--config", type=Path, help="a run.json (or a recipe in JSON) to take the recipe from")
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
    parser.add_argument("--run_dir", type=Path, help="where everything is written")
    parser.add_argument("--ds_config", type=Path, default=DS_CONFIG, help="how it fits the machines")
    parser.add_argument("--micro_batch", type=int, help="images per rank and micro_step, instead of the ds_config's")
    parser.add_argument("--resume", choices=("never", "auto"), default="never", help="auto: from the newest complete checkpoint")
    parser.add_argument("--dry_run", action="store_true", help="print what the run would cost, and stop")
    verify = "compare every shard's sha256 with its index before the first step"
    parser.add_argument("--verify_shards", action=argparse.BooleanOptionalAction, default=True, help=verify)
    parser.add_argument("--val_split", default="val", help="split that the validation loss is measured on")
    parser.add_argument("--val_images", type=int, help="how many of its images, evenly spread; all when left out")
    parser.add_argument("--val_every", type=int, default=1000, help="steps between validation losses")
    parser.add_argument("--save_every", type=int, default=1000, help="steps between checkpoints")
    parser.add_argument("--keep_last", type=int, default=2, help="how many of the newest checkpoints to keep")
    parser.add_argument("--keep_every", type=int, default=0, help="keep checkpoints at multiples of this step for ever; 0: none")
    parser.add_argument("--log_every", type=int, default=10, help="steps between rows of train.jsonl")
    parser.add_argument("--stop_at_step", type=int, help="stop here, with a checkpoint; the schedule stays the recipe's")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment says the same")
    knobs = parser.add_argument_group("knobs of the recipe (default: the recipe's value)")
    for field in knob_fields():
        knobs.add_argument(f"--{field.name}", **_flag_type(field.name))
    args = parser.parse_args(argv)
    if not args.dry_run and (args.data is None or args.run_dir is None):
        raise ValueError("--data and --run_dir are needed, except with --dry_run")
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} must be at least {least}")
    if not 0 <= args.max_bad < 1:
        raise ValueError(f"--max_bad {args.max_bad:g} must be at least 0 and below 1")
    if args.stream and (len(args.data or ()) > 1 or args.exclude or args.data_weights or args.on_bad == "skip"):
        raise ValueError("--stream takes one --data as it is, without --data_weights, --exclude and --on_bad skip")
    return args


def knob_fields() -> list[dataclasses.Field[Any]]:
    """The fields of Recipe and ModelConfig that a flag may change; the objective is said by the recipe's name, with its lr."""
    fields = [*dataclasses.fields(Recipe), *dataclasses.fields(ModelConfig)]
    return [field for field in fields if field.name not in ("name", "model", "objective")]


def _flag_type(name: str) -> dict[str, Any]:
    if name == "betas":
        return {"type": float, "nargs": 2}
    if name == "augment_flip":
        return {"action": argparse.BooleanOptionalAction, "default": None}
    if name == "init":
        return {"choices": INITS}
    return {"type": float if name in ("lr", "eps", "clip", "mask_prob") else int}


def choose_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe named or read, with the knobs that were given."""
    recipe = get_recipe(args.recipe) if args.recipe else run_dir.read_recipe(args.config)
    given = {field.name: getattr(args, field.name) for field in knob_fields() if getattr(args, field.name) is not None}
    return override(recipe, given | ({"betas": tuple(given["betas"])} if "betas" in given else {}))


def open_images(args: argparse.Namespace) -> Mixture | ShardStream:
    """The training images: mapped shards, or a stream where --stream says so."""
    if args.stream:
        return ShardStream(args.data[0], args.stream)
    return open_mixture(args.data, args.data_weights, args.exclude, args.on_bad, args.max_bad)


def verify(images: Mixture | ShardStream, val_shards: ShardSet) -> None:
    """Reads all shards before the first step. With --on_bad skip the ranks divide the images, and damaged ones are left out."""
    if isinstance(images, Mixture) and images.on_bad == "skip":
        parts = dist.gather_objects(images.damaged(dist.rank(), dist.world_size()))
        try:
            images.skip([np.sort(np.concatenate(ids)) for ids in zip(*parts, strict=True)], aloud=dist.rank() == 0)
        except ValueError as error:
            raise cli.SharedError(str(error)) from None  # every rank counts the same
        say(f"{images.n_skipped} of {images.n_images:,} training images are damaged and skipped")
    elif isinstance(images, Mixture):
        for shards in images.shard_sets:
            dist.from_rank_0(shards.verify)
    dist.from_rank_0(val_shards.verify)


def batches(images: Mixture | ShardStream, run: Run) -> Batches:
    """This rank's training batches, without labels."""
    recipe = run.recipe
    layout: dict[str, Any] = {"rank": dist.rank(), "world_size": run.world_size, "seed": recipe.seed, "with_labels": False}
    augmentation: dict[str, Any] = {"augment_pad": recipe.augment_pad, "augment_flip": recipe.augment_flip}
    if isinstance(images, Mixture):
        return Loader(images, recipe.batch_images, run.micro_batch, **layout, **augmentation)
    if dist.rank() == 0:
        print(LIMITS, file=sys.stderr, flush=True)
    return StreamLoader(images, recipe.batch_images, run.micro_batch, **layout, **augmentation)


def resume(engine: Any, checkpoints: Path, facts: dict[str, Any]) -> int:
    """Loads the newest whole checkpoint that rank 0 finds; returns its step, or 0 where there is none."""
    found = dist.from_rank_0(lambda: newest_checkpoint(checkpoints))
    step = int(found[1]["step"]) if found else 0
    if found:
        load_checkpoint(engine, *found, facts)
    say(f"resumed from {found[0]}: {step} steps, {found[1]['images_seen']:,} images" if found else "nothing to resume: step 0")
    dist.from_rank_0(lambda: set_aside_newer(checkpoints, step))
    return step


def finish(where: Path, finished: bool) -> None:
    """Marks a run that reached its last step, and lets all ranks leave together."""
    dist.barrier()
    if dist.rank() == 0 and finished:
        with atomic_file(where / "FINISHED", "w") as file:
            file.write("all steps done\n")


def say(line: str) -> None:
    """Prints once, not once a rank."""
    if dist.rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    cli.run(main)
