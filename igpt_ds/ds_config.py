"""How a run fits the machines: `load_ds_config` reads and checks a ds_config, `join` makes a run of it and a recipe.

Called by train.py, finetune.py and the plan. DeepSpeed is not needed here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict, cast

from igpt_ds.config import CHECKPOINTING, Recipe, recipe_to_dict
from igpt_ds.console import count
from igpt_ds.ds_config_keys import refuse_harmful, refuse_removed, refuse_unknown
from igpt_ds.errors import InputError
from igpt_ds.json_files import read_json
from igpt_ds.leaf_modules import with_leaf_modules

SHIPPED = (Path(__file__).parent / "ds_configs").resolve()  # ds_configs/ of the repository, or its copy in an installed wheel


class _OurSection(TypedDict, total=False):
    activation_checkpointing: str
    sequence_parallel: int


class _Precision(TypedDict, total=False):
    enabled: bool


class _Offload(TypedDict, total=False):
    device: str


class _Zero(TypedDict, total=False):
    stage: int
    offload_optimizer: _Offload
    overlap_comm: bool
    stage3_max_live_parameters: int
    stage3_max_reuse_distance: int
    zero_hpz_partition_size: int


class _DataTypes(TypedDict, total=False):
    grad_accum_dtype: str


class DsConfig(TypedDict, total=False):
    """A ds_config: the top-level keys of DeepSpeed 0.19 that concern the machines. DeepSpeed ignores misspelt keys.

    Sections list the keys that this project reads; DeepSpeed reads more.
    """

    igpt_ds: _OurSection
    bf16: _Precision
    checkpoint: dict[str, object]
    comms_logger: dict[str, object]
    communication_data_type: str
    compile: dict[str, object]
    data_types: _DataTypes
    disable_python_gc: bool
    dump_state: bool
    flops_profiler: dict[str, object]
    fp16: _Precision
    memory_breakdown: bool
    prescale_gradients: bool
    seq_parallel_communication_data_type: str
    steps_per_print: int
    torch_autocast: dict[str, object]
    train_micro_batch_size_per_gpu: int
    wall_clock_breakdown: bool
    zero_allow_untested_optimizer: bool
    zero_force_ds_cpu_optimizer: bool
    zero_optimization: _Zero


class FullConfig(DsConfig, total=False):
    """What DeepSpeed gets: a ds_config without "igpt_ds", and what follows from the recipe."""

    train_batch_size: int
    gradient_accumulation_steps: int
    gradient_clipping: float


# Keys that the recipe owns, each with the recipe's name for it.
_OWNED_BY_RECIPE = {
    "train_batch_size": "batch_images",
    "gradient_accumulation_steps": "batch_images (the accumulation follows from it)",
    "gradient_clipping": "clip",
    "optimizer": "lr, betas and eps",
    "scheduler": "lr, warmup_steps and steps",
}
_OUR_DEFAULTS: _OurSection = {"activation_checkpointing": "none", "sequence_parallel": 1}
STAGES = (1, 2, 3)  # of ZeRO: optimizer states sharded; gradients as well; weights as well


@dataclass(frozen=True)
class Run:
    """One run: a recipe on world_size ranks."""

    recipe: Recipe
    world_size: int
    micro_batch: int  # images per sequence group and micro_step; a sequence group is one rank if sequence_parallel is 1
    accumulation: int  # micro_steps per step
    activation_checkpointing: str
    precision: str  # "fp32", "bf16" or "fp16"
    sequence_parallel: int  # consecutive ranks that share the tokens of each image
    stage: int  # of ZeRO
    ds_config: FullConfig


def batch_layout(batch_images: int, micro_batch: int | None, world_size: int) -> tuple[int, int]:
    """(micro_batch, accumulation) with micro_batch * accumulation * world_size == batch_images.

    Raises:
        ValueError: no accumulation gives that product; the nearest batch that works is named.
    """
    if micro_batch is not None and micro_batch < 1:
        raise InputError(f"micro_batch={micro_batch} must be at least 1")
    per_micro_step = (micro_batch or 1) * world_size
    if batch_images % per_micro_step:
        below = batch_images // per_micro_step * per_micro_step
        nearest = [batch for batch in (below, below + per_micro_step) if batch > 0]
        what = count(world_size, "rank") + (f" x micro batch {micro_batch}" if micro_batch else "")
        nearest_text = " or ".join(map(str, nearest))
        raise InputError(f"batch_images={batch_images} does not divide into {what}; nearest that does: {nearest_text}")
    micro_batch = micro_batch or batch_images // world_size
    return micro_batch, batch_images // (micro_batch * world_size)


def load_ds_config(path: Path) -> DsConfig:
    """Reads and checks a ds_config.

    Raises:
        ValueError: a key that the recipe owns, that DeepSpeed would ignore or that breaks a run, or a wrong value; it is named.
    """
    values = read_json(path, "ds_config")
    if not isinstance(values, dict):
        raise InputError(f"ds_config {path} must hold one JSON object")
    for key in values:
        if key in _OWNED_BY_RECIPE:
            raise InputError(f"ds_config {path}: {key!r} is set by the recipe as {_OWNED_BY_RECIPE[key]}; remove it here")
    refuse_harmful(values, path)
    refuse_unknown(values, DsConfig.__annotations__, path)
    for key in ("igpt_ds", "zero_optimization", "bf16", "fp16"):
        if not isinstance(values.get(key, {}), dict):
            raise InputError(f"ds_config {path}: {key!r} must be an object, not {values[key]!r}")
    refuse_removed(values.get("zero_optimization", {}), path, "zero_optimization.")
    micro_batch = values.get("train_micro_batch_size_per_gpu", 1)
    if not isinstance(micro_batch, int) or micro_batch < 1:
        name = "train_micro_batch_size_per_gpu"
        raise InputError(f"ds_config {path}: {name}={micro_batch!r} must be a whole number of at least 1")
    ours = values.get("igpt_ds", {})
    refuse_unknown(ours, _OurSection.__annotations__, path, "igpt_ds.")
    mode = ours.get("activation_checkpointing", "none")
    if mode not in CHECKPOINTING:
        raise InputError(f"ds_config {path}: activation_checkpointing={mode!r} is unknown; known: {', '.join(CHECKPOINTING)}")
    sequence_parallel = ours.get("sequence_parallel", 1)
    if not isinstance(sequence_parallel, int) or isinstance(sequence_parallel, bool) or sequence_parallel < 1:
        raise InputError(f"ds_config {path}: sequence_parallel={sequence_parallel!r} must be a whole number of at least 1")
    stage = values.get("zero_optimization", {}).get("stage")
    if stage not in STAGES or isinstance(stage, bool):
        raise InputError(f"ds_config {path}: zero_optimization.stage={stage!r} must be 1, 2 or 3")
    if values.get("fp16", {}).get("enabled") and values.get("bf16", {}).get("enabled"):
        raise InputError(f"ds_config {path}: fp16 and bf16 are both enabled; choose one")
    return cast(DsConfig, values)


def join(
    recipe: Recipe,
    ds_config: DsConfig,
    world_size: int,
    micro_batch: int | None = None,
    sequence_parallel: int | None = None,
) -> Run:
    """The run of a recipe on world_size ranks.

    Args:
        ds_config: the result of `load_ds_config`.
        micro_batch: replaces the ds_config's.
        sequence_parallel: replaces the ds_config's.

    Raises:
        ValueError: the batch does not divide into micro batches, or sequence_parallel does not fit ranks, heads or tokens.
    """
    ours = _OUR_DEFAULTS | ds_config.get("igpt_ds", {})
    parts = sequence_parallel or ours["sequence_parallel"]
    check_sequence_parallel(recipe, world_size, parts)
    asked = ds_config.get("train_micro_batch_size_per_gpu") if micro_batch is None else micro_batch
    micro_batch, accumulation = batch_layout(recipe.batch_images, asked, world_size // parts)
    full = {key: value for key, value in ds_config.items() if key != "igpt_ds"} | {
        "train_batch_size": recipe.batch_images * parts,  # DeepSpeed counts every rank as data-parallel
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.clip,  # always written: DeepSpeed's default changed from 0 to 1
        "zero_optimization": with_leaf_modules(recipe, ds_config["zero_optimization"]),
    }
    precision, stage, mode = precision_of(ds_config), ds_config["zero_optimization"]["stage"], ours["activation_checkpointing"]
    return Run(recipe, world_size, micro_batch, accumulation, mode, precision, parts, stage, cast(FullConfig, full))


def check_sequence_parallel(recipe: Recipe, world_size: int, parts: int) -> None:
    """Refuses a number of ranks per image that does not divide the ranks and the heads, or leaves a rank without tokens.

    It need not divide the tokens: each rank takes n_ctx / parts of them, rounded up, and the last rank takes the rest.
    """
    config = recipe.model
    shared = math.gcd(world_size, config.n_head)
    known = [part for part in range(1, shared + 1) if shared % part == 0 and (part - 1) * -(-config.n_ctx // part) < config.n_ctx]
    here = f"here it may be {', '.join(map(str, known))}"
    for what, whole in (("ranks", world_size), ("n_head", config.n_head)):
        if whole % parts:
            raise InputError(f"sequence_parallel={parts} does not divide {what}={whole}; {here}")
    if parts not in known:
        raise InputError(f"sequence_parallel={parts} leaves a rank none of n_ctx={config.n_ctx} tokens; {here}")


def precision_of(ds_config: DsConfig) -> str:
    """The precision of the weights: "bf16", "fp16" or "fp32"."""
    half = "fp16" if ds_config.get("fp16", {}).get("enabled") else "fp32"
    return "bf16" if ds_config.get("bf16", {}).get("enabled") else half


def run_to_dict(run: Run) -> dict[str, object]:
    """Recipe and ds_config as JSON: printed at the start and written to the run directory."""
    return asdict(run) | {"recipe": recipe_to_dict(run.recipe)}
