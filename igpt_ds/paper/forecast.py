"""What each stage of a scale is for, in one line, and about how long it takes.

In: stages (stages.py), their scale, and the machine. Out: words and seconds. On GPUs a training takes what the plan estimates
(budget.py); a forward pass runs at the GPU's rate for matrix products, and a step of a probe by SGD takes an assumed millisecond.
On a CPU the rates are those of two cores: docs/cifar10/train.jsonl has 44 images/s of 16x16 pixels with 8 layers of 128, and that
is 1.58e11 FLOP/s. The seconds of small stages are assumed. Called by tools/paper_plan.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from igpt_ds.config import Recipe
from igpt_ds.data.shards.index import read_index
from igpt_ds.data.sources import open_source
from igpt_ds.errors import InputError
from igpt_ds.paper import budget
from igpt_ds.paper.scales import Images, Scale
from igpt_ds.paper.stage import Stage
from igpt_ds.plan.costs import forward_flops_per_token, train_flops_per_token
from igpt_ds.plan.step_time import EFFICIENCY, Cluster

CPU_FLOPS, CPU_STEP_SECONDS = 1.58e11, 0.1  # of two processes; the second: what a step takes beside its arithmetic
PROBE_PASSES = 4000  # over the training images: 13 penalties of some 300 iterations, forward and backward in one
CLASSES = 10  # of a probe
COUNT_SECONDS = 5.0  # after which a source is too large to be counted for a forecast
_T = TypeVar("_T")
Counts = Mapping[str, int]  # images of each split; empty if unknown

_FIGURES = {
    "layers": "accuracy of the probes by layer",
    "datasets": "accuracy by layer on each data set (Figure 2)",
    "loss": "accuracy against loss (Figure 3)",
    "objectives": "AR beside BERT (Figure 4)",
    "confusion": "which classes are taken for which",
    "neighbours": "the images whose features are most alike",
    "training": "loss against images seen",
}
_PROTOCOLS = {
    None: "a linear probe of each layer: what a linear classifier reads from it",
    "concat": "a linear probe of five layers side by side",
    "low_data": "linear probes with few labels",
    "mask_vote": "a linear probe that votes over masks",
}
_TOOLS = {
    "tools/fit_palette.py": "the palette: the colours that pixels become",
    "tools/make_shards.py": "the images as tokens of the palette, in shards",
    "tools/consolidate.py": "a model dir of a checkpoint",
    "tools/evaluate.py": "the likelihood of held-out images",
    "tools/sgd_probe.py": "linear probes by SGD: features larger than memory",
    "tools/sample.py": "a picture of images that the model draws",
    "tools/tables.py": "all results as tables",
    "tools/model_card.py": "the results in the model's card",
    "tools/report.py": "one page with pictures and tables",
}


@dataclass(frozen=True)
class Machine:
    """What runs the stages."""

    words: str  # "2 CPU processes"
    start_seconds: float  # of one process, with its imports
    flops: float  # of one process, in a forward pass
    images_per_s: float  # read, decoded, and cropped
    step_seconds: Callable[[Recipe], float]


def cpu(ranks: int) -> Machine:
    """Two cores; further ranks share them."""

    def step(recipe: Recipe) -> float:
        flops = train_flops_per_token(recipe.model) * recipe.model.n_ctx * recipe.batch_images
        return CPU_STEP_SECONDS + flops / CPU_FLOPS

    return Machine(f"{ranks} CPU processes", 6.0, CPU_FLOPS / 2, 1000.0, step)


def gpus(number: int, cluster: Cluster) -> Machine:
    """GPUs of one kind."""

    def step(recipe: Recipe) -> float:
        return budget.trained(recipe, number, cluster).step.seconds

    return Machine(f"{number} {cluster.gpu.name}", 20.0, cluster.gpu.gemm * EFFICIENCY, 5000.0, step)


def purpose(stage: Stage) -> str:
    """What a stage is for, in one line."""
    program, words = stage.words[0], stage.words
    if program == "train.py":
        return "pre-training: the network learns to predict pixels"
    if program == "finetune.py":
        how = "training as a classifier from fresh weights" if "--untrained" in words else "fine-tuning as a classifier"
        return f"{how}, and its accuracy"
    if program == "tools/figures.py":
        return f"figure: {_FIGURES[words[1]]}"
    if program == "tools/extract_features.py":
        of = (
            "raw pixels"
            if "--pixels" in words
            else "a network before training"
            if "--untrained" in words
            else "the trained network"
        )
        return f"features of {of}, for the probes"
    if program == "tools/linear_probe.py":
        return (
            "a linear probe of raw pixels" if stage.name.startswith("probe-pixels") else _PROTOCOLS[_value(stage, "--protocol")]
        )
    return _TOOLS[program]


def seconds(stage: Stage, scale: Scale, machine: Machine, counts: Mapping[str, Counts]) -> float | None:
    """About how long a stage takes; None if the number of its images is unknown, or the training does not fit the machine.

    Args:
        counts: images of each split, by the id of the data set.
    """
    images = _longest(scale.images, lambda one: one.id, stage.name) or scale.images[0]
    system = _longest(scale.systems, lambda one: one.recipe.name, stage.name)
    found, program, start = counts.get(images.id) or {}, stage.words[0], machine.start_seconds
    recipe = system.recipe if system else scale.of_recipe(scale.main).recipe
    try:
        if program == "train.py":
            return start + recipe.steps * machine.step_seconds(recipe)
        if program == "finetune.py":
            given = _value(stage, "--steps")
            if not given and not found:
                return None
            steps = int(given) if given else round(scale.epochs * _of(found, "train") / recipe.batch_images)
            return start + steps * machine.step_seconds(recipe)
    except InputError:
        return None
    if program == "tools/sample.py":
        return start + 32 * recipe.model.n_ctx**2 * forward_flops_per_token(recipe.model, causal=True) / (8 * machine.flops)
    if program in ("tools/fit_palette.py", "tools/make_shards.py"):
        read = sum(found.values()) * images.views if found else None
        return None if read is None else start + min(read, scale.palette_images or read) / machine.images_per_s
    if program in ("tools/extract_features.py", "tools/evaluate.py"):
        return _forward(recipe, images, found, machine, "--pixels" in stage.words)
    if program in ("tools/linear_probe.py", "tools/sgd_probe.py"):
        return _probes(stage, recipe, images, found, machine)
    return start


def _forward(recipe: Recipe, images: Images, found: Counts, machine: Machine, pixels: bool) -> float | None:
    if not found:
        return None
    seen = _of(found, images.train_split) + _of(found, images.eval_split) * (5 if recipe.objective == "bert" else 1)
    flops = 0.0 if pixels else seen * recipe.model.n_ctx * forward_flops_per_token(recipe.model, causal=recipe.objective == "ar")
    return machine.start_seconds + flops / machine.flops


def _probes(stage: Stage, recipe: Recipe, images: Images, found: Counts, machine: Machine) -> float | None:
    if stage.words[0] == "tools/sgd_probe.py":
        return machine.start_seconds + stage.rows * budget.SGD_FITS * budget.SGD_STEPS * budget.SGD_SECONDS
    if not found:
        return None
    pixels, protocol = stage.name.startswith("probe-pixels"), _value(stage, "--protocol")
    width = 3 * images.n_px**2 if pixels else recipe.model.n_embd * (5 if protocol == "concat" else 1)
    fits = stage.rows + (len(images.probed(recipe)) if protocol and not pixels else 0)  # the search of the best layer
    flops = fits * PROBE_PASSES * 4 * _of(found, images.train_split) * width * CLASSES
    return machine.start_seconds + fits + flops / machine.flops


def count_images(images: Images, shards: Path) -> dict[str, int]:
    """The images of each split, from the shards if they exist, else from the source; empty if they cannot be counted quickly."""
    if images.counts:
        return dict(images.counts)
    if shards.is_dir():
        return {split: known.n_images for split, known in read_index(shards).splits.items()}
    until, found = 0.0, dict[str, int]()
    for entry in open_source(images.source).entries():
        until = until or time.monotonic() + COUNT_SECONDS  # without the source's own imports
        found[entry.split] = found.get(entry.split, 0) + 1
        if time.monotonic() > until:
            return {}
    if "val" not in found and "train" in found:
        found["val"] = round(found["train"] * (images.val_fraction or 0.1))
        found["train"] -= found["val"]
    return found


def _of(found: Counts, split: str) -> int:
    return sum(found.get(part, 0) for part in split.split("+"))


def _value(stage: Stage, flag: str) -> str | None:
    """The word after a flag."""
    return stage.words[stage.words.index(flag) + 1] if flag in stage.words else None


def _longest(some: Sequence[_T], name: Callable[[_T], str], text: str) -> _T | None:
    """Of the things whose name is part of a text the one with the longest name."""
    return max((one for one in some if name(one) in text), key=lambda one: len(name(one)), default=None)
