"""Recipes: what is learned, independent of the machines (ds_config.py says how it fits the machines).

All records are frozen. The sizes are the paper's (section 3.3), the recipes those of its Table 5 and section 3.4.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypedDict

from igpt_ds.command_line.nearest import unknown_value
from igpt_ds.errors import InputError

CHECKPOINTING = ("none", "selective", "full")  # of activations: keep all, recompute the cheap ones, or recompute whole blocks
OBJECTIVES = ("ar", "bert")  # paper 2.1
LOSSES = ("joint", "clf", "gen")  # in fine-tuning: gen_loss + clf_loss (paper 2.3), or one of them
GEN_SCALES = ("mean", "sum")  # of gen_loss over the tokens of an image
INITS = ("released", "sparse_transformer")  # how fresh weights are drawn; the table is model/transformer.py's


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer over n_px x n_px images whose pixels are one of n_vocab palette colours."""

    n_layer: int
    n_head: int
    n_embd: int
    n_px: int = 32
    n_vocab: int = 512
    tied_embeddings: bool = False  # whether the matrix of the pixels' logits is wte; the paper unties them (A.1)

    def __post_init__(self) -> None:
        if not isinstance(self.tied_embeddings, bool):
            raise InputError(f"tied_embeddings={self.tied_embeddings!r} must be true or false")
        sizes = {name: value for name, value in vars(self).items() if name != "tied_embeddings"}
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r} must be a whole number of at least 1")
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if self.n_vocab > 65536:
            raise InputError(f"n_vocab={self.n_vocab} does not fit the shards' 16-bit tokens; at most 65536")
        for name, value in sizes.items():
            if value > 65536:  # such a model would be built for hours before anything fails
                raise InputError(f"{name}={value} is too large; at most 65536")

    @property
    def n_ctx(self) -> int:
        """Tokens of one image: T = n_px squared."""
        return self.n_px * self.n_px

    def to_dict(self) -> dict[str, int]:
        """The shape as JSON. Older code did not know tied_embeddings, so it is left out where it is false."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not False}


class Size(TypedDict):
    """The depth and the width of a model."""

    n_layer: int
    n_head: int
    n_embd: int


# Layers and widths: paper 3.3. Heads of S, M, L: the released checkpoints. The paper never gives XL's: 24 makes the head
# dimension 128, for which attention kernels are fastest, equals AIM-3B at the same width, and divides by 2, 3, 4, 6, 8, 12.
SIZES: dict[str, Size] = {
    "nano": {"n_layer": 8, "n_head": 4, "n_embd": 128},
    "s": {"n_layer": 24, "n_head": 8, "n_embd": 512},
    "m": {"n_layer": 36, "n_head": 8, "n_embd": 1024},
    "l": {"n_layer": 48, "n_head": 16, "n_embd": 1536},
    "xl": {"n_layer": 60, "n_head": 24, "n_embd": 3072},
}


@dataclass(frozen=True)
class Finetune:
    """What fine-tuning adds to a recipe (paper 2.3): a class head on n^layer, a loss, and the weights to start from.

    gen_loss and clf_loss count once each: the paper's joint objective is L_GEN + L_CLF and has no weights. Its L_AR is a sum over
    the pixels of an image, and the released code takes the mean, which gives gen_loss 1 / T of that weight. The code is the
    default, because it is what ran; gen_scale "sum" is the formula.
    """

    n_classes: int
    layer: int  # 0..n_layer; n_layer is the output of ln_f, the paper's choice
    start: str  # model_hash of the pre-trained model; "" for fresh weights, drawn from the recipe's seed
    loss: str = "joint"
    gen_scale: str = "mean"  # "mean": nats per token; "sum": of the whole image

    def __post_init__(self) -> None:
        for name, known in (("loss", LOSSES), ("gen_scale", GEN_SCALES)):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is unknown; known: {', '.join(known)}")
        if self.n_classes < 2:
            raise InputError(f"n_classes={self.n_classes} must be at least 2; fine-tuning needs labelled shards")


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
    mask_prob: float = 0.15  # probability that "bert" hides a pixel (paper 2.1); 0.20 is as good (A.1)
    init: str = "released"  # how fresh weights are drawn, see model/transformer.py
    betas: tuple[float, float] = (0.9, 0.95)  # paper 3.4
    eps: float = 1e-8
    spike_window: int = 128  # number of recent normal losses that define an outlier (train/safety/spikes.py)
    spike_sigmas: float = 6.0  # standard deviations above their mean at which a loss is an outlier; 0 disables
    spike_patience: int = 10  # outliers in a row that count as a spike
    # Largest gradient norm. The paper mentions no clipping: 0 is the paper. 1.0 is GPT-3's, and that of the authors' sibling code
    # (openai/distribution_augmentation). It protects a long run from single bad batches, and has no effect in normal training.
    clip: float = 1.0
    dropout: float = 0.0  # model/dropout.py says where; the paper trains without (3.4), and searched it only from scratch (4.5)
    weight_decay: float = 0.0  # AdamW's, of matrices alone (train/engine.py); the paper has none, and tried 0.01 (A.1)
    head_std: float = 0.0  # of the fresh heads of pixels and classes; the paper has zeros, GPT-2 0.02 (A.1)
    # Reflect-pad by this many pixels, then crop a random window (paper 3.1, Wide ResNet). The paper only does so in fine-tuning
    # on CIFAR, with 4 pixels at 32x32: an eighth of the side, so 2 at 16x16. It crops ImageNet before the resize.
    augment_pad: int = 0
    augment_flip: bool = False  # mirror half of the images (paper 3.1)
    seed: int = 0
    finetune: Finetune | None = None  # None: pre-training

    def __post_init__(self) -> None:
        for name, known in (("objective", OBJECTIVES), ("init", INITS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is unknown; known: {', '.join(known)}")
        if not 0 < self.mask_prob < 1:
            raise InputError(f"mask_prob={self.mask_prob} must lie between 0 and 1; the paper takes 0.15")
        for name in ("batch_images", "steps", "spike_window", "spike_patience"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1")
        if not 0 <= self.warmup_steps <= self.steps:
            raise InputError(f"warmup_steps={self.warmup_steps} must lie between 0 and steps={self.steps}")
        for name in ("lr", "eps"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise InputError(f"{name}={getattr(self, name)} must be a positive number")
        if not (self.spike_sigmas >= 0 and math.isfinite(self.spike_sigmas)):
            raise InputError(f"spike_sigmas={self.spike_sigmas} must not be negative (0 watches for no spikes)")
        for name, zero in (("clip", "turns clipping off"), ("weight_decay", "turns decay off"), ("head_std", "draws zeros")):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise InputError(f"{name}={getattr(self, name)} must be a number that is not negative (0 {zero})")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout} must be at least 0 and below 1 (0 turns dropout off)")
        if not 0 <= self.augment_pad < self.model.n_px:
            raise InputError(f"augment_pad={self.augment_pad} must lie between 0 and n_px - 1 = {self.model.n_px - 1}")
        if self.finetune is not None and not 0 <= self.finetune.layer <= self.model.n_layer:
            raise InputError(f"layer={self.finetune.layer} must lie between 0 and n_layer={self.model.n_layer}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas={self.betas} must be two numbers in [0, 1)")


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
    ModelConfig(n_layer=6, n_head=4, n_embd=48, n_px=8, n_vocab=17),  # all 17 grey levels of the digits
    batch_images=64,
    steps=600,
    lr=0.005,
    warmup_steps=40,
)  # not augmented: the digits fill their 8x8 pixels, and shifted or mirrored ones are no digits

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

_KNOBS = [field.name for field in dataclasses.fields(Recipe) if field.name not in ("name", "model", "finetune")]
SHAPE = [field.name for field in dataclasses.fields(ModelConfig)]

KNOBS: dict[str, tuple[str | tuple[str, ...] | None, str]] = {  # the unit of each knob, and what it is
    "batch_images": ("IMAGES", "images per step, over all ranks"),
    "steps": ("STEPS", "number of optimizer steps"),
    "lr": ("RATE", "peak learning rate of Adam"),
    "warmup_steps": ("STEPS", "steps with a rising learning rate, before the cosine"),
    "mask_prob": ("PROBABILITY", "probability that bert hides a pixel, between 0 and 1"),
    "init": (None, "how fresh weights are drawn"),
    "betas": (("BETA_1", "BETA_2"), "the two decay rates of Adam"),
    "eps": ("EPSILON", "epsilon of Adam"),
    "spike_window": ("STEPS", "number of recent normal losses that the spike guard compares with"),
    "spike_sigmas": ("DEVIATIONS", "standard deviations above their mean at which a loss is an outlier; 0 disables"),
    "spike_patience": ("STEPS", "outliers in a row that count as a spike"),
    "clip": ("NORM", "largest gradient norm; 0 disables clipping"),
    "dropout": (
        "PROBABILITY",
        "probability that dropout zeroes a number of the embeddings or of a block's two outputs; 0 disables",
    ),
    "weight_decay": ("DECAY", "decoupled weight decay (AdamW) of all matrices; 0 disables, the paper tried 0.01 (A.1)"),
    "head_std": ("DEVIATION", "standard deviation of the fresh output head; 0: zeros, or as the embedding if tied"),
    "augment_pad": (
        "PIXELS",
        "pixels of reflection padding before a random crop; 0 disables, the paper's 4 at 32x32 is 2 at 16x16",
    ),
    "augment_flip": (None, "mirror a random half of the images"),
    "seed": ("SEED", "random seed for weights, order of images, augmentation and masks"),
    "n_layer": ("BLOCKS", "number of transformer blocks"),
    "n_head": ("HEADS", "number of attention heads"),
    "n_embd": ("CHANNELS", "width of the transformer"),
    "n_px": ("PIXELS", "width and height of an image in pixels"),
    "n_vocab": ("COLOURS", "number of palette colours"),
    "tied_embeddings": (None, "one matrix for the embedding of the pixels and for their logits"),
}


def get_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: there is none; the error lists the known ones.
    """
    if name not in RECIPES:
        raise InputError(f"recipe {unknown_value(name, RECIPES)}")
    return RECIPES[name]


def override(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with changed knobs or model dimensions, by field name (`lr`, `n_layer`, ...).

    Raises:
        ValueError: a recipe has no such field, or a value is out of range.
    """
    unknown = [name for name in changes if name not in _KNOBS + SHAPE]
    if unknown:
        raise InputError(f"recipe has no {unknown[0]!r}; it has {', '.join(_KNOBS + SHAPE)}")
    model = dataclasses.replace(recipe.model, **{name: value for name, value in changes.items() if name in SHAPE})
    changed = dataclasses.replace(recipe, model=model, **{name: value for name, value in changes.items() if name in _KNOBS})
    if "mask_prob" in changes and changed.objective != "bert":
        raise InputError(f"mask_prob={changed.mask_prob} has no effect on {recipe.name}: its objective is {changed.objective}")
    return changed


def with_warmup_epochs(recipe: Recipe, epochs: float, n_images: int) -> Recipe:
    """The recipe with a warm-up of some epochs of the training images (paper 3.4: one), rounded up to whole steps.

    Args:
        n_images: images of the training shards. The stored views of an image count once.

    Raises:
        ValueError: epochs is negative or not finite, or longer than the whole training.
    """
    if not 0 <= epochs < math.inf:
        raise InputError(f"warmup_epochs={epochs:g} must be a number of at least 0")
    steps = math.ceil(epochs * n_images / recipe.batch_images)
    if steps > recipe.steps:
        raise InputError(f"warmup_epochs={epochs:g} of {n_images} images are {steps} steps, more than steps={recipe.steps}")
    return dataclasses.replace(recipe, warmup_steps=steps)


def recipe_to_dict(recipe: Recipe) -> dict[str, object]:
    """The recipe as JSON; `recipe_from_dict` is the inverse."""
    return dataclasses.asdict(recipe) | {"betas": list(recipe.betas), "model": recipe.model.to_dict()}


def recipe_from_dict(values: object, where: str) -> Recipe:
    """The recipe of a JSON value; `where` names the file in errors. Fields that older code did not know get their defaults.

    Raises:
        ValueError: it is not a recipe, or a value is out of range.
    """
    try:
        if not isinstance(values, dict):
            raise TypeError(f"it is {type(values).__name__} and not an object")
        model, finetune = ModelConfig(**values["model"]), values.get("finetune")
        more = {"model": model, "betas": tuple(values["betas"]), "finetune": Finetune(**finetune) if finetune else None}
        return Recipe(**(values | more))
    except (KeyError, TypeError, OverflowError, RecursionError) as error:  # also numbers of more than 64 bits, and deep lists
        raise InputError(f"{where} is not a recipe: {error}") from None
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
