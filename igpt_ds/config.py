"""Recipes say what is learned; a ds_config says how it fits the machines; `join` makes one run of the two.

Everything here is frozen and printable. The sizes are the paper's (section 3.3), the recipes its Table 5 and section 3.4.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpt_ds.files import read_json

CHECKPOINTING = ("none", "selective", "full")  # of activations: keep all, recompute what is cheap, or each whole block
OBJECTIVES = ("ar", "bert")  # paper 2.1
INITS = ("released", "sparse_transformer")  # how fresh weights are drawn; the table is model/transformer.py's


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer over n_px x n_px images whose pixels are one of n_vocab palette colours."""

    n_layer: int
    n_head: int
    n_embd: int
    n_px: int = 32
    n_vocab: int = 512

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.n_vocab > 65536:
            raise ValueError(f"n_vocab={self.n_vocab} does not fit the shards' 16-bit tokens; at most 65536")

    @property
    def n_ctx(self) -> int:
        """Tokens of one image: T = n_px squared."""
        return self.n_px * self.n_px


# Layers and widths: paper 3.3. Heads of S, M, L: the released checkpoints. The paper never gives XL's: 24 makes the head
# dimension 128, for which attention kernels are fastest, equals AIM-3B at the same width, and divides by 2, 3, 4, 6, 8, 12.
SIZES = {
    "nano": {"n_layer": 8, "n_head": 4, "n_embd": 128},
    "s": {"n_layer": 24, "n_head": 8, "n_embd": 512},
    "m": {"n_layer": 36, "n_head": 8, "n_embd": 1024},
    "l": {"n_layer": 48, "n_head": 16, "n_embd": 1536},
    "xl": {"n_layer": 60, "n_head": 24, "n_embd": 3072},
}


@dataclass(frozen=True)
class Recipe:
    """What is learned, independent of the machines. A step is one optimizer step on batch_images images."""

    name: str
    model: ModelConfig
    batch_images: int
    steps: int
    lr: float
    warmup_steps: int
    objective: str = "ar"  # auto-regressive, or "bert" (paper 2.1)
    mask_prob: float = 0.15  # of a pixel to be hidden under "bert" (paper 2.1); 0.20 did as well (A.1)
    init: str = "released"  # how fresh weights are drawn, see model/transformer.py
    betas: tuple[float, float] = (0.9, 0.95)  # paper 3.4
    eps: float = 1e-8
    clip: float = 1.0  # gradient norm; the paper names none, 1.0 is GPT-3's and does not bind in calm training
    augment_pad: int = 0  # reflect-pad by this many pixels, then crop a random window (paper 3.1, Wide ResNet)
    augment_flip: bool = False  # mirror half of the images (paper 3.1)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("objective", OBJECTIVES), ("init", INITS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; known: {', '.join(known)}")
        if not 0 < self.mask_prob < 1:
            raise ValueError(f"mask_prob={self.mask_prob} must lie between 0 and 1; the paper takes 0.15")
        for name in ("batch_images", "steps"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must lie between 0 and steps={self.steps}")
        for name in ("lr", "eps"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}={getattr(self, name)} must be a positive number")
        if self.clip < 0:
            raise ValueError(f"clip={self.clip} must not be negative (0 turns clipping off)")
        if not 0 <= self.augment_pad < self.model.n_px:
            raise ValueError(f"augment_pad={self.augment_pad} must lie between 0 and n_px - 1 = {self.model.n_px - 1}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must be two numbers in [0, 1)")


def _paper(size: str, objective: str, n_px: int, lr: float, batch_images: int = 128, steps: int = 1_000_000) -> Recipe:
    # Warm-up is one epoch (paper 3.4): 1,281,167 images less the 4 % of validation images (3.1), in batches.
    warmup_steps = math.ceil(round(1_281_167 * 0.96) / batch_images)
    name = f"igpt_{size}_{objective}_{n_px}"
    return Recipe(name, ModelConfig(**SIZES[size], n_px=n_px), batch_images, steps, lr, warmup_steps, objective)


# For machines without a GPU: half an hour on two cores, and a minute or two.
_CIFAR10 = Recipe(
    "cifar10_nano_ar_16", ModelConfig(**SIZES["nano"], n_px=16), 64, steps=2400, lr=0.003, warmup_steps=200, augment_flip=True
)

_DIGITS = Recipe(
    "digits_nano_ar_8",
    ModelConfig(n_layer=6, n_head=4, n_embd=48, n_px=8, n_vocab=17),  # digits have 17 grey levels: nothing is lost
    batch_images=64,
    steps=600,
    lr=0.005,
    warmup_steps=40,
)  # not augmented: the digits fill their 8x8 pixels, so that shifted or mirrored ones are no digits

RECIPES = {
    recipe.name: recipe
    for recipe in (
        _DIGITS,
        dataclasses.replace(_DIGITS, name="digits_nano_bert_8", objective="bert"),
        _CIFAR10,
        _paper("s", "ar", 32, lr=0.003),
        _paper("m", "ar", 32, lr=0.003),
        _paper("l", "ar", 32, lr=0.001),
        _paper("l", "ar", 48, lr=0.01),
        _paper("xl", "ar", 64, lr=0.0003, batch_images=64, steps=2_000_000),
        _paper("s", "bert", 32, lr=0.01),
        _paper("m", "bert", 32, lr=0.003),
        _paper("l", "bert", 32, lr=0.001),
    )
}

_KNOBS = [field.name for field in dataclasses.fields(Recipe) if field.name not in ("name", "model")]
_SHAPE = [field.name for field in dataclasses.fields(ModelConfig)]


def get_recipe(name: str) -> Recipe:
    """The named recipe, or a ValueError that lists the known ones."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; known: {', '.join(RECIPES)}")
    return RECIPES[name]


def override(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with some knobs or model dimensions changed, by their flat names (`lr`, `n_layer`, ...)."""
    unknown = [name for name in changes if name not in _KNOBS + _SHAPE]
    if unknown:
        raise ValueError(f"recipe has no {unknown[0]!r}; it has {', '.join(_KNOBS + _SHAPE)}")
    model = dataclasses.replace(recipe.model, **{name: value for name, value in changes.items() if name in _SHAPE})
    changed = dataclasses.replace(recipe, model=model, **{name: value for name, value in changes.items() if name in _KNOBS})
    if "mask_prob" in changes and changed.objective != "bert":
        raise ValueError(f"mask_prob={changed.mask_prob} means nothing to {recipe.name}: its objective is {changed.objective}")
    return changed


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """A JSON-ready dict; `recipe_from_dict` is its inverse."""
    return dataclasses.asdict(recipe) | {"betas": list(recipe.betas)}


def recipe_from_dict(values: dict[str, Any], where: str) -> Recipe:
    """The inverse of `recipe_to_dict`; `where` names the file in errors."""
    try:
        model = ModelConfig(**values["model"])
        return Recipe(**(values | {"model": model, "betas": tuple(values["betas"])}))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where} is not a recipe: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


# --------------------------------------------------------------------------------------------------- ds_config

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
