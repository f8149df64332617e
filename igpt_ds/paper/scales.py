"""The experiments behind the paper's tables and figures at four scales: images, models, and the measurements of each model.

In: the location of the images. Out: a `Scale`, plain data; stages.py turns it into commands, budget.py into GPU-hours and
bytes. `own` trains one model on any images. `tiny` trains on scikit-learn's digits, minutes on two cores. `cifar` trains small
models on CIFAR-10, a night on a CPU or one GPU. `full` is the paper itself (full.py). Called by tools/paper_plan.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from igpt_ds.config import Recipe, get_recipe, override
from igpt_ds.data.sources import dataset_name
from igpt_ds.errors import InputError
from igpt_ds.paper.full import Full, full
from igpt_ds.paper.system import Images, Knobs, Scale, System, Training, Tuning

SCALES = ("own", "tiny", "cifar", "full")
VARIANTS = ("untrained", "concat", "low_data", "sgd")
PARTS = {"tiny": (4, 2), "cifar": (8, 4, 2)}  # a model is measured after these parts of its steps, and at the end


def get_scale(
    name: str,
    data: str | None,
    n_px: int | None = None,
    steps: int | None = None,
    training: Training | None = None,
    paper: Full | None = None,
) -> Scale:
    """A scale by its name.

    Args:
        data: own, cifar: KIND:WHERE; full: the directory that holds ILSVRC2012, CIFAR-10, CIFAR-100 and STL-10.
        n_px: cifar: 16 or 32.
        steps: of each training and fine-tuning, instead of the scale's own; for a rehearsal.
        training: own: what is trained.
        paper: full: what the user chooses of it.

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
    if paper is not None and paper != Full() and name != "full":
        flags = "--precision, --search_rates, --web and --web_keep"
        raise InputError(f"{flags} belong to scale full (--precision also to cifar); leave them out for scale {name}")
    if training is not None:
        if steps is not None:
            raise InputError(f"--steps {steps} of scale own is a flag of train.py; write it after --")
        return _own(training, str(data))
    if name == "tiny":
        scale = _tiny()
    elif name == "cifar":
        scale = _cifar(str(data), n_px or 16)
    else:
        scale = full(str(data), paper or Full())
    return scale if steps is None else _rehearsal(scale, steps)


def _rehearsal(scale: Scale, steps: int) -> Scale:
    if steps < 2 or steps % 2:
        raise InputError(
            f"--steps {steps} must be even and at least 2: a rehearsal measures models after half of their steps and at the end"
        )
    systems = [
        dataclasses.replace(
            system,
            points=(steps // 2,) if system.points else (),
            recipe=dataclasses.replace(system.recipe, steps=steps, warmup_steps=min(system.recipe.warmup_steps, steps // 4)),
        )
        for system in scale.systems
    ]
    return dataclasses.replace(scale, systems=tuple(systems), finetune_steps=steps, sgd_steps=10 * steps, max_rates=1)


def _like(recipe: Recipe, size: str, objective: str, **shape: int) -> Recipe:
    """A recipe with another size or objective, and the name for it."""
    model = override(recipe, **shape).model
    name = f"{recipe.name.split('_')[0]}_{size}_{objective}_{model.n_px}"
    return dataclasses.replace(recipe, name=name, objective=objective, model=model)


Tunings = tuple[Tuning, ...]


def _small(images: Images, recipes: tuple[Recipe, Recipe, Recipe], lr: float, more: Tunings, **rest: Any) -> Scale:
    """Two auto-regressive sizes and a BERT on the same images; the second is the main one.

    Args:
        lr: learning rate of fine-tuning.
        more: further tunings of the main model.
    """
    small, main, bert = recipes
    data = probed = (images.id,)
    points = tuple(main.steps // part for part in PARTS[rest["name"]])
    tuned = Tuning(images.id, lr=lr)
    systems = (
        System(small, data, probed, points),
        System(main, data, probed, points, VARIANTS, (tuned, *more)),
        System(bert, data, probed, tunings=(dataclasses.replace(tuned, section="4.6, Figure 4"),), section="4.6"),
    )
    return Scale(palette=images, n_colors=main.model.n_vocab, images=(images,), systems=systems, main=main.name, **rest)


def _own(training: Training, data: str) -> Scale:
    """One model on any images; every layer is probed, beside an untrained network and raw pixels.

    With test images, probes are fitted on train and val together, of which they hold out a tenth to choose layer and penalty.
    """
    recipe = training.recipe
    about: dict[str, Any] = {"labels": training.labels, "probes": training.probes, "test_fraction": training.test_fraction}
    about |= {"train_split": "train+val", "eval_split": "test"} if training.tests else {}
    images = Images(training.name or dataset_name(data), data, recipe.model.n_px, {}, **about)
    variants = ("untrained",) if training.probes else ()
    system = System(recipe, (images.id,), (images.id,), variants=variants, train_words=training.words)
    return Scale("own", images, recipe.model.n_vocab, (images,), (system,), recipe.name, kinds=("normed", "raw"))


def _tiny() -> Scale:
    """Every kind of stage that scale full has, at the smallest size."""
    nano = dataclasses.replace(get_recipe("digits_nano_ar_8"), steps=400)
    bert = _like(nano, "nano", "bert")
    recipes = _like(nano, "pico", "ar", n_layer=4, n_embd=24), nano, bert
    images = Images("digits", "digits:", 8, {}, val_fraction=0.3)  # a tenth would be 157 images, too few for an accuracy
    more = (
        Tuning(images.id, "clf", "2.3", lr=0.003, knobs={"loss": "clf"}),
        Tuning(images.id, "best_layer", "4.5", lr=0.003, best_layer=True),
        Tuning(images.id, "from_scratch", "4.5", fresh=True, searched="from_scratch", knobs={"loss": "clf", "dropout": 0.1}),
        Tuning(images.id, "40_labels", "4.7", lr=0.003, knobs={"labels": 40, "subsets": 2}),
    )
    scale = _small(images, recipes, 0.003, more, name="tiny", n_labels=(40, 250), sgd_steps=4000)
    masked = dataclasses.replace(bert, name=f"{bert.name}_mask_25", mask_prob=0.25, weight_decay=0.01, head_std=0.02)
    changed = System(masked, (images.id,), (images.id,), section="A.1", changed="mask_prob 0.25, weight_decay, head_std")
    return dataclasses.replace(scale, systems=(*scale.systems, changed))


def _cifar(data: str, n_px: int) -> Scale:
    """The experiments that two cores finish in a night: without searches, and without the tunings that only compare."""
    nano = _like(get_recipe("cifar10_nano_ar_16"), "nano", "ar", n_px=n_px)
    recipes = _like(nano, "pico", "ar", n_layer=4, n_embd=64), nano, _like(nano, "nano", "bert")
    images = Images("cifar10", data, n_px, {}, augment=True)
    few: Knobs = {"labels": 40, "subsets": 5, "steps": 100, "val_images": 1000}
    more = (
        Tuning(images.id, "from_scratch", "4.5", fresh=True, lr=0.001, knobs={"loss": "clf"}),
        Tuning(images.id, "40_labels", "4.7", lr=0.001, knobs=few),
    )
    return _small(images, recipes, 0.001, more, name="cifar", epochs=5.0, sgd_steps=20_000)
