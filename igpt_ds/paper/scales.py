"""The experiments behind the paper's tables and figures at four scales: images, models, and the measurements of each model.

In: the location of the images. Out: a `Scale`, plain data; stages.py turns it into commands, budget.py into GPU-hours and
bytes. `own` trains one model on any images. `tiny` trains on scikit-learn's digits, minutes on two cores. `cifar` trains small
models on CIFAR-10, a night on a CPU or one GPU. `full` is the paper itself: the models of Table 5, the measurements of sections
3 and 4. Called by tools/paper_plan.py.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass
from typing import Any

from igpt_ds.config import Recipe, get_recipe, override
from igpt_ds.data.sources import dataset_name
from igpt_ds.errors import InputError

NOT_PLAIN = r"[^\w.-]"  # characters of a name that its directory does not have
SCALES = ("own", "tiny", "cifar", "full")
VARIANTS = ("untrained", "concat", "low_data")
_CONCATENATED, _HEADROOM = 5, 1.5  # concatenated layers (paper 4.4); memory of a probe relative to its features
# Published numbers of images per split; val is split off train (docs/data.md).
_IMAGENET = {"train": 1_229_920, "val": 51_247, "test": 50_000}
_CIFAR = {"train": 45_000, "val": 5_000, "test": 10_000}
_STL10 = {"train": 4_500, "val": 500, "test": 8_000}


@dataclass(frozen=True)
class Images:
    """A data set at one image size: one directory of shards."""

    name: str  # in tables and figures
    source: str  # KIND:WHERE
    n_px: int
    counts: dict[str, int]  # images of each split; empty if unknown
    labels: str = "use"  # or "ignore"
    probes: bool = True  # whether images have labels of at least two classes
    crop: str = "none"
    views: int = 1  # random crops of each training image
    train_split: str = "train"  # split that probes are fitted to
    eval_split: str = "val"  # split that accuracies are measured on
    sgd: bool = False  # probe by SGD, and only the middle layers (paper 3.4: ImageNet)
    val_fraction: float | None = None  # share of train that becomes val, instead of the source's own split
    test_fraction: float | None = None  # share of train that becomes test, of a source without test images
    augment: bool = False  # shift and mirror images during fine-tuning (paper 3.1: CIFAR)

    @property
    def id(self) -> str:
        """The name of the directory."""
        return f"{re.sub(NOT_PLAIN, '_', self.name)}_{self.n_px}{'_views' if self.views > 1 else ''}"

    def probed(self, recipe: Recipe) -> tuple[int, ...]:
        """The layers of a model that are probed on these images."""
        L = recipe.model.n_layer
        return tuple(range(L // 4, 3 * L // 4 + 1)) if self.sgd else tuple(range(L + 1))


@dataclass(frozen=True)
class System:
    """A model, its training data, and its measurements; data sets are named by their `id`."""

    recipe: Recipe
    data: str
    probed: tuple[str, ...]  # data sets; the first also probes the checkpoints of `stages`
    stages: int = 1  # a power of two; 8 measures after 1/8, 1/4, 1/2 and all of the steps
    variants: tuple[str, ...] = ()  # on the first of `probed`
    finetuned: tuple[str, ...] = ()
    from_scratch: tuple[str, ...] = ()
    finetune_lr: float = 0.0
    train_words: tuple[str, ...] = ()  # flags of train.py that name the recipe; empty: the recipe's own name

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the checkpoints that are measured."""
        return tuple(self.recipe.steps // 2**power for power in reversed(range(self.stages.bit_length())))

    @property
    def every(self) -> int:
        """Steps between kept checkpoints."""
        return self.recipe.steps // self.stages


@dataclass(frozen=True)
class Scale:
    """All trainings and measurements. `main` names the recipe whose run, features and samples the figures show."""

    name: str
    palette: Images  # its training images determine the palette
    n_colors: int
    images: tuple[Images, ...]
    systems: tuple[System, ...]
    main: str
    n_labels: tuple[int, ...] = (40, 250, 4000)  # paper 4.7
    epochs: float = 20.0  # upper limit for fine-tuning
    finetune_steps: int | None = None  # instead of epochs
    bf16: bool = False  # compute features and likelihoods in bf16, store features in fp16
    palette_images: int | None = None
    kinds: tuple[str, ...] = ("normed",)  # of the features that are probed

    def of(self, id: str) -> Images:
        """The data set with that id."""
        return next(images for images in self.images if images.id == id)

    def of_recipe(self, name: str) -> System:
        """The system with that recipe."""
        return next(system for system in self.systems if system.recipe.name == name)


@dataclass(frozen=True)
class Training:
    """A training that the user asks for: its recipe, the flags of train.py that name and change it, and how images are read.

    name: of the images; None: that of their source.
    probes, tests: whether the images have labels of at least two classes, and whether some are test images.
    """

    recipe: Recipe
    words: tuple[str, ...]
    name: str | None = None
    labels: str = "use"
    test_fraction: float | None = None
    probes: bool = True
    tests: bool = False


def get_scale(
    name: str,
    data: str | None,
    n_px: int | None = None,
    steps: int | None = None,
    gpu_bytes: float = 80e9,
    training: Training | None = None,
) -> Scale:
    """A scale by its name.

    Args:
        data: own, cifar: KIND:WHERE; full: the directory that holds ILSVRC2012, CIFAR-10, CIFAR-100 and STL-10.
        n_px: cifar: 16 or 32.
        steps: of each training and fine-tuning, instead of the scale's own; for a rehearsal.
        gpu_bytes: full: memory of one GPU.
        training: own: what is trained.

    Raises:
        ValueError: the scale is unknown, data or training is missing or superfluous, or n_px or steps is invalid.
    """
    if name not in SCALES:
        raise InputError(f"scale {name!r} is unknown; known: {', '.join(SCALES)}")
    if name != "tiny" and not data:
        where = "the directory that holds ILSVRC2012, CIFAR and STL-10" if name == "full" else "cifar10:DIR or imagefolder:DIR"
        raise InputError(f"scale {name} needs --data (make: DATA=...): {where}")
    if name == "tiny" and data not in (None, "", "digits:"):
        raise InputError(f"scale tiny uses scikit-learn's digits, not {data}; leave out --data, or choose scale cifar")
    if n_px is not None and (name != "cifar" or n_px not in (16, 32)):
        raise InputError(f"--n_px {n_px} must be 16 or 32, and only scale cifar takes it")
    if (name == "own") != (training is not None):
        raise InputError(f"flags of train.py after -- belong to scale own, which needs them; scale {name} was given")
    if training is not None:
        if steps is not None:
            raise InputError(f"--steps {steps} of scale own is a flag of train.py; write it after --")
        return _own(training, str(data))
    if name == "tiny":
        scale = _tiny()
    elif name == "cifar":
        scale = _cifar(str(data), n_px or 16)
    else:
        scale = _full(str(data), gpu_bytes)
    return scale if steps is None else _rehearsal(scale, steps)


def _rehearsal(scale: Scale, steps: int) -> Scale:
    if steps < 2 or steps % 2:
        raise InputError(
            f"--steps {steps} must be even and at least 2: a rehearsal measures models after half of their steps and at the end"
        )
    systems = [
        dataclasses.replace(
            system,
            stages=min(system.stages, 2),
            recipe=dataclasses.replace(system.recipe, steps=steps, warmup_steps=min(system.recipe.warmup_steps, steps // 4)),
        )
        for system in scale.systems
    ]
    return dataclasses.replace(scale, systems=tuple(systems), finetune_steps=steps)


def _like(recipe: Recipe, size: str, objective: str, **shape: int) -> Recipe:
    """A recipe with another size or objective, and the name for it."""
    model = override(recipe, **shape).model
    name = f"{recipe.name.split('_')[0]}_{size}_{objective}_{model.n_px}"
    return dataclasses.replace(recipe, name=name, objective=objective, model=model)


def _small(images: Images, recipes: tuple[Recipe, Recipe, Recipe], stages: int, lr: float, **more: Any) -> Scale:
    """Two auto-regressive sizes and a BERT on the same images; the second is the main one.

    Args:
        lr: learning rate of fine-tuning.
    """
    small, main, bert = recipes
    here = (images.id,)
    systems = (
        System(small, images.id, here, stages),
        System(main, images.id, here, stages, VARIANTS, finetuned=here, from_scratch=here, finetune_lr=lr),
        System(bert, images.id, here, finetuned=here, finetune_lr=lr),
    )
    return Scale(palette=images, n_colors=main.model.n_vocab, images=(images,), systems=systems, main=main.name, **more)


def _own(training: Training, data: str) -> Scale:
    """One model on any images; every layer is probed, beside an untrained network and raw pixels.

    With test images, probes are fitted on train and val together, of which they hold out a tenth to choose layer and penalty.
    """
    recipe = training.recipe
    about: dict[str, Any] = {"labels": training.labels, "probes": training.probes, "test_fraction": training.test_fraction}
    about |= {"train_split": "train+val", "eval_split": "test"} if training.tests else {}
    images = Images(training.name or dataset_name(data), data, recipe.model.n_px, {}, **about)
    variants = ("untrained",) if training.probes else ()
    system = System(recipe, images.id, (images.id,), variants=variants, train_words=training.words)
    return Scale("own", images, recipe.model.n_vocab, (images,), (system,), recipe.name, kinds=("normed", "raw"))


def _tiny() -> Scale:
    nano = dataclasses.replace(get_recipe("digits_nano_ar_8"), steps=400)
    recipes = _like(nano, "pico", "ar", n_layer=4, n_embd=24), nano, _like(nano, "nano", "bert")
    images = Images("digits", "digits:", 8, {}, val_fraction=0.3)  # a tenth would be 157 images, too few for an accuracy
    return _small(images, recipes, 4, 0.003, name="tiny", n_labels=(40, 250))


def _cifar(data: str, n_px: int) -> Scale:
    nano = _like(get_recipe("cifar10_nano_ar_16"), "nano", "ar", n_px=n_px)
    recipes = _like(nano, "pico", "ar", n_layer=4, n_embd=64), nano, _like(nano, "nano", "bert")
    return _small(Images("cifar10", data, n_px, {}, augment=True), recipes, 8, 0.001, name="cifar", epochs=5.0)


# Stored crops of each ImageNet image. The paper draws a fresh crop each time (3.1). Its random resize comes before the palette,
# so it cannot be drawn from tokens. A million batches of 128 are 104 passes over the images, so each of 8 crops is seen 13 times,
# and the shards take 8 times the disk. `make_shards.py --views 104` is the paper: a fresh crop in every pass, 104 times the disk.
_VIEWS = 8


def _full(data: str, gpu_bytes: float) -> Scale:
    imagenet = f"imagenet:{data}/ILSVRC2012"
    final = functools.partial(Images, train_split="train+val", eval_split="test")  # a probe holds out a tenth of train+val
    crops = [
        Images("imagenet", imagenet, n_px, _IMAGENET, crop="random", views=_VIEWS, eval_split="test") for n_px in (32, 48, 64)
    ]
    centres = [final("imagenet", imagenet, n_px, _IMAGENET, crop="center", sgd=True) for n_px in (32, 48, 64)]
    others = [final(name, f"{name}:{data}", 32, _CIFAR, augment=True) for name in ("cifar10", "cifar100")]
    others.append(final("stl10", f"stl10:{data}", 32, _STL10))
    # The fp32 features of XL's five concatenated layers must fit a GPU together with the probe's own memory.
    width = _CONCATENATED * get_recipe("igpt_xl_ar_64").model.n_embd
    wide = 4 * width * (_IMAGENET["train"] + _IMAGENET["val"]) * _HEADROOM <= gpu_bytes

    def system(name: str, *probed: str, **more: Any) -> System:
        recipe = get_recipe(name)
        views = f"imagenet_{recipe.model.n_px}_views"
        return System(recipe, views, probed, finetune_lr=recipe.lr / 10, **more)  # a tenth of pre-training's: paper 4.5

    cifar, both = "cifar10_32", ("cifar10_32", "imagenet_32")
    transfer = (cifar, "cifar100_32", "stl10_32", "imagenet_32")
    tuned = (cifar, "cifar100_32", "imagenet_32_views")
    systems = (
        system("igpt_s_ar_32", *both, stages=8),
        system("igpt_m_ar_32", *both, stages=8),
        system("igpt_l_ar_32", *transfer, stages=8, variants=("untrained", "low_data"), finetuned=tuned),
        system("igpt_l_ar_48", "imagenet_48", finetuned=("imagenet_48_views",), from_scratch=("imagenet_48_views",)),
        system("igpt_xl_ar_64", "imagenet_64", variants=("concat",) if wide else ()),
        system("igpt_s_bert_32", cifar),
        system("igpt_m_bert_32", cifar),
        system("igpt_l_bert_32", *both, finetuned=(cifar, "imagenet_32_views")),
    )
    images = (*crops, *centres, *others)
    return Scale("full", centres[0], 512, images, systems, "igpt_l_ar_32", bf16=True, palette_images=50_000)
