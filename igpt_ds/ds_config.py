"""How a run fits the machines: a ds_config is read and checked, and `join` makes one run of it and a recipe.

Called by train.py and the plan; DeepSpeed itself is not imported here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpt_ds.config import CHECKPOINTING, Recipe, recipe_to_dict
from igpt_ds.files import read_json

# A ds_config must not say what the recipe says; each forbidden key with the recipe's name for it.
_OWNED_BY_RECIPE = {
    "train_batch_size": "batch_images",
    "gradient_accumulation_steps": "batch_images (the accumulation follows from it)",
    "gradient_clipping": "clip",
    "optimizer": "lr, betas and eps",
    "scheduler": "lr, warmup_steps and steps",
}
# Top-level keys that DeepSpeed 0.19 reads and that concern the machines. DeepSpeed ignores misspelt ones without a word.
_ALLOWED = (
    "activation_checkpointing",
    "bf16",
    "checkpoint",
    "comms_logger",
    "communication_data_type",
    "compile",
    "data_types",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "fp16",
    "memory_breakdown",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "steps_per_print",
    "torch_autocast",
    "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
_OUR_SECTION = {"activation_checkpointing": "none"}  # the section "igpt_ds" of a ds_config, with its defaults


@dataclass(frozen=True)
class Run:
    """One run: a recipe on world_size ranks, with the complete configuration that DeepSpeed gets."""

    recipe: Recipe
    world_size: int
    micro_batch: int  # images per rank and micro_step
    accumulation: int  # micro_steps per step
    activation_checkpointing: str
    precision: str  # "fp32" or "bf16"
    ds_config: dict[str, Any]


def batch_layout(batch_images: int, micro_batch: int | None, world_size: int) -> tuple[int, int]:
    """(micro_batch, accumulation) with micro_batch * accumulation * world_size == batch_images.

    Raises:
        ValueError: the product does not come out; the nearest batch that does is named.
    """
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch} must be at least 1")
    per_micro_step = (micro_batch or 1) * world_size
    if batch_images % per_micro_step:
        below = batch_images // per_micro_step * per_micro_step
        nearest = [batch for batch in (below, below + per_micro_step) if batch > 0]
        what = f"{world_size} ranks" + (f" x micro batch {micro_batch}" if micro_batch else "")
        nearest_text = " or ".join(map(str, nearest))
        raise ValueError(f"batch_images={batch_images} does not divide into {what}; nearest that does: {nearest_text}")
    micro_batch = micro_batch or batch_images // world_size
    return micro_batch, batch_images // (micro_batch * world_size)


def load_ds_config(path: Path) -> dict[str, Any]:
    """Reads a ds_config and refuses keys that the recipe owns or that DeepSpeed would ignore, by name."""
    values = read_json(path, "ds_config")
    if not isinstance(values, dict):
        raise ValueError(f"ds_config {path} must hold one JSON object")
    for key in values:
        if key in _OWNED_BY_RECIPE:
            raise ValueError(f"ds_config {path}: {key!r} is set by the recipe as {_OWNED_BY_RECIPE[key]}; remove it here")
        if key not in (*_ALLOWED, "igpt_ds"):
            raise ValueError(f"ds_config {path}: unknown key {key!r}; known: {', '.join(('igpt_ds', *_ALLOWED))}")
    for key in ("igpt_ds", "zero_optimization", "bf16", "fp16"):
        if not isinstance(values.get(key, {}), dict):
            raise ValueError(f"ds_config {path}: {key!r} must be an object, not {values[key]!r}")
    micro_batch = values.get("train_micro_batch_size_per_gpu", 1)
    if not isinstance(micro_batch, int) or micro_batch < 1:
        name = "train_micro_batch_size_per_gpu"
        raise ValueError(f"ds_config {path}: {name}={micro_batch!r} must be a whole number of at least 1")
    ours = values.get("igpt_ds", {})
    for key in ours:
        if key not in _OUR_SECTION:
            raise ValueError(f"ds_config {path}: unknown key {key!r} in 'igpt_ds'; known: {', '.join(_OUR_SECTION)}")
    mode = ours.get("activation_checkpointing", "none")
    if mode not in CHECKPOINTING:
        raise ValueError(f"ds_config {path}: activation_checkpointing={mode!r} is unknown; known: {', '.join(CHECKPOINTING)}")
    stage = values.get("zero_optimization", {}).get("stage")
    if stage != 3:
        raise ValueError(f"ds_config {path}: zero_optimization.stage={stage!r}; this project trains and consolidates stage 3")
    if values.get("fp16", {}).get("enabled"):
        raise ValueError(f"ds_config {path}: fp16 is not supported; use bf16 or neither")
    return values


def join(recipe: Recipe, ds_config: dict[str, Any], world_size: int, micro_batch: int | None = None) -> Run:
    """One run out of what is learned and how it fits the machines; `micro_batch` overrides the ds_config's.

    `ds_config` comes from `load_ds_config`, so it holds no key of the recipe's.
    """
    ours = _OUR_SECTION | ds_config.get("igpt_ds", {})
    asked = ds_config.get("train_micro_batch_size_per_gpu") if micro_batch is None else micro_batch
    micro_batch, accumulation = batch_layout(recipe.batch_images, asked, world_size)
    full = {key: value for key, value in ds_config.items() if key != "igpt_ds"} | {
        "train_batch_size": recipe.batch_images,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.clip,  # always written: DeepSpeed's own default changed from 0 to 1
    }
    precision = "bf16" if ds_config.get("bf16", {}).get("enabled") else "fp32"
    return Run(recipe, world_size, micro_batch, accumulation, ours["activation_checkpointing"], precision, full)


def run_to_dict(run: Run) -> dict[str, Any]:
    """The union of recipe and ds_config, JSON-ready: printed at the start and written to the run directory."""
    return dataclasses.asdict(run) | {"recipe": recipe_to_dict(run.recipe)}
