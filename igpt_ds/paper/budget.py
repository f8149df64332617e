"""What a scale costs before anything is submitted: GPU-hours and bytes, counted by estimate.py, costs.py and step_time.py.

In: a scale (paper_scales.py), a number of GPUs and their kind. Out: rows of numbers, and text made of them. Trainings cost
what `options` says of the fastest ds_config that fits; fine-tunings the same a step, for all their epochs, though early
stopping will end most of them sooner; features a forward pass. Probes by SGD are counted at an assumed millisecond a step;
those by L-BFGS, pictures and tables take minutes each and are not counted. Called by tools/paper_plan.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from igpt_ds.config import Recipe
from igpt_ds.paper.scales import Images, Scale, System
from igpt_ds.plan.costs import forward_flops_per_token, parameters
from igpt_ds.plan.estimate import DOLLARS, Price, options, shipped
from igpt_ds.plan.step_time import EFFICIENCY, Cluster

SGD_STEPS, SGD_FITS, SGD_SECONDS = 1_000_000, 3, 1e-3  # paper 3.4; two groups of rates and the last fit; a step, assumed
KEEP_LAST = 2  # checkpoints, by train.py's default
BLOCK = 512  # of a tar file; a record is three and the .npy file (data/shards/record.py)
NPY_HEADER = 128


@dataclass(frozen=True)
class Cost:
    """One thing that takes time or room."""

    kind: str  # "pre-training", "fine-tuning", "features", "probes", "shards"
    what: str
    gpu_hours: float = 0.0
    disk: float = 0.0  # bytes
    plan: dict[str, Any] | None = None  # of a pre-training: `estimate`


def trained(recipe: Recipe, gpus: int, cluster: Cluster, kept: int = 0) -> dict[str, Any]:
    """The recommended way to run a recipe: a row of `estimate`.

    Args:
        kept: checkpoints at multiples of so many steps stay; 0: none.

    Raises:
        ValueError: the batch does not divide over the GPUs, or no shipped ds_config fits them.
    """
    free = argparse.Namespace(micro_batch=None, sequence_parallel=None)
    best = options(recipe, gpus, cluster, shipped(), free, Price(DOLLARS, KEEP_LAST, kept))[0]
    if not best["fits"]:
        raise ValueError(f"{recipe.name} does not fit {gpus} {cluster.gpu.name}; give more --gpus, or larger ones by --gpu")
    return best


def costs(scale: Scale, gpus: int, cluster: Cluster) -> list[Cost]:
    """Everything that is counted, in the order of the kinds.

    Raises:
        ValueError: as `trained`; the scale's data sets have no known sizes.
    """
    if not all(images.counts for images in scale.images):
        raise ValueError(f"scale {scale.name} has images whose number nobody knows beforehand; its costs are not counted")
    found = [Cost("shards", images.id, disk=shard_bytes(images)) for images in scale.images]
    for system in scale.systems:
        found += _of(system, scale, gpus, cluster)
    kinds = ("pre-training", "fine-tuning", "features", "probes", "shards")
    return sorted(found, key=lambda cost: kinds.index(cost.kind))


def _of(system: System, scale: Scale, gpus: int, cluster: Cluster) -> Iterator[Cost]:
    """The costs of one system."""
    recipe = system.recipe
    best = trained(recipe, gpus, cluster, system.every if system.stages > 1 else 0)
    models = 4 * parameters(recipe.model, recipe.objective) * len(system.steps)
    yield Cost("pre-training", recipe.name, best["gpu_hours"], best["disk_bytes"] + models, best)
    for ids, how in ((system.finetuned, "fine-tuned"), (system.from_scratch, "from scratch")):
        for id in ids:
            steps = scale.finetune_steps or round(scale.epochs * scale.of(id).counts["train"] / recipe.batch_images)
            hours = best["gpu_hours"] * steps / recipe.steps
            disk = (KEEP_LAST + 2) * best["checkpoint_bytes"] + 4 * best["parameters"]
            yield Cost("fine-tuning", f"{recipe.name} {how} on {id}", hours, disk)
    for id in system.probed:
        images = scale.of(id)
        models_probed = len(system.steps) if id == system.probed[0] else 1
        models_probed += id == system.probed[0] and "untrained" in system.variants
        yield _features(recipe, images, scale.bf16, models_probed, cluster)
        if images.sgd:
            hours = len(images.probed(recipe)) * SGD_FITS * SGD_STEPS * SGD_SECONDS / 3600
            yield Cost("probes", f"{recipe.name} on {id}", models_probed * hours)


def _features(recipe: Recipe, images: Images, fp16: bool, models: int, cluster: Cluster) -> Cost:
    config, layers = recipe.model, images.probed(recipe)
    fitted = sum(images.counts[split] for split in images.train_split.split("+"))
    seen = fitted + images.counts[images.eval_split] * (5 if recipe.objective == "bert" else 1)
    flops = seen * config.n_ctx * forward_flops_per_token(config, causal=recipe.objective == "ar")
    hours = flops * max(layers) / config.n_layer / (cluster.gpu.gemm * EFFICIENCY) / 3600
    disk = seen * len(layers) * config.n_embd * (2 if fp16 else 4)
    what = f"{recipe.name} on {images.id}" + (f", {models} models" if models > 1 else "")
    return Cost("features", what, models * hours, models * disk)


def shard_bytes(images: Images) -> int:
    """Bytes of a data set's shards, but for the kilobyte that closes each tar file, its index and its palette."""
    record = BLOCK * (3 + -(-(NPY_HEADER + 2 * images.n_px**2) // BLOCK))
    return record * sum(n * (images.views if split == "train" else 1) for split, n in images.counts.items())


def describe(found: Sequence[Cost], gpus: int, cluster: Cluster) -> str:
    """The costs as text, with their sums."""
    lines = []
    for kind in dict.fromkeys(cost.kind for cost in found):
        some = [cost for cost in found if cost.kind == kind]
        rows = [(cost.what, *_run(cost.plan), *_numbers(cost)) for cost in some]
        total = Cost(kind, "together", sum(cost.gpu_hours for cost in some), sum(cost.disk for cost in some))
        empty = ("",) * (len(rows[0]) - 3)
        run = ("parameters", "ds_config", "micro", "days") if empty else ()
        lines += [*_columns([(kind, *run, "GPU-hours", "GB"), *rows, ("together", *empty, *_numbers(total))]), ""]
    hours, disk = sum(cost.gpu_hours for cost in found), sum(cost.disk for cost in found)
    dollars = hours * DOLLARS
    where = f"{gpus} {cluster.gpu.name}"
    return "\n".join(
        [
            *lines,
            f"in all {hours:,.0f} GPU-hours (${dollars:,.0f} at ${DOLLARS:g} each), {hours / gpus / 24:.1f} days on {where}",
            f"disk {disk / 1e12:.1f} TB",
        ]
    )


def _run(best: dict[str, Any] | None) -> tuple[str, ...]:
    if best is None:
        return ()
    sp = f" x sp {best['sequence_parallel']}" if best["sequence_parallel"] > 1 else ""
    return f"{best['parameters']:,}", best["ds_config"], f"{best['micro_batch']}{sp}", f"{best['days']:.1f}"


def _numbers(cost: Cost) -> tuple[str, str]:
    return f"{cost.gpu_hours:,.1f}", f"{cost.disk / 1e9:,.1f}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(word) for word in column) for column in zip(*rows, strict=True)]
    return ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def machine_flags(best: dict[str, Any]) -> dict[str, object]:
    """What train.py and finetune.py are told about the machines."""
    parts = best["sequence_parallel"]
    micro_batch = {"micro_batch": best["micro_batch"], "sequence_parallel": parts if parts > 1 else None}
    return {"ds_config": f"ds_configs/{best['ds_config']}"} | micro_batch
