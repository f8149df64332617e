"""Turns a `Scale` into the commands that reproduce it: `Stage`s in a valid order, each with its inputs and its output.

In: a scale (scales.py), a directory, and how trainings fit the machines. Out: `Stage`s. A stage is done when its output
exists. It depends on the stages whose outputs its command names. tools/paper.sh runs the stages one after another,
slurm/story_paper.sh submits them; both get them from tools/paper_plan.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from igpt_ds.paper.maker import Machine, Maker, chosen
from igpt_ds.paper.pictures import pages, pictures
from igpt_ds.paper.stage import Flags, Stage, words
from igpt_ds.paper.system import Filtered, Images, Scale, System
from igpt_ds.paper.tunings import search, tunings
from igpt_ds.plan.costs import VAL_IMAGES

SAVE_EVERY = 5000  # upper limit on steps between checkpoints
SGD_LAYERS = 5  # per job: some hours on a GPU
MASKS = (1, 5)  # draws per training image and per evaluation image (paper 4.6)


def stages(scale: Scale, out: Path, machine: Machine) -> list[Stage]:
    """All stages of a scale under the directory `out`.

    Args:
        machine: gives for a recipe the flags of train.py and finetune.py that say how it fits the machines.
    """
    maker = Maker(scale, out, machine)
    made = [*_data(maker)]
    for system in scale.systems:
        made += _system(maker, system)
    made += [*pictures(maker), *pages(maker)]
    makers = {stage.leaves: stage.name for stage in made}
    return [dataclasses.replace(stage, needs=_needs(stage, makers)) for stage in made]


def _needs(stage: Stage, makers: dict[Path, str]) -> tuple[str, ...]:
    """Names of the stages that make a path in the stage's words, or a directory above it."""
    named = [Path(word) for word in stage.words[1:]]
    found = dict.fromkeys(makers[place] for path in named for place in (path, *path.parents) if place in makers)
    return tuple(name for name in found if name != stage.name)


def _ignored(images: Images) -> Flags:
    """The flag of data whose labels are ignored."""
    return {"labels": "ignore" if images.labels == "ignore" else None}


def _data(maker: Maker) -> Iterator[Stage]:
    """The palette, the shards of each data set, and a probe of raw pixels on each."""
    scale, palette = maker.scale, maker.out / "palette.npy"
    flags: Flags = {"source": scale.palette.source, "n_px": scale.palette.n_px, "crop": scale.palette.crop}
    flags |= _ignored(scale.palette)
    flags |= {"n_colors": scale.n_colors, "max_images": scale.palette_images, "out": palette}
    yield maker.stage("palette", words("tools/fit_palette.py", flags), palette, "3.2")
    for images in scale.images:
        flags = {"source": images.source, "n_px": images.n_px, "crop": images.crop, "palette": palette}
        flags |= {"views": images.views if images.views > 1 else None, "val_fraction": images.val_fraction}
        flags |= {"test_fraction": images.test_fraction} | _ignored(images)
        flags |= {"name": images.name, "out": maker.shards(images.id)}
        made = words("tools/make_shards.py", flags)
        yield maker.stage(f"shards-{images.id}", made, maker.shards(images.id), "3, 3.1" if images.name == "web" else "3.1")
    probed = {id for system in scale.systems for id in system.probed}
    for images in (images for images in scale.images if images.id in probed and images.probes and not images.sgd):
        features = maker.features("pixels", images)
        flags = {"pixels": True, "data": maker.shards(images.id), "splits": (images.train_split, images.eval_split)}
        command = words("tools/extract_features.py", flags | {"out": features})
        yield maker.stage(f"features-pixels-{images.id}", command, features, "")
        yield maker.probe("pixels", images, 1, "")


def _system(maker: Maker, system: System) -> Iterator[Stage]:
    """Pre-training; model dir, probes and likelihood at `system.steps`; variants and fine-tuning of the last model."""
    scale = maker.scale
    yield from _training(maker, system)
    for step in system.steps:
        model, section = maker.model(system, step), system.section if step == system.recipe.steps else "4.2, Figure 3"
        flags: Flags = {"run_dir": maker.run_dir(system.recipe.name), "step": step, "out": model}
        yield maker.stage(f"model-{model.name}", words("tools/consolidate.py", flags), model, section)
        if system.points:
            precision = scale.precision if scale.precision != "fp32" else None
            file = maker.results(f"{model.name}-likelihood")
            flags = {"model": model, "data": maker.shards(system.data[0]), "split": scale.loss_split, "precision": precision}
            command = words("tools/evaluate.py", flags | {"results": file})
            yield maker.stage(f"likelihood-{model.name}", command, file, "4.2, Figure 3", 1)
        for id in system.probed if step == system.recipe.steps else system.probed[:1]:
            yield from _probes(maker, system, step, scale.of(id))
    if system.probed:
        yield from _variants(maker, system, scale.of(system.probed[0]))
    yield from tunings(maker, system)


def _training(maker: Maker, system: System) -> Iterator[Stage]:
    """Pre-training, behind the search of its rate if that is asked for."""
    recipe, name = system.recipe, system.recipe.name
    data = tuple(maker.shards(id) for id in system.data)
    if system.filtered:
        yield (web := _filter(maker, system.filtered))
        data = tuple(web.leaves if path == maker.shards(system.filtered.id) else path for path in data)
    flags: Flags = {} if system.train_words else chosen(recipe, maker.out)
    flags |= {"data": data}
    seldom = {"val_every": min(SAVE_EVERY, max(1, recipe.steps // 10)), "val_images": VAL_IMAGES}
    kept: Flags = {"save_every": min(SAVE_EVERY, max(1, recipe.steps // 8)), "keep_steps": system.points or None}
    if system.searched:
        yield search(maker, name, "train.py", flags | seldom | {"save_every": SAVE_EVERY} | maker.machine(system), "3.4")
    flags |= {"search": maker.search(name) if system.searched else None}
    flags |= {"train_split": system.train_split if system.train_split != "train" else None}
    run_dir = maker.run_dir(name)
    flags |= {"run_dir": run_dir, "resume": "auto"} | seldom | kept | maker.machine(system)
    yield maker.stage(f"train-{name}", (*words("train.py", flags), *system.train_words), run_dir, system.section)


def _filter(maker: Maker, filtered: Filtered) -> Stage:
    """The shards of the images that are kept."""
    out = maker.shards(f"{filtered.id}_filtered")
    flags: Flags = {"model": maker.model(maker.scale.of_recipe(filtered.recipe)), "reference": maker.shards(filtered.reference)}
    flags |= {"candidates": maker.shards(filtered.candidates), "write_from": maker.shards(filtered.id)}
    flags |= {"precision": maker.scale.precision if maker.scale.precision != "fp32" else None}
    return maker.stage(
        f"filter-{filtered.id}", words("tools/filter_shards.py", flags | {"keep": filtered.keep, "out": out}), out, "3"
    )


def _section(maker: Maker, system: System, images: Images, last: bool = True) -> str:
    """The section of the paper that a probe of a system repeats."""
    if system.changed:
        return "A.1"
    if maker.scale.name == "own":
        return "4.1"
    if system.recipe.objective == "bert":
        return "4.6, Figure 4"
    if not last:
        return "4.2, Figure 3"
    if images.sgd:
        return "3.4, 4.4, Table 2"
    return "2.4, 3.4, 4.1, 4.3, Figure 2, Table 1" if system.recipe.name == maker.scale.main else "4.2, Figure 3"


def _extract(maker: Maker, system: System, images: Images, name: str, section: str, more: Flags) -> Stage:
    """Features of all layers on these images."""
    features = maker.features(name, images)
    flags: Flags = {"model": maker.model(system), "data": maker.shards(images.id)}
    few = "low_data" in system.variants  # the few labels are those of fine-tuning, from train alone
    fitted = images.train_split.split("+") if few else [images.train_split]
    flags |= {"splits": (*fitted, images.eval_split), "kinds": maker.scale.kinds}
    flags |= {"mask_draws": MASKS if system.recipe.objective == "bert" else None}
    flags |= {"precision": "bf16", "dtype": "fp16"} if maker.scale.precision == "bf16" else {}
    command = words("tools/extract_features.py", flags | more | {"out": features})
    return maker.stage(f"features-{name}-{images.id}", command, features, section)


def _probes(maker: Maker, system: System, step: int, images: Images) -> Iterator[Stage]:
    """Features of one model on one data set, and a probe per layer; for BERT also the vote over masks."""
    model = maker.model(system, step)
    name, section = model.name, _section(maker, system, images, step == system.recipe.steps)
    yield _extract(maker, system, images, name, section, {"model": model})
    if not images.probes:
        return
    if images.sgd:
        layers = range(maker.layers(system))
        for first in range(0, len(layers), SGD_LAYERS):
            yield _sgd(maker, name, images, tuple(layers[first : first + SGD_LAYERS]), section)
    else:
        yield maker.probe(name, images, maker.layers(system) * len(maker.scale.kinds), section)
    if system.recipe.objective == "bert" and not system.changed:
        yield (
            _sgd_best(maker, system, images, "mask_vote", section)
            if images.sgd
            else maker.probe(name, images, 1, section, "mask_vote")
        )


def _sgd(maker: Maker, name: str, images: Images, layers: tuple[int, ...], section: str) -> Stage:
    """Probes by SGD of some layers."""
    file = maker.results(f"{name}-{images.id}-layers-{layers[0]}-{layers[-1]}")
    flags: Flags = {"features": maker.features(name, images), "layers": layers, "steps": maker.scale.sgd_steps}
    flags |= {"train_split": images.train_split, "eval_split": images.eval_split, "out": file}
    return maker.stage(f"probe-{file.stem}", words("tools/sgd_probe.py", flags), file, section, len(layers))


def _sgd_best(maker: Maker, system: System, images: Images, protocol: str, section: str) -> Stage:
    """A probe by SGD at or around the best layer, which results files may know already (paper 4.4, 4.6)."""
    name = maker.model(system).name
    file = maker.results(f"{name}-{images.id}-{protocol if images.sgd else 'sgd'}")
    known = [rows for rows in maker.rows if rows.stem.startswith(f"{name}-{images.id}-layers-")]
    flags: Flags = {"features": maker.features(name, images), "protocol": protocol, "results": known or None}
    flags |= {"steps": maker.scale.sgd_steps, "train_split": images.train_split, "eval_split": images.eval_split, "out": file}
    rows = 1 if known else 1 + maker.layers(system)
    return maker.stage(f"probe-{file.stem}", words("tools/sgd_probe.py", flags), file, section, rows)


def _variants(maker: Maker, system: System, images: Images) -> Iterator[Stage]:
    """Probes of the last model: with fresh weights, with concatenated layers (paper 4.4), with few labels (4.7)."""
    name, labels = maker.model(system).name, maker.scale.n_labels
    for variant in system.variants:
        if variant == "untrained":
            fresh = f"{system.recipe.name}-untrained"
            yield _extract(maker, system, images, fresh, "", {"untrained": 0})
            yield maker.probe(fresh, images, maker.layers(system) * len(maker.scale.kinds), "")
        elif variant == "concat" and not images.sgd:
            yield maker.probe(name, images, 1, "4.4, Table 2", "concat")
        elif variant in ("concat", "sgd"):
            yield _sgd_best(maker, system, images, "concat", "3.4, 4.4, Table 2")
        else:
            yield maker.probe(name, images, len(labels), "4.7, Table 4", "low_data", n_labels=labels, train_split="train")
