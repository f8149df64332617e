"""What each stage of a scale is for, in one line, and about how long it takes.

In: stages (stages.py), their scale, and the machine. Out: words and seconds. On GPUs a training takes what the plan estimates
(budget.py); a forward pass runs at the GPU's rate for matrix products, and a step of a probe by SGD takes an assumed millisecond.
On a CPU the rates are those of two cores: docs/cifar10/train_split/train.jsonl has 44 images/s of 16x16 pixels with 8 layers of
128, and that is 1.58e11 FLOP/s. The seconds of small stages are assumed. Called by tools/paper_plan.py.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from igpt_ds.console import count
from igpt_ds.data.shards.index import read_index
from igpt_ds.data.sources import listing, open_source
from igpt_ds.ds_config import load_ds_config
from igpt_ds.errors import InputError
from igpt_ds.paper import budget
from igpt_ds.paper.stage import Stage
from igpt_ds.paper.system import Images, Scale, System
from igpt_ds.plan.costs import forward_flops_per_token, train_flops_per_token
from igpt_ds.plan.shipped import find_ds_config
from igpt_ds.plan.step_time import Cluster

CPU_FLOPS = {"fp32": 1.58e11, "bf16": 2.4e11}  # of a training on two processes, where the processor has bf16: docs/bench_cpu.json
CPU_STEP_SECONDS = 0.1  # what a step takes beside its arithmetic
PROBE_PASSES = 4000  # over the training images: 13 penalties of some 300 iterations, forward and backward in one
CLASSES = {"imagenet": 1000, "cifar100": 100}  # of a probe; 10 of others
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
    "tools/filter_shards.py": "the images that are most like another data set",
    "tools/consolidate.py": "a model dir of a checkpoint",
    "tools/evaluate.py": "the likelihood of held-out images",
    "tools/sgd_probe.py": "linear probes by SGD: features larger than memory",
    "tools/sweep_lr.py": "search of the learning rate: one training for each rate, until the result gets worse",
    "tools/sample.py": "a picture of images that the model draws",
    "tools/tables.py": "all results as tables",
    "tools/model_card.py": "the results in the model's card",
    "tools/report.py": "one page with pictures and tables",
}


KINDS = {  # of stages: the word for one and for several
    "train.py": ("pre-training", "pre-trainings"),
    "tools/sweep_lr.py": ("search of a learning rate", "searches of a learning rate"),
    "finetune.py": ("fine-tuning", "fine-tunings"),
    "tools/extract_features.py": ("set of features", "sets of features"),
    "tools/linear_probe.py": ("probe by L-BFGS", "probes by L-BFGS"),
    "tools/sgd_probe.py": ("probe by SGD", "probes by SGD"),
    "tools/figures.py": ("figure", "figures"),
    "": ("other stage", "other stages"),
}


@dataclass(frozen=True)
class Machine:
    """What runs the stages."""

    words: str  # "2 CPU processes"
    start_seconds: float  # of one process, with its imports
    flops: float  # of one process, in a forward pass
    images_per_s: float  # read, decoded, and cropped
    step_seconds: Callable[[System], float]


def cpu(ranks: int, precision: str, features: str = "fp32") -> Machine:
    """Two cores; further ranks share them. Trainings compute in `precision`, forward passes in that of the features."""

    def step(system: System) -> float:
        recipe = system.recipe
        flops = train_flops_per_token(recipe.model) * recipe.model.n_ctx * recipe.batch_images
        return CPU_STEP_SECONDS + flops / CPU_FLOPS[precision]

    return Machine(f"{ranks} CPU processes", 6.0, CPU_FLOPS[features] / 2, 1000.0, step)


def gpus(number: int, cluster: Cluster, scale: Scale) -> Machine:
    """GPUs of one kind, and the scale whose precision they compute in."""

    def step(system: System) -> float:
        ds_config = budget.ds_config_of(system, scale) if scale.name == "full" else None
        return budget.trained(system.recipe, number, cluster, ds_config=ds_config).step.seconds

    forward = budget.forward_rate(cluster, scale.precision if scale.name == "full" else "bf16")
    return Machine(f"{number} {cluster.gpu.name}", 20.0, forward, 5000.0, step)


def by_kind(found: Sequence[Stage]) -> str:
    """How many stages of each kind there are, in words."""
    kinds = Counter(stage.words[0] if stage.words[0] in KINDS else "" for stage in found)
    return ", ".join(count(kinds[name], *words) for name, words in KINDS.items() if kinds[name])


def purpose(stage: Stage) -> str:
    """What a stage is for, in one line."""
    program, words = stage.words[0], stage.words
    if program == "train.py":
        return "pre-training: the network learns to predict pixels"
    if program == "finetune.py":
        how = "training as a classifier from fresh weights" if "--untrained" in words else "fine-tuning as a classifier"
        loss = ", with the class loss alone" if _value(stage, "--loss") == "clf" else ""
        layer = ", with the class head on the best layer" if "--layer_from" in words else ""
        labels = f" on {_value(stage, '--labels')} labels" if "--labels" in words else ""
        return f"{how}{labels}{loss}{layer}, and its accuracy"
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
    images = _images(stage, scale)
    system = _longest(scale.systems, lambda one: one.recipe.name, stage.name) or scale.of_recipe(scale.main)
    found, program, start = counts.get(images.id) or {}, stage.words[0], machine.start_seconds
    recipe = system.recipe
    try:
        if program in ("train.py", "finetune.py", "tools/sweep_lr.py"):
            return _training(stage, scale, system, machine, found)
    except InputError:
        return None
    if program == "tools/sample.py":
        return start + 32 * recipe.model.n_ctx**2 * forward_flops_per_token(recipe.model, causal=True) / (8 * machine.flops)
    if program in ("tools/fit_palette.py", "tools/make_shards.py"):
        read = sum(found.values()) * images.views if found else None
        most = scale.palette_images if program == "tools/fit_palette.py" else None
        return None if read is None else start + min(read, most or read) / machine.images_per_s
    if program == "tools/filter_shards.py":
        kept = next(one.filtered for one in scale.systems if one.filtered)
        system, images = scale.of_recipe(kept.recipe), scale.of(kept.candidates)
        return _forward(system, _extracted(system, images, counts.get(images.id) or {}), machine)
    if program == "tools/evaluate.py":
        return _forward(system, _of(found, str(_value(stage, "--split"))), machine)
    if program == "tools/extract_features.py":
        seen = _extracted(system, images, found)
        return start if seen and "--pixels" in stage.words else _forward(system, seen, machine)
    if program in ("tools/linear_probe.py", "tools/sgd_probe.py"):
        return _probes(stage, scale, system, found, machine)
    return start


def _training(stage: Stage, scale: Scale, system: System, machine: Machine, found: Counts) -> float | None:
    """A pre-training, a fine-tuning, or a search over one of them."""
    recipe, words = system.recipe, stage.words
    tuning = _longest(system.tunings, lambda one: f"{recipe.name}-{one.images}-{one.name}", stage.name)
    searches, steps = words[0] == "tools/sweep_lr.py", recipe.steps
    if tuning is not None:
        if not (found or scale.finetune_steps):
            return None
        steps = budget.tuning_steps(tuning, scale, recipe.batch_images, _of(found, "train"))
    tried = budget.rates_tried(recipe.lr if tuning is None else recipe.lr / 10) if searches else 1
    return min(tried, scale.max_rates or tried) * (machine.start_seconds + steps * machine.step_seconds(system))


def _extracted(system: System, images: Images, found: Counts) -> int:
    """How often the network reads an image for the features of both splits; five masks for each evaluated image (paper 4.6)."""
    votes = 5 if system.recipe.objective == "bert" else 1
    return _of(found, images.train_split) + _of(found, images.eval_split) * votes if found else 0


def _forward(system: System, seen: int, machine: Machine) -> float | None:
    """A forward pass of each image; None if their number is unknown."""
    recipe = system.recipe
    flops = seen * recipe.model.n_ctx * forward_flops_per_token(recipe.model, causal=recipe.objective == "ar")
    return machine.start_seconds + flops / machine.flops if seen else None


def _probes(stage: Stage, scale: Scale, system: System, found: Counts, machine: Machine) -> float | None:
    if stage.words[0] == "tools/sgd_probe.py":
        steps = scale.sgd_steps or budget.SGD_STEPS
        return machine.start_seconds + stage.rows * budget.SGD_FITS * steps * budget.SGD_SECONDS
    if not found:
        return None
    images = _images(stage, scale)
    pixels, protocol = stage.name.startswith("probe-pixels"), _value(stage, "--protocol")
    width = 3 * images.n_px**2 if pixels else system.recipe.model.n_embd * (5 if protocol == "concat" else 1)
    layers = system.recipe.model.n_layer + 1
    fits = stage.rows + (layers if protocol and not pixels else 0)  # the search of the best layer
    flops = fits * PROBE_PASSES * 4 * _of(found, images.train_split) * width * CLASSES.get(images.name, 10)
    return machine.start_seconds + fits + flops / machine.flops


def _images(stage: Stage, scale: Scale) -> Images:
    """The data set that a stage reads."""
    return _longest(scale.images, lambda one: one.id, stage.name) or scale.images[0]


def precision(stage: Stage) -> str:
    """The precision that a stage computes in; "" where it computes nothing in floating point."""
    program = stage.words[0]
    if program == "tools/extract_features.py":
        stored = _value(stage, "--dtype")
        return (
            ""
            if "--pixels" in stage.words
            else (_value(stage, "--precision") or "fp32") + (f", stored in {stored}" if stored else "")
        )
    if program in ("tools/evaluate.py", "tools/filter_shards.py", "tools/linear_probe.py", "tools/sgd_probe.py"):
        return _value(stage, "--precision") or "fp32"
    if ds_config := _value(stage, "--ds_config"):
        return load_precision(ds_config)
    return ""


def load_precision(ds_config: str) -> str:
    """The precision of a ds_config in words."""
    values = load_ds_config(find_ds_config(ds_config))
    parts = {name: values.get(name) for name in ("bf16", "fp16")}
    half = next((name for name, part in parts.items() if isinstance(part, dict) and part.get("enabled")), None)
    return f"{half} with fp32 master weights" if half else "fp32"


def count_images(images: Images, shards: Path) -> dict[str, int]:
    """The images of each split, from the shards if they exist, else from the source; empty if they cannot be counted quickly."""
    if images.counts:
        return dict(images.counts)
    if shards.is_dir():
        return {split: known.n_images for split, known in read_index(shards).splits.items()}
    until, found = 0.0, dict[str, int]()
    for entry in listing(open_source(images.source)):
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
