"""Counts what a scale costs before anything is submitted: GPU-hours and bytes on disk.

In: a scale (scales.py), a number of GPUs and their kind. Out: `Cost`s, and text made of them. A pre-training costs what
`options` estimates for the fastest ds_config that fits. A fine-tuning costs the same per step, for all its epochs, although
early stopping ends most of them sooner. Feature extraction costs a forward pass. Probes by SGD are counted at an assumed
millisecond per step. Probes by L-BFGS, pictures and tables take minutes each and are not counted. Called by tools/paper_plan.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from igpt_ds.config import Recipe
from igpt_ds.errors import InputError
from igpt_ds.paper.scales import Images, Scale, System
from igpt_ds.plan.costs import KEEP_LAST, forward_flops_per_token, parameters
from igpt_ds.plan.estimate import DOLLARS, Estimate, Price
from igpt_ds.plan.options import Request, options
from igpt_ds.plan.step_time import EFFICIENCY, Cluster
from igpt_ds.plan.text import columns, run_time

SGD_STEPS, SGD_FITS, SGD_SECONDS = 1_000_000, 3, 1e-3  # paper 3.4; two groups of rates and the final fit; assumed, per step
BLOCK = 512  # bytes of a tar block; a record is three blocks and the .npy file (data/shards/record.py)
NPY_HEADER = 128


@dataclass(frozen=True)
class Cost:
    """The cost of one thing: GPU time, disk space, or both."""

    kind: str  # "pre-training", "fine-tuning", "features", "probes", "shards"
    what: str
    gpu_hours: float = 0.0
    disk: float = 0.0  # bytes
    estimate: Estimate | None = None  # only of a pre-training


def trained(recipe: Recipe, gpus: int, cluster: Cluster, keep_every: int = 0) -> Estimate:
    """The estimate of the recommended way to train a recipe.

    Args:
        keep_every: checkpoints at multiples of this step are kept; 0: none.

    Raises:
        ValueError: the batch does not divide over the GPUs, or no shipped ds_config fits them.
    """
    best = options(Request(recipe, gpus, cluster, price=Price(keep_every=keep_every)))[0]
    if not best.fits:
        raise InputError(f"{recipe.name} does not fit {gpus} {cluster.gpu.name}; give more --gpus, or larger ones by --gpu")
    return best


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
    kinds = ("pre-training", "fine-tuning", "features", "probes", "shards")
    return sorted(found, key=lambda cost: kinds.index(cost.kind))


def _of(system: System, scale: Scale, gpus: int, cluster: Cluster) -> Iterator[Cost]:
    """The costs of one system."""
    recipe = system.recipe
    best = trained(recipe, gpus, cluster, system.every if system.stages > 1 else 0)
    models = 4 * parameters(recipe.model, recipe.objective) * len(system.steps)
    yield Cost("pre-training", recipe.name, best.gpu_hours, best.disk_bytes + models, best)
    for ids, how in ((system.finetuned, "fine-tuned"), (system.from_scratch, "from scratch")):
        for id in ids:
            steps = scale.finetune_steps or round(scale.epochs * scale.of(id).counts["train"] / recipe.batch_images)
            hours = best.gpu_hours * steps / recipe.steps
            disk = (KEEP_LAST + 2) * best.checkpoint_bytes + 4 * best.parameters
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
        run = ("parameters", "ds_config", "micro", "days") if empty else ()
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
    if best is None:
        return ()
    sp = f" x sp {best.run.sequence_parallel}" if best.run.sequence_parallel > 1 else ""
    return f"{best.parameters:,}", best.ds_config, f"{best.run.micro_batch}{sp}", f"{best.days:.1f}"


def _numbers(cost: Cost) -> tuple[str, str]:
    return f"{cost.gpu_hours:,.1f}", f"{cost.disk / 1e9:,.1f}"


def machine_flags(best: Estimate) -> dict[str, object]:
    """The flags of train.py and finetune.py that say how a run fits the machines."""
    parts = best.run.sequence_parallel
    batch: dict[str, object] = {"micro_batch": best.run.micro_batch, "sequence_parallel": parts if parts > 1 else None}
    return {"ds_config": f"ds_configs/{best.ds_config}"} | batch
