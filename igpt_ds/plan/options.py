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
from dataclasses import dataclass, field, replace
from pathlib import Path

from igpt_ds import cli
from igpt_ds.config import CHECKPOINTING, Recipe, get_recipe
from igpt_ds.ds_config import SHIPPED, DsConfig, Run, join, load_ds_config
from igpt_ds.errors import InputError
from igpt_ds.plan.costs import KEEP_LAST
from igpt_ds.plan.estimate import DOLLARS, Estimate, NoPlan, Price, estimate
from igpt_ds.plan.step_time import GPUS, Cluster
from igpt_ds.plan.text import describe_plan, describe_table

TABLE = tuple(2**power for power in range(3, 12))  # 8 to 2048 GPUs
# A plan with hpZ, or with ZeRO stage 1 or 2, must win by more than this share of the time: both have trained wrongly.
MARGINS = {"hpz": 0.10, "sharded less": 0.05}


def shipped(checkpointing: str | None = None) -> dict[str, DsConfig]:
    """The bf16 ds_configs in `ds_configs/` by file name, without those that fix sequence parallelism; `options` varies it itself.

    Args:
        checkpointing: only those with this mode of activation checkpointing.
    """
    found = {path.name: load_ds_config(path) for path in sorted(SHIPPED.glob("*.json"))}
    wanted = {
        name: values
        for name, values in found.items()
        if values.get("bf16", {}).get("enabled") and "sequence_parallel" not in values.get("igpt_ds", {})
    }
    if checkpointing:
        modes = {name: values.get("igpt_ds", {}).get("activation_checkpointing", "none") for name, values in wanted.items()}
        wanted = {name: values for name, values in wanted.items() if modes[name] == checkpointing}
    return wanted


@dataclass(frozen=True)
class Request:
    """What to plan: a recipe on a number of GPUs. What is None is chosen by the plan."""

    recipe: Recipe
    gpus: int
    cluster: Cluster
    ds_configs: dict[str, DsConfig] = field(default_factory=shipped)  # candidates by file name
    micro_batch: int | None = None
    sequence_parallel: int | None = None
    price: Price = field(default_factory=Price)


def options(request: Request) -> list[Estimate]:
    """For each ds_config its fastest layout that fits, or if none fits the one that needs least memory; the best first.

    It tries every number of ranks per image that divides ranks and heads, and every micro batch that divides the batch.

    Raises:
        ValueError: no layout multiplies out to the batch; the message names the nearest numbers of GPUs with one.
    """
    recipe, gpus, node_gpus = request.recipe, request.gpus, request.cluster.node_gpus
    found = []
    for name, values in request.ds_configs.items():
        tried = [estimate(run, name, request.cluster, request.price) for run in _runs(request, values)]
        if tried:
            found.append(min(tried, key=_rank))
    if not found:
        nearest = [n for n in (*range(gpus, 0, -1), *range(gpus, 8 * gpus + 65)) if _splits(recipe, n, node_gpus)]
        below, above = (next((n for n in nearest if (n < gpus) == less), None) for less in (True, False))
        named = " or ".join(str(n) for n in (below, above) if n)
        raise InputError(f"a batch of {recipe.batch_images} images does not divide over {gpus} GPUs; numbers that do: {named}")
    return sorted(found, key=_rank)


def _rank(one: Estimate) -> tuple[bool, bool, float, float]:
    # The order of preference: fits; sums gradients in fp32; time, with the margins added; memory.
    margin = (MARGINS["hpz"] if one.layout.hpz > 1 else 0) + (MARGINS["sharded less"] if one.run.stage < 3 else 0)
    fits = one.fits
    seconds = float(f"{one.step.seconds * (1 + margin):.3g}") if fits else 0.0
    return not fits, one.half_precision_sum, seconds, one.memory.total


def _splits(recipe: Recipe, gpus: int, node_gpus: int) -> list[int]:
    """Numbers of ranks per image, within a node, that divide ranks and heads and whose groups divide the batch."""
    config = recipe.model
    fewest = {p: config.n_ctx - (p - 1) * -(-config.n_ctx // p) for p in range(1, node_gpus + 1)}  # tokens of the last rank
    parts = (p for p, tokens in fewest.items() if tokens > 0 and not (gpus % p or config.n_head % p))
    return [p for p in parts if recipe.batch_images % (gpus // p) == 0]


def _runs(request: Request, values: DsConfig) -> list[Run]:
    recipe, gpus = request.recipe, request.gpus
    chosen = request.sequence_parallel
    runs = []
    for parts in [chosen] if chosen else _splits(recipe, gpus, request.cluster.node_gpus):
        share = recipe.batch_images // (gpus // parts) if gpus >= parts else 0
        for micro_batch in [request.micro_batch] if request.micro_batch else range(1, share + 1):
            if request.micro_batch or share % micro_batch == 0:
                runs.append(join(recipe, values, gpus, micro_batch, parts))
    return runs


def network(text: str) -> float:
    """Bytes a second of all network cards of a node, from "8x400": eight cards of 400 Gbit/s."""
    found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text)
    if not found or not float(found[1]) * float(found[2]):
        raise InputError(f"nodes_nic={text} must be cards times Gbit/s of one, like 8x400")
    return int(found[1]) * float(found[2]) * 1e9 / 8


def dry_run(run: Run, ds_config: str, keep_last: int, keep_every: int) -> str:
    """The estimate of one run on H100s of 80 GB, as text."""
    price = Price(keep_last=keep_last, keep_every=keep_every)
    return describe_plan([estimate(run, ds_config, Cluster(GPUS["h100-80g"]), price)])


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan of a recipe on a number of GPUs."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--recipe", required=True, help="name of a recipe")
    batch = "images per step, instead of the recipe's; the number of steps changes so that the run sees as many images"
    parser.add_argument("--batch_images", type=int, help=batch)
    parser.add_argument("--gpus", type=int, help="number of GPUs, one rank each; 1 if not given")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100-80g", help="kind of GPU")
    parser.add_argument("--gpu_memory", type=float, help="memory of one GPU in GB, instead of the known size of --gpu")
    parser.add_argument("--node_gpus", type=int, default=8, help="GPUs per node")
    parser.add_argument("--nodes_nic", default="8x400", help="network cards per node x Gbit/s of each")
    parser.add_argument("--ds_config", type=Path, help="plan with this ds_config; the best shipped one if not given")
    mode = "only consider shipped ds_configs with this mode of activation checkpointing; all if not given"
    parser.add_argument("--activation_checkpointing", choices=CHECKPOINTING, help=mode)
    parser.add_argument("--micro_batch", type=int, help="images per rank and micro_step; the best if not given")
    parser.add_argument("--sequence_parallel", type=int, help="ranks that share an image; the best number if not given")
    parser.add_argument("--dollars_per_gpu_hour", type=float, default=DOLLARS, help="price of one GPU-hour in dollars")
    parser.add_argument("--keep_last", type=int, default=KEEP_LAST, help="number of newest checkpoints that the run keeps")
    keep_every = "keep every checkpoint whose step is a multiple of this number; 0 disables"
    parser.add_argument("--keep_every", type=int, default=0, help=keep_every)
    parser.add_argument("--table", action="store_true", help=f"print one line each for {TABLE[0]} to {TABLE[-1]} GPUs")
    parser.add_argument("--markdown", action="store_true", help="enclose the text in a Markdown code block")
    parser.add_argument("--json", action="store_true", help="print numbers as JSON instead of text")
    args = parser.parse_args(argv)
    if args.table and args.gpus is not None:
        raise InputError(f"--table plans for {TABLE[0]} to {TABLE[-1]} GPUs; give --gpus {args.gpus} or --table, not both")
    cluster, recipe = read_cluster(args), with_batch(get_recipe(args.recipe), args.batch_images)
    price = Price(args.dollars_per_gpu_hour, args.keep_last, args.keep_every)
    files = {args.ds_config.name: load_ds_config(args.ds_config)} if args.ds_config else shipped(args.activation_checkpointing)
    rows: list[Estimate | NoPlan] = []
    for gpus in TABLE if args.table else (1 if args.gpus is None else args.gpus,):
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
    gpu = GPUS[args.gpu]
    if args.gpu_memory:
        gpu = replace(gpu, memory=args.gpu_memory * 1e9)
    return Cluster(gpu, args.node_gpus, network(args.nodes_nic))
