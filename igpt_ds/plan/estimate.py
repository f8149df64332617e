"""A run planned before it starts: which ds_config, which layout of the batch, how long, how dear, how much disk.

    python -m igpt_ds.plan --recipe igpt_xl_ar_64 --gpus 64 --gpu h100-80g --nodes_nic 8x400

prints the plan of a recipe on a number of GPUs: the fastest of the shipped ds_configs that fits, or the one that --ds_config
names. `--table` goes through 8 to 2048 GPUs. `--json` prints numbers instead of text, and `tools/figures.py plan` draws those
of a table. All of it is arithmetic: costs.py counts, step_time.py turns counts into seconds. Called from the shell, and by
`train.py --dry_run` for the run that it would start.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from igpt_ds import cli
from igpt_ds.config import CHECKPOINTING, Recipe, get_recipe
from igpt_ds.ds_config import Run, join, load_ds_config
from igpt_ds.plan.costs import (
    SPARE,
    Layout,
    checkpoint_bytes,
    fits,
    memory,
    offloaded_bytes,
    parameters,
    train_flops_per_token,
    wire_bytes,
)
from igpt_ds.plan.step_time import GPUS, Cluster, step_time
from igpt_ds.plan.text import describe, describe_table

DIRECTORY = Path(__file__).parents[2] / "ds_configs"
TABLE = tuple(2**power for power in range(3, 12))  # 8 to 2048 GPUs
DOLLARS = 2.5  # for an hour of an H100 in 2026, between 2 and 3.5 by where it stands
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# A plan that wins by less than this is not worth it: hpZ and the stages that gather after the update bring their own trouble.
MARGINS = {"hpz": 0.10, "sharded less": 0.05}


def layout(run: Run) -> Layout:
    """How a run lies on its ranks, as far as it costs anything."""
    zero = run.ds_config["zero_optimization"]
    summed = run.ds_config.get("data_types", {}).get("grad_accum_dtype", run.precision)
    return Layout(
        run.world_size,
        run.micro_batch,
        run.accumulation,
        run.sequence_parallel,
        run.stage,
        run.precision,
        run.activation_checkpointing,
        accumulation_bytes=BYTES.get(summed, 4),
        hpz=zero.get("zero_hpz_partition_size", 1),
        offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        overlap=zero.get("overlap_comm", run.stage == 3),
    )


@dataclass(frozen=True)
class Price:
    """What a plan needs to know beside the run: an hour's dollars, and which checkpoints are kept."""

    dollars: float = DOLLARS
    keep_last: int = 2
    keep_every: int = 0


def estimate(run: Run, ds_config: str, cluster: Cluster, price: Price) -> dict[str, Any]:
    """Everything that is known of a run beforehand, as a flat JSON-ready dict; bytes, seconds and dollars unless named."""
    recipe, config, where = run.recipe, run.recipe.model, layout(run)
    held, step = memory(config, where), step_time(config, where, cluster, recipe.objective == "ar")
    full, half = (train_flops_per_token(config, causal) for causal in (False, True))
    tokens, hours = recipe.batch_images * config.n_ctx, recipe.steps * step.seconds / 3600
    kept = price.keep_last + (recipe.steps // price.keep_every if price.keep_every else 0)
    return {
        "recipe": recipe.name,
        "objective": recipe.objective,
        "model": f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, {config.n_px}x{config.n_px} pixels",
        "parameters": parameters(config, recipe.objective),
        "ds_config": ds_config,
        "gpu": cluster.gpu.name,
        "gpu_bytes": cluster.gpu.memory,
        "node_gpus": cluster.node_gpus,
        "node_gbit": cluster.node_network * 8 / 1e9,
        "gpus": run.world_size,
        "batch_images": recipe.batch_images,
        "micro_batch": run.micro_batch,
        "accumulation": run.accumulation,
        "sequence_parallel": run.sequence_parallel,
        "stage": run.stage,
        "hpz": where.hpz,
        "precision": run.precision,
        "rough": where.accumulation_bytes < 4 and run.accumulation > 1,
        "activation_checkpointing": run.activation_checkpointing,
        "tokens": tokens,
        "steps": recipe.steps,
        "warmup_steps": recipe.warmup_steps,
        "flops_per_token": full,
        "flops_per_token_causal": half if recipe.objective == "ar" else full,
        "flops": full * tokens * recipe.steps,
        "memory": {
            "weights": held.weights,
            "gradients": held.gradients,
            "optimizer": held.optimizer,
            "activations": held.activations,
            "workspace": held.workspace,
            "total": held.total,
        },
        "host_bytes_a_node": offloaded_bytes(config, where) * min(cluster.node_gpus, run.world_size),
        "fits": fits(config, where, cluster.gpu.memory),
        "wire_bytes": wire_bytes(config, where),
        "step_seconds": step.seconds,
        "arithmetic_seconds": step.arithmetic,
        "communication_seconds": step.communication,
        "exposed_seconds": step.exposed + step.exchange,
        "exchange_seconds": step.exchange,
        "mfu": step.mfu,
        "mfu_causal": step.mfu * (half / full if recipe.objective == "ar" else 1),
        "days": hours / 24,
        "gpu_hours": hours * run.world_size,
        "dollars_per_gpu_hour": price.dollars,
        "dollars": hours * run.world_size * price.dollars,
        "checkpoint_bytes": checkpoint_bytes(config, recipe.objective),
        "checkpoints_kept": kept,
        "disk_bytes": checkpoint_bytes(config, recipe.objective) * (kept + 1),
    }


def options(
    recipe: Recipe, gpus: int, cluster: Cluster, ds_configs: dict[str, dict[str, Any]], asked: argparse.Namespace, price: Price
) -> list[dict[str, Any]]:
    """For each ds_config its fastest layout that fits, or where none does the one that needs least memory; the best first.

    Every number of ranks an image that divides ranks, heads and tokens is tried, and every micro batch that divides the batch.

    Raises:
        ValueError: no layout multiplies out; the nearest numbers of GPUs that do are named.
    """
    found = []
    for name, values in ds_configs.items():
        tried = [estimate(run, name, cluster, price) for run in _runs(recipe, gpus, values, asked, cluster.node_gpus)]
        if tried:
            found.append(min(tried, key=_worse))
    if not found:
        nearest = [n for n in (*range(gpus, 0, -1), *range(gpus, 8 * gpus + 65)) if _splits(recipe, n, cluster.node_gpus)]
        below, above = (next((n for n in nearest if (n < gpus) == less), None) for less in (True, False))
        named = " or ".join(str(n) for n in (below, above) if n)
        raise ValueError(f"a batch of {recipe.batch_images} images does not divide over {gpus} GPUs; numbers that do: {named}")
    return sorted(found, key=_worse)


def _worse(one: dict[str, Any]) -> tuple[bool, bool, float, float]:
    # What fits comes first, then what sums many gradients in fp32, then what is fast, its doubts counted, then what needs little.
    doubts = (MARGINS["hpz"] if one["hpz"] > 1 else 0) + (MARGINS["sharded less"] if one["stage"] < 3 else 0)
    seconds = float(f"{one['step_seconds'] * (1 + doubts):.3g}") if one["fits"] else 0.0
    return not one["fits"], one["rough"], seconds, one["memory"]["total"]


def _splits(recipe: Recipe, gpus: int, node_gpus: int) -> list[int]:
    """The numbers of ranks an image that divide ranks and heads, within a node, whose groups divide the batch."""
    config = recipe.model
    fewest = {p: config.n_ctx - (p - 1) * -(-config.n_ctx // p) for p in range(1, node_gpus + 1)}  # tokens of the last rank
    parts = (p for p, tokens in fewest.items() if tokens > 0 and not (gpus % p or config.n_head % p))
    return [p for p in parts if recipe.batch_images % (gpus // p) == 0]


def _runs(recipe: Recipe, gpus: int, values: dict[str, Any], asked: argparse.Namespace, node_gpus: int) -> list[Run]:
    runs = []
    for parts in [asked.sequence_parallel] if asked.sequence_parallel else _splits(recipe, gpus, node_gpus):
        share = recipe.batch_images // (gpus // parts) if gpus >= parts else 0
        for micro_batch in [asked.micro_batch] if asked.micro_batch else range(1, share + 1):
            if asked.micro_batch or share % micro_batch == 0:
                runs.append(join(recipe, values, gpus, micro_batch, parts))
    return runs


def shipped(checkpointing: str | None = None) -> dict[str, dict[str, Any]]:
    """The ds_configs a plan chooses from, by file name: those in bf16; sequence parallelism is tried with each of them anyway."""
    found = {path.name: load_ds_config(path) for path in sorted(DIRECTORY.glob("*.json"))}
    wanted = {
        name: values
        for name, values in found.items()
        if values.get("bf16", {}).get("enabled") and "sequence_parallel" not in values.get("igpt_ds", {})
    }
    if checkpointing:
        mode = "activation_checkpointing"
        wanted = {name: values for name, values in wanted.items() if values.get("igpt_ds", {}).get(mode, "none") == checkpointing}
    return wanted


def network(text: str) -> float:
    """Bytes a second of a node's cards together, from "8x400": eight cards of 400 Gbit/s."""
    found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text)
    if not found or not float(found[1]) * float(found[2]):
        raise ValueError(f"nodes_nic={text} must be cards times Gbit/s of one, like 8x400")
    return int(found[1]) * float(found[2]) * 1e9 / 8


def dry_run(run: Run, ds_config: str, keep_last: int, keep_every: int) -> str:
    """The plan of one run, on H100s, in plain text."""
    return describe([estimate(run, ds_config, Cluster(GPUS["h100-80g"]), Price(DOLLARS, keep_last, keep_every))], SPARE)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan of a recipe on a number of GPUs."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--recipe", required=True, help="name of a recipe")
    batch = "another batch than the recipe's, with fewer or more steps over as many images"
    parser.add_argument("--batch_images", type=int, help=batch)
    parser.add_argument("--gpus", type=int, help="number of ranks; 1 when left out")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100-80g", help="what each of them is")
    parser.add_argument("--gpu_memory", type=float, help="GB of one GPU, instead of what is known of --gpu")
    parser.add_argument("--node_gpus", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--nodes_nic", default="8x400", help="network cards of a node x Gbit/s of each")
    parser.add_argument("--ds_config", type=Path, help="plan with this one, instead of the best of those shipped")
    parser.add_argument("--activation_checkpointing", choices=CHECKPOINTING, help="choose among ds_configs of this kind only")
    parser.add_argument("--micro_batch", type=int, help="images per rank and micro_step; the best when left out")
    parser.add_argument("--sequence_parallel", type=int, help="ranks that share an image; the best number when left out")
    parser.add_argument("--dollars_per_gpu_hour", type=float, default=DOLLARS, help="price of one GPU")
    parser.add_argument("--keep_last", type=int, default=2, help="how many of the newest checkpoints to keep")
    parser.add_argument("--keep_every", type=int, default=0, help="keep checkpoints at multiples of this step for ever; 0: none")
    parser.add_argument("--table", action="store_true", help=f"one line for each of {TABLE[0]} to {TABLE[-1]} GPUs")
    parser.add_argument("--markdown", action="store_true", help="print the text between the fences of Markdown")
    parser.add_argument("--json", action="store_true", help="print numbers instead of text")
    args = parser.parse_args(argv)
    if args.table and args.gpus is not None:
        raise ValueError(f"--table goes through {TABLE[0]} to {TABLE[-1]} GPUs; leave out --gpus {args.gpus}, or --table")
    cluster, recipe = read_cluster(args), with_batch(get_recipe(args.recipe), args.batch_images)
    price = Price(args.dollars_per_gpu_hour, args.keep_last, args.keep_every)
    files = {args.ds_config.name: load_ds_config(args.ds_config)} if args.ds_config else shipped(args.activation_checkpointing)
    rows = []
    for gpus in TABLE if args.table else (1 if args.gpus is None else args.gpus,):
        try:
            found = options(recipe, gpus, cluster, files, args, price)
            rows += found[:1] if args.table else found
        except ValueError as error:
            if not args.table:
                raise
            rows.append({"gpus": gpus, "reason": str(error)})
    text = describe_table(rows) if args.table else describe(rows, SPARE)
    fence = "```\n" if args.markdown else ""
    print(json.dumps(rows, indent=1) if args.json else f"{fence}{text}{fence and chr(10)}{fence.strip()}")


def with_batch(recipe: Recipe, batch_images: int | None) -> Recipe:
    """The recipe with another batch over as many images. It is another recipe then: its learning rate is not the paper's."""
    if batch_images is None:
        return recipe
    steps, warmup_steps = (max(1, round(n * recipe.batch_images / batch_images)) for n in (recipe.steps, recipe.warmup_steps))
    return replace(
        recipe, name=f"{recipe.name} at batch {batch_images}", batch_images=batch_images, steps=steps, warmup_steps=warmup_steps
    )


def read_cluster(args: argparse.Namespace) -> Cluster:
    """The machines that the flags name.

    Raises:
        ValueError: a number that is no number of GPUs, bytes or dollars.
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
            raise ValueError(f"{name}={value} must be at least {bound}")
    for name, unit in (("gpu_memory", "GB"), ("dollars_per_gpu_hour", "dollars")):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}={value:g} must be a positive number of {unit}")
    gpu = GPUS[args.gpu]
    if args.gpu_memory:
        gpu = replace(gpu, memory=args.gpu_memory * 1e9)
    return Cluster(gpu, args.node_gpus, network(args.nodes_nic))
