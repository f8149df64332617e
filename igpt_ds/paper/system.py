"""The records of a scale: data sets, models, and what is measured of them. Plain data, and no command.

scales.py and full.py fill them; stages.py turns them into commands, budget.py into GPU-hours and bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from igpt_ds.config import Recipe

NOT_PLAIN = r"[^\w.-]"  # characters of a name that its directory does not have
Knobs = dict[str, object]  # flags of one program by name


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
    sgd: bool = False  # probe by SGD (paper 3.4: ImageNet)
    val_fraction: float | None = None  # share of train that becomes val, instead of the source's own split
    test_fraction: float | None = None  # share of train that becomes test, of a source without test images
    augment: bool = False  # shift and mirror images during fine-tuning (paper 3.1: CIFAR)

    @property
    def id(self) -> str:
        """The name of the directory."""
        return f"{re.sub(NOT_PLAIN, '_', self.name)}_{self.n_px}{'_views' if self.views > 1 else ''}"


@dataclass(frozen=True)
class Tuning:
    """A training as a classifier that starts from a system's last model, or from fresh weights (paper 2.3, 4.5)."""

    images: str  # id of the data set
    name: str = "finetuned"  # ends the name of the run
    section: str = "4.5, Table 3"  # of the paper
    fresh: bool = False
    best_layer: bool = False  # the class head reads the layer with the best probe
    lr: float | None = None  # None: that of the search
    searched: str = ""  # name of the tuning on the same images whose search is taken; its own: it searches
    epochs: float | None = None  # instead of the scale's
    fold: bool = False  # train on train+val for as many steps as the best of the search had (paper 3.1)
    knobs: Knobs = field(default_factory=dict)  # further flags of finetune.py

    @property
    def compares(self) -> bool:
        """Whether it is only compared with the system's first tuning, and in no table of the paper."""
        return self.name not in ("finetuned", "from_scratch") and "labels" not in self.knobs  # few labels: Table 4


@dataclass(frozen=True)
class Filtered:
    """A data set of which the images most like another data set are kept (paper 3, which does not say how)."""

    id: str
    keep: float  # share of the images
    recipe: str  # of the model that compares them
    candidates: str  # id of the same images at that model's size
    reference: str  # id of the images that they are compared with


@dataclass(frozen=True)
class System:
    """A model, its training data, and its measurements; data sets are named by their `id`."""

    recipe: Recipe
    data: tuple[str, ...]  # data sets of pre-training; the first validates
    probed: tuple[str, ...] = ()  # data sets; the first also probes the checkpoints of `points`
    points: tuple[int, ...] = ()  # steps before the last that are measured
    variants: tuple[str, ...] = ()  # on the first of `probed`
    tunings: tuple[Tuning, ...] = ()
    train_words: tuple[str, ...] = ()  # flags of train.py that name the recipe; empty: the recipe's own name
    section: str = "3.4"  # of the paper
    train_split: str = "train"
    searched: bool = False  # search the learning rate of pre-training (paper 3.4)
    ds_config: str | None = None  # instead of the plan's choice
    filtered: Filtered | None = None  # of `data`
    changed: str = ""  # A.1: what differs from the system that it is compared with, in words

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the checkpoints that are measured."""
        return (*self.points, self.recipe.steps)


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
    sgd_steps: int | None = None  # of a probe by SGD; None: the tool's own, the paper's million
    max_rates: int | None = None  # of a search; None: as many as the paper's rule needs
    loss_split: str = "val"  # split that Figure 3's losses are measured on
    precision: str = "fp32"  # of features and likelihoods; bf16: features are stored in fp16
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
