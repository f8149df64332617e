"""Plans a training before it starts: the ds_config, the batch layout, the time, the money and the disk.

    python -m igpt_ds.plan --recipe igpt_xl_ar_64 --gpus 64 --gpu h100-80g --nodes_nic 8x400

prints the plan of a recipe on a number of GPUs: the fastest of the shipped ds_configs that fits, or the one of --ds_config.
`--table` plans for 8 to 2048 GPUs. `--json` prints numbers instead of text; `tools/figures.py plan` draws those of a table.
Everything is computed from the cost model (estimate.py). `train.py --dry_run` prints the same for the run that it would start.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from igpt_ds import cli
from igpt_ds.command_line.parser import Print, completing
from igpt_ds.config import CHECKPOINTING, RECIPES, Recipe, get_recipe
from igpt_ds.ds_config import Run, load_ds_config
from igpt_ds.errors import InputError
from igpt_ds.plan.costs import KEEP_LAST, VAL_IMAGES
from igpt_ds.plan.estimate import DOLLARS, Estimate, NoPlan, Price, estimate
from igpt_ds.plan.gpus import GPUS
from igpt_ds.plan.options import Request, options
from igpt_ds.plan.recipes import GPU, recipe_table
from igpt_ds.plan.shipped import ds_config_names, find_ds_config, shipped
from igpt_ds.plan.step_time import Cluster
from igpt_ds.plan.text import describe_plan, describe_table, fast_line

TABLE = tuple(2**power for power in range(3, 12))  # 8 to 2048 GPUs
NICS = "8x400"
CLUSTER_FLAGS = ("gpus", "gpu", "gpu_memory", "node_gpus", "nodes_nic", "dollars_per_gpu_hour")


def network(text: str) -> float:
    """Bytes a second of all network cards of a node, from "8x400": eight cards of 400 Gbit/s."""
    found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text)
    if not found or not float(found[1]) * float(found[2]):
        raise InputError(f"nodes_nic={text} must be cards times Gbit/s of one, like 8x400")
    return int(found[1]) * float(found[2]) * 1e9 / 8


def dry_run(run: Run, args: argparse.Namespace, models: int = 0, validation: tuple[int, int] | None = None) -> str:
    """The estimate of the run that train.py or finetune.py would start, as text.

    Args:
        args: the values of `add_cluster_flags`, of --ds_config, of validation and of the flags that keep checkpoints.
        models: checkpoints that are kept beside the newest ones.
        validation: images of a validation and steps between two, where the flags have other defaults than train.py.
    """
    kept = args.keep_last + models + len(args.keep_steps)
    images, every = validation or (args.val_images or VAL_IMAGES, args.val_every)
    price = Price(args.dollars_per_gpu_hour or DOLLARS, kept, args.keep_every, images, every, args.save != "sync")
    one = estimate(run, args.ds_config.name, read_cluster(args), price)
    return "\n".join([describe_plan([one]), *([fast_line(one, args.fast_copies)] if args.fast_dir else [])])


def add_cluster_flags(group: argparse._ActionsContainer) -> None:
    """The machines that a plan is for. Values that are not given are None; `read_cluster` replaces them."""
    group.add_argument("--gpus", type=int, help="number of GPUs, one rank each (default: 1, or the number of ranks)")
    group.add_argument("--gpu", choices=tuple(GPUS), help=f"kind of GPU (default: {GPU})")
    memory = "memory of one GPU in GB (default: that of --gpu)"
    group.add_argument("--gpu_memory", type=float, metavar="GB", help=memory)
    group.add_argument("--node_gpus", type=int, metavar="GPUS", help="GPUs per node (default: 8)")
    group.add_argument("--nodes_nic", metavar="CARDSxGBIT", help=f"network cards per node x Gbit/s of each (default: {NICS})")
    dollars = f"price of one GPU-hour in dollars (default: {DOLLARS:g})"
    group.add_argument("--dollars_per_gpu_hour", type=float, metavar="DOLLARS", help=dollars)


def add_ds_config_flag(group: argparse._ActionsContainer, text: str, default: Path | None = None) -> None:
    """--ds_config, by name or by path."""
    flag = group.add_argument("--ds_config", type=find_ds_config, metavar="NAME_OR_FILE", default=default, help=text)
    completing(flag, ds_config_names())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--list_recipes", action=Print, table=recipe_table, help="print the recipes with time on one H100, and exit"
    )
    recipe = what.add_argument("--recipe", metavar="NAME", required=True, help="name of a recipe")
    completing(recipe, RECIPES)
    batch = "images per step; the steps change so that the run sees as many images (default: the recipe's)"
    what.add_argument("--batch_images", type=int, metavar="IMAGES", help=batch)
    machines = parser.add_argument_group("machines")
    add_cluster_flags(machines)
    how = parser.add_argument_group("how the run fits the machines")
    add_ds_config_flag(how, "plan with this ds_config (default: the best shipped one)")
    mode = "only consider shipped ds_configs with this mode of activation checkpointing (default: all)"
    how.add_argument("--activation_checkpointing", choices=CHECKPOINTING, help=mode)
    how.add_argument("--micro_batch", type=int, metavar="IMAGES", help="images per rank and micro_step (default: the best)")
    how.add_argument("--sequence_parallel", type=int, metavar="RANKS", help="ranks that share an image (default: the best)")
    disk = parser.add_argument_group("checkpoints")
    disk.add_argument("--keep_last", type=int, default=KEEP_LAST, help="number of newest checkpoints that the run keeps")
    keep_every = "keep every checkpoint whose step is a multiple of this number; 0 disables"
    disk.add_argument("--keep_every", type=int, metavar="STEPS", default=0, help=keep_every)
    output = parser.add_argument_group("output")
    output.add_argument("--table", action="store_true", help=f"print one line each for {TABLE[0]} to {TABLE[-1]} GPUs")
    output.add_argument("--markdown", action="store_true", help="enclose the text in a Markdown code block")
    output.add_argument("--json", action="store_true", help="print numbers as JSON instead of text")
    args = parser.parse_args(argv)
    if args.table and args.gpus is not None:
        raise InputError(f"--table plans for {TABLE[0]} to {TABLE[-1]} GPUs; give --gpus {args.gpus} or --table, not both")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan of a recipe on a number of GPUs."""
    args = parse(argv)
    cluster, recipe = read_cluster(args), with_batch(get_recipe(args.recipe), args.batch_images)
    price = Price(args.dollars_per_gpu_hour or DOLLARS, args.keep_last, args.keep_every)
    files = {args.ds_config.name: load_ds_config(args.ds_config)} if args.ds_config else shipped(args.activation_checkpointing)
    rows: list[Estimate | NoPlan] = []
    for gpus in TABLE if args.table else (args.gpus or 1,):
        try:
            found = options(Request(recipe, gpus, cluster, files, args.micro_batch, args.sequence_parallel, price))
            rows += found[:1] if args.table else found
        except InputError as error:
            if not args.table:
                raise
            rows.append(NoPlan(gpus, str(error)))
    if args.json:
        print(json.dumps([row.to_json() for row in rows], indent=1))
        return
    text = describe_table(rows) if args.table else describe_plan([row for row in rows if isinstance(row, Estimate)])
    print(f"```\n{text}\n```" if args.markdown else text)


def with_batch(recipe: Recipe, batch_images: int | None) -> Recipe:
    """The recipe with another batch size and as many images in total; under a new name, for the paper's rate does not apply."""
    if batch_images is None:
        return recipe
    steps, warmup_steps = (max(1, round(n * recipe.batch_images / batch_images)) for n in (recipe.steps, recipe.warmup_steps))
    return replace(
        recipe, name=f"{recipe.name} at batch {batch_images}", batch_images=batch_images, steps=steps, warmup_steps=warmup_steps
    )


def read_cluster(args: argparse.Namespace) -> Cluster:
    """The cluster that the flags describe. Checks all numbers of the command line.

    Raises:
        ValueError: a number is too small or not finite.
    """
    least = {
        "gpus": 1,
        "batch_images": 1,
        "node_gpus": 1,
        "micro_batch": 1,
        "sequence_parallel": 1,
        "keep_last": 1,
        "keep_every": 0,
    }
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise InputError(f"{name}={value} must be at least {bound}")
    for name, unit in (("gpu_memory", "GB"), ("dollars_per_gpu_hour", "dollars")):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{name}={value:g} must be a positive number of {unit}")
    gpu = GPUS[args.gpu or GPU]
    if args.gpu_memory:
        gpu = replace(gpu, memory=args.gpu_memory * 1e9)
    return Cluster(gpu, args.node_gpus or 8, network(args.nodes_nic or NICS))
