"""Counts what a scale costs before anything is submitted: GPU-hours and bytes on disk.

In: a scale (system.py), a number of GPUs and their kind. Out: `Cost`s, and text made of them. A pre-training costs what
`options` estimates for the fastest ds_config that fits. A fine-tuning costs the same per step, for all its epochs, although
early stopping ends most of them sooner. A search of learning rates costs one training for each rate from 0.01 to the one below
the best; the best of a fine-tuning is assumed a tenth of pre-training's (paper 4.5). Feature extraction costs a forward pass.
Probes by SGD are counted at an assumed millisecond per step. Probes by L-BFGS, pictures and tables take minutes each and are not
counted. Called by tools/paper_plan.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from igpt_ds.config import Recipe
from igpt_ds.ds_config import load_ds_config
from igpt_ds.errors import InputError
from igpt_ds.paper.system import Images, Scale, System, Tuning
from igpt_ds.plan.costs import KEEP_LAST, forward_flops_per_token, parameters
from igpt_ds.plan.estimate import DOLLARS, Estimate, Price
from igpt_ds.plan.options import Request, options
from igpt_ds.plan.shipped import find_ds_config, shipped
from igpt_ds.plan.step_time import EFFICIENCY, FP32_SHARE, Cluster
from igpt_ds.plan.text import columns, run_time

SGD_STEPS, SGD_FITS, SGD_SECONDS = 1_000_000, 3, 1e-3  # paper 3.4; two groups of rates and the final fit; assumed, per step
LABEL_STEPS = 400  # of a fine-tuning with few labels, at most: the default of finetune.py
BLOCK = 512  # bytes of a tar block; a record is three blocks and the .npy file (data/shards/record.py)
NPY_HEADER = 128
FP32 = "zero3_fp32.json"
KINDS = ("pre-training", "A.1", "rate searches", "fine-tuning", "features", "probes", "shards")


@dataclass(frozen=True)
class Cost:
    """The cost of one thing: GPU time, disk space, or both."""

    kind: str  # one of KINDS
    what: str
    gpu_hours: float = 0.0
    disk: float = 0.0  # bytes
    estimate: Estimate | None = None  # only of a pre-training


@functools.cache
def trained(recipe: Recipe, gpus: int, cluster: Cluster, kept: int = 0, ds_config: str | None = None) -> Estimate:
    """The estimate of the recommended way to train a recipe.

    Args:
        kept: checkpoints that are kept beside the newest.
        ds_config: the only one that is considered; None: those for bf16.

    Raises:
        ValueError: the batch does not divide over the GPUs, or no shipped ds_config fits them.
    """
    file = find_ds_config(ds_config) if ds_config else None
    candidates = {file.name: load_ds_config(file)} if file else shipped()
    best = options(Request(recipe, gpus, cluster, candidates, price=Price(keep_last=KEEP_LAST + kept)))[0]
    if not best.fits:
        raise InputError(f"{recipe.name} does not fit {gpus} {cluster.gpu.name}; give more --gpus, or larger ones by --gpu")
    return best


def ds_config_of(system: System, scale: Scale) -> str | None:
    """The ds_config that a system must have; None: the plan chooses."""
    return Path(system.ds_config).name if system.ds_config else FP32 if scale.precision == "fp32" else None


def costs(scale: Scale, gpus: int, cluster: Cluster) -> list[Cost]:
    """All costs of a scale, ordered by kind.

    Raises:
        ValueError: the sizes of the scale's data sets are unknown; or the reasons of `trained`.
    """
    if not all(images.counts for images in scale.images):
        raise InputError(f"scale {scale.name} has data sets of unknown size, so its costs cannot be counted")
    found = [Cost("shards", images.id, disk=shard_bytes(images)) for images in scale.images]
    for system in scale.systems:
        found += _of(system, scale, gpus, cluster)
    return sorted(found, key=lambda cost: KINDS.index(cost.kind))


def rates_tried(lr: float) -> int:
    """The rates of a search (paper 3.4) whose best is `lr`: 0.01, 0.003, 0.001, ... down to the one below it."""
    rates = [float(f"{digit}e-{power}") for power in range(2, 10) for digit in (1, 0.3)]
    return 2 + min(range(len(rates)), key=lambda place: abs(rates[place] / lr - 1))


def tuning_steps(tuning: Tuning, scale: Scale, batch_images: int, n_images: int) -> int:
    """The most steps of a fine-tuning."""
    if "labels" in tuning.knobs:
        return int(str(tuning.knobs["subsets"])) * label_steps(tuning, scale)
    return scale.finetune_steps or round((tuning.epochs or scale.epochs) * n_images / batch_images)


def label_steps(tuning: Tuning, scale: Scale) -> int:
    """The most steps of a fine-tuning on one subset with few labels. A rehearsal never makes them more."""
    own = int(str(tuning.knobs.get("steps", LABEL_STEPS)))
    return min(own, scale.finetune_steps or own)


def _of(system: System, scale: Scale, gpus: int, cluster: Cluster) -> Iterator[Cost]:
    """The costs of one system."""
    recipe = system.recipe
    best = trained(recipe, gpus, cluster, len(system.points), ds_config_of(system, scale))
    models = 4 * parameters(recipe.model, recipe.objective) * len(system.steps)
    yield Cost("A.1" if system.changed else "pre-training", recipe.name, best.gpu_hours, best.disk_bytes + models, best)
    one = (KEEP_LAST + 2) * best.checkpoint_bytes + 4 * best.parameters  # the disk of one training
    if system.searched:
        tried = rates_tried(recipe.lr)
        yield Cost("rate searches", f"{recipe.name}: {tried} rates", tried * best.gpu_hours, tried * one)
    for tuning in system.tunings:
        steps = tuning_steps(tuning, scale, recipe.batch_images, scale.of(tuning.images).counts["train"])
        hours, name = best.gpu_hours * steps / recipe.steps, f"{recipe.name} {tuning.name} on {tuning.images}"
        if tuning.searched == tuning.name:
            tried = rates_tried(recipe.lr / 10)
            yield Cost("rate searches", f"{name}: {tried} rates", tried * hours, tried * one)
        yield Cost("fine-tuning", name, hours, one)
    for id in system.probed:
        images = scale.of(id)
        models_probed = len(system.steps) if id == system.probed[0] else 1
        models_probed += id == system.probed[0] and "untrained" in system.variants
        yield _features(recipe, images, scale, models_probed, cluster)
        if images.sgd:
            probes = recipe.model.n_layer + 1 + ("concat" in system.variants)
            hours = probes * SGD_FITS * SGD_STEPS * SGD_SECONDS / 3600
            yield Cost("probes", f"{recipe.name} on {id}", models_probed * hours)


def forward_rate(cluster: Cluster, precision: str) -> float:
    """FLOP/s of a forward pass on one GPU."""
    return EFFICIENCY * (FP32_SHARE * cluster.gpu.fp32 if precision == "fp32" else cluster.gpu.gemm)


def _features(recipe: Recipe, images: Images, scale: Scale, models: int, cluster: Cluster) -> Cost:
    config = recipe.model
    fitted = sum(images.counts[split] for split in images.train_split.split("+"))
    seen = fitted + images.counts[images.eval_split] * (5 if recipe.objective == "bert" else 1)
    flops = seen * config.n_ctx * forward_flops_per_token(config, causal=recipe.objective == "ar")
    hours = flops / forward_rate(cluster, scale.precision) / 3600
    disk = seen * (config.n_layer + 1) * config.n_embd * (4 if scale.precision == "fp32" else 2)
    what = f"{recipe.name} on {images.id}" + (f", {models} models" if models > 1 else "")
    return Cost("features", what, models * hours, models * disk)


def shard_bytes(images: Images) -> int:
    """Bytes of a data set's shards, without index, palette and the kilobyte at the end of each tar file."""
    record = BLOCK * (3 + -(-(NPY_HEADER + 2 * images.n_px**2) // BLOCK))
    return record * sum(n * (images.views if split == "train" else 1) for split, n in images.counts.items())


def describe_costs(found: Sequence[Cost], gpus: int, cluster: Cluster) -> str:
    """The costs as one table per kind, with sums."""
    lines = []
    for kind in dict.fromkeys(cost.kind for cost in found):
        some = [cost for cost in found if cost.kind == kind]
        rows = [(cost.what, *_run(cost.estimate), *_numbers(cost)) for cost in some]
        total = Cost(kind, "total", sum(cost.gpu_hours for cost in some), sum(cost.disk for cost in some))
        empty = ("",) * (len(rows[0]) - 3)
        run = ("parameters", "images", "steps", "warm-up", "lr", "ds_config", "micro", "days") if empty else ()
        lines += [*columns([(kind, *run, "GPU-hours", "GB"), *rows, ("total", *empty, *_numbers(total))]), ""]
    hours, disk = sum(cost.gpu_hours for cost in found), sum(cost.disk for cost in found)
    dollars = hours * DOLLARS
    where = f"{gpus} {cluster.gpu.name}"
    return "\n".join(
        [
            *lines,
            f"in total {hours:,.0f} GPU-hours (${dollars:,.0f} at ${DOLLARS:g} each), {run_time(hours / gpus)} on {where}",
            f"disk {disk / 1e12:.1f} TB",
        ]
    )


def _run(best: Estimate | None) -> tuple[str, ...]:
    """What a pre-training learns, in the words of Table 5 and section 3.4, and how it fits the machines."""
    if best is None:
        return ()
    sp = f" x sp {best.run.sequence_parallel}" if best.run.sequence_parallel > 1 else ""
    recipe = best.recipe
    learned = f"{recipe.batch_images}", f"{recipe.steps:,}", f"{recipe.warmup_steps:,}", f"{recipe.lr:g}"
    return f"{best.parameters:,}", *learned, best.ds_config, f"{best.run.micro_batch}{sp}", f"{best.days:.1f}"


def _numbers(cost: Cost) -> tuple[str, str]:
    return f"{cost.gpu_hours:,.1f}", f"{cost.disk / 1e9:,.1f}"


def machine_flags(best: Estimate) -> dict[str, object]:
    """The flags of train.py and finetune.py that say how a run fits the machines."""
    parts = best.run.sequence_parallel
    batch: dict[str, object] = {"micro_batch": best.run.micro_batch, "sequence_parallel": parts if parts > 1 else None}
    return {"ds_config": f"ds_configs/{best.ds_config}"} | batch
