"""Turns a `Scale` into the commands that reproduce it: `Stage`s in a valid order, each with its inputs and its output.

In: a scale (scales.py), a directory, and how trainings fit the machines. Out: `Stage`s. A stage is done when its output
exists. It depends on the stages whose outputs its command names. tools/paper.sh runs the stages one after another,
slurm/story_paper.sh submits them; both get them from tools/paper_plan.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from igpt_ds.config import RECIPES, Recipe
from igpt_ds.paper.scales import Images, Scale, System
from igpt_ds.paper.stage import Flags, Stage, Value, words

SAVE_EVERY = 5000  # upper limit on steps between checkpoints
SGD_LAYERS = 5  # per job: some hours on a GPU
MASKS = (1, 5)  # draws per training image and per evaluation image (paper 4.6)


def stages(scale: Scale, out: Path, machine: Callable[[Recipe], Flags]) -> list[Stage]:
    """All stages of a scale under the directory `out`.

    Args:
        machine: gives for a recipe the flags of train.py and finetune.py that say how it fits the machines.
    """
    made = list(_StageMaker(scale, out, machine).all())
    makers = {stage.leaves: stage.name for stage in made}
    return [dataclasses.replace(stage, needs=_needs(stage, makers)) for stage in made]


def _needs(stage: Stage, makers: dict[Path, str]) -> tuple[str, ...]:
    """Names of the stages that make a path in the stage's words, or a directory above it."""
    named = [Path(word) for word in stage.words[1:]]
    found = dict.fromkeys(makers[place] for path in named for place in (path, *path.parents) if place in makers)
    return tuple(name for name in found if name != stage.name)


def chosen(recipe: Recipe, out: Path) -> Flags:
    """The flag that names a recipe: --recipe if it is known, else --config with the file that tools/paper_plan.py writes."""
    known = RECIPES.get(recipe.name) == recipe
    return {"recipe": recipe.name} if known else {"config": out / "recipes" / f"{recipe.name}.json"}


def ignored(images: Images) -> Flags:
    """The flag of the tools that read the source of images whose labels are ignored."""
    return {"labels": "ignore" if images.labels == "ignore" else None}


class _StageMaker:
    """Makes the stages of a scale, and knows the paths of their files."""

    def __init__(self, scale: Scale, out: Path, machine: Callable[[Recipe], Flags]) -> None:
        self.scale, self.out, self.machine = scale, out, machine
        self.rows: list[Path] = []  # all results files, in the order of their stages
        self.figures: list[Path] = []

    def all(self) -> Iterator[Stage]:
        """All stages, in order."""
        yield from self.data()
        for system in self.scale.systems:
            yield from self.system(system)
        yield from self.pictures()
        yield from self.pages()

    def stage(self, name: str, program: str, flags: Flags, leaves: Path, rows: int = 0, printed: bool = False) -> Stage:
        """A stage; a results file is added to `self.rows`."""
        if rows:
            self.rows.append(leaves)
        return Stage(name, words(program, flags), leaves, rows, printed)

    def shards(self, images: Images) -> Path:
        return self.out / "shards" / images.id

    def run_dir(self, name: str) -> Path:
        return self.out / "runs" / name

    def model(self, system: System, step: int) -> Path:
        return self.out / "models" / f"{system.recipe.name}-{step}"

    def features(self, name: str, images: Images) -> Path:
        return self.out / "features" / f"{name}-{images.id}"

    def results(self, name: str) -> Path:
        return self.out / "results" / f"{name}.jsonl"

    def rows_of(self, system: System, images: Images) -> int:
        return len(images.probed(system.recipe)) * len(self.scale.kinds)

    def data(self) -> Iterator[Stage]:
        """The palette, the shards of each data set, and a probe of raw pixels on each."""
        scale, palette = self.scale, self.out / "palette.npy"
        flags: Flags = {"source": scale.palette.source, "n_px": scale.palette.n_px, "crop": scale.palette.crop}
        flags |= ignored(scale.palette)
        flags |= {"n_colors": scale.n_colors, "max_images": scale.palette_images, "out": palette}
        yield self.stage("palette", "tools/fit_palette.py", flags, palette)
        for images in scale.images:
            flags = {"source": images.source, "n_px": images.n_px, "crop": images.crop, "palette": palette}
            flags |= {"views": images.views if images.views > 1 else None, "val_fraction": images.val_fraction}
            flags |= {"test_fraction": images.test_fraction} | ignored(images)
            flags |= {"name": images.name, "out": self.shards(images)}
            yield self.stage(f"shards-{images.id}", "tools/make_shards.py", flags, self.shards(images))
        probed = {id for system in scale.systems for id in system.probed}
        for images in (images for images in scale.images if images.id in probed and images.probes and not images.sgd):
            features = self.features("pixels", images)
            flags = {"pixels": True, "data": self.shards(images), "splits": (images.train_split, images.eval_split)}
            yield self.stage(f"features-pixels-{images.id}", "tools/extract_features.py", flags | {"out": features}, features)
            yield self.probe("pixels", images, features, 1)

    def system(self, system: System) -> Iterator[Stage]:
        """Pre-training; model dir, probes and likelihood at `system.steps`; variants and fine-tuning of the last model."""
        recipe, name = system.recipe, system.recipe.name
        run_dir, data = self.run_dir(name), self.shards(self.scale.of(system.data))
        longest = min(SAVE_EVERY, max(1, recipe.steps // 4)) if system.train_words else SAVE_EVERY
        save_every = max(steps for steps in range(1, longest + 1) if system.every % steps == 0)
        kept = {"save_every": save_every, "keep_every": system.every if system.stages > 1 else None}
        seldom = {"val_every": min(SAVE_EVERY, max(1, recipe.steps // 10)), "val_images": 5000}
        flags = {} if system.train_words else chosen(recipe, self.out)
        flags |= {"data": data, "run_dir": run_dir, "resume": "auto"} | seldom | kept | self.machine(recipe)
        yield Stage(f"train-{name}", (*words("train.py", flags), *system.train_words), run_dir)
        for step in system.steps:
            model, last = self.model(system, step), step == recipe.steps
            flags = {"run_dir": run_dir, "step": step, "out": model}
            yield self.stage(f"model-{model.name}", "tools/consolidate.py", flags, model)
            if system.stages > 1:  # a point of Figure 3
                flags = {"model": model, "data": data, "split": "val", "precision": "bf16" if self.scale.bf16 else None}
                file = self.results(f"{model.name}-likelihood")
                yield self.stage(f"likelihood-{model.name}", "tools/evaluate.py", flags | {"results": file}, file, 1)
            for id in system.probed if last else system.probed[:1]:
                yield from self.probes(system, model, self.scale.of(id))
        yield from self.variants(system, self.scale.of(system.probed[0]))
        for id in system.finetuned:
            yield self.finetune(system, self.scale.of(id), fresh=False)
        for id in system.from_scratch:
            yield self.finetune(system, self.scale.of(id), fresh=True)

    def extract(self, system: System, model: Path, images: Images, name: str, more: Flags) -> Stage:
        """Features of the probed layers on these images."""
        features, layers = self.features(name, images), images.probed(system.recipe)
        flags: Flags = {"model": model, "data": self.shards(images), "splits": (images.train_split, images.eval_split)}
        flags |= {"kinds": self.scale.kinds, "layers": layers if images.sgd else None}
        flags |= {"mask_draws": MASKS if system.recipe.objective == "bert" else None}
        flags |= {"precision": "bf16", "dtype": "fp16"} if self.scale.bf16 else {}
        return self.stage(f"features-{name}-{images.id}", "tools/extract_features.py", flags | more | {"out": features}, features)

    def probes(self, system: System, model: Path, images: Images) -> Iterator[Stage]:
        """Features of one model on one data set, and a probe per layer; for BERT also the vote over masks."""
        name, layers = model.name, images.probed(system.recipe)
        features = self.features(name, images)
        yield self.extract(system, model, images, name, {})
        if not images.probes:
            return
        if images.sgd:
            for first in range(0, len(layers), SGD_LAYERS):
                some = layers[first : first + SGD_LAYERS]
                file = self.results(f"{name}-{images.id}-layers-{some[0]}-{some[-1]}")
                flags: Flags = {"features": features, "layers": some, "train_split": images.train_split}
                flags |= {"eval_split": images.eval_split, "out": file}
                yield self.stage(f"probe-{file.stem}", "tools/sgd_probe.py", flags, file, len(some))
        else:
            yield self.probe(name, images, features, self.rows_of(system, images))
        if system.recipe.objective == "bert":
            yield self.probe(name, images, features, 1, "mask_vote")

    def probe(self, name: str, images: Images, features: Path, rows: int, protocol: str = "", **more: Value) -> Stage:
        """A probe by L-BFGS."""
        file = self.results(f"{name}-{images.id}{'-' + protocol if protocol else ''}")
        flags: Flags = {"features": features, "protocol": protocol or None, "train_split": images.train_split}
        flags |= {"eval_split": images.eval_split} | more | {"out": file}
        return self.stage(f"probe-{file.stem}", "tools/linear_probe.py", flags, file, rows)

    def variants(self, system: System, images: Images) -> Iterator[Stage]:
        """Probes of the last model: with fresh weights, with concatenated layers (paper 4.4), with few labels (4.7)."""
        model = self.model(system, system.recipe.steps)
        features = self.features(model.name, images)
        for variant in system.variants:
            if variant == "untrained":
                name = f"{system.recipe.name}-untrained"
                yield self.extract(system, model, images, name, {"untrained": 0})
                yield self.probe(name, images, self.features(name, images), self.rows_of(system, images))
            elif variant == "concat":
                yield self.probe(model.name, images, features, 1, "concat")
            else:
                n_labels = self.scale.n_labels
                yield self.probe(model.name, images, features, len(n_labels), "low_data", n_labels=n_labels)

    def finetune(self, system: System, images: Images, fresh: bool) -> Stage:
        """Fine-tuning of the last model, or of fresh weights at the learning rate of pre-training."""
        scale, recipe = self.scale, system.recipe
        run_dir = self.run_dir(f"{recipe.name}-{images.id}-{'scratch' if fresh else 'finetuned'}")
        start: Flags = {"model": self.model(system, recipe.steps)}
        if fresh:
            start = chosen(recipe, self.out) | {"untrained": 0}
        flags = start | {"data": self.shards(images), "run_dir": run_dir, "resume": "auto"}
        flags |= {"lr": recipe.lr if fresh else system.finetune_lr, "batch_images": recipe.batch_images}
        flags |= {"steps": scale.finetune_steps} if scale.finetune_steps else {"epochs": scale.epochs}
        flags |= {"augment_pad": images.n_px // 8 if images.augment else None, "augment_flip": images.augment}
        file = run_dir / "results.jsonl"
        self.rows.append(file)
        flags |= self.machine(recipe) | {"eval_split": images.eval_split, "results": file}
        return self.stage(run_dir.name, "finetune.py", flags, run_dir)

    def figure(self, name: str, kind: str, flags: Flags, *runs: Path) -> Stage:
        """A PNG by tools/figures.py."""
        file = self.out / "figures" / f"{name}.png"
        self.figures.append(file)
        return Stage(f"figure-{name}", words("tools/figures.py", flags | {"out": file}, kind, *runs), file)

    def pictures(self) -> Iterator[Stage]:
        """Figures of the main model on its first probed data set, and Figures 2, 3 and 4 if there are other models."""
        scale, main = self.scale, self.scale.of_recipe(self.scale.main)
        images, model = scale.of(main.probed[0]), self.model(main, main.recipe.steps)
        features = self.features(model.name, images)
        own = [self.results(f"{one}-{images.id}") for one in (model.name, f"{main.recipe.name}-untrained", "pixels")]
        if images.probes:
            yield self.figure("layers", "layers", {"results": own})
        readers = [system for system in scale.systems if system.recipe.objective == "ar"]
        if len(scale.systems) > 1:
            yield from self.comparisons(main, readers)
        if images.probes:
            look: Flags = {"results": own[:1], "features": features}
            yield self.figure("confusion", "confusion", look)
            yield self.figure("neighbours", "neighbours", look | {"data": self.shards(images)})
        for id in main.finetuned[:1]:
            counts = self.run_dir(f"{main.recipe.name}-{id}-finetuned") / "confusion.json"
            title = f"{main.recipe.name} fine-tuned on {scale.of(id).name}, {scale.of(id).eval_split}"
            yield self.figure("confusion_finetuned", "confusion", {"counts": counts, "title": title})
        like = [system for system in readers or scale.systems if system.recipe.model.n_px == main.recipe.model.n_px]
        runs = [self.run_dir(system.recipe.name) for system in like]
        yield self.figure("training", "training", {}, *runs)
        if main not in readers:
            return
        samples = self.out / "figures" / "samples.png"
        self.figures.append(samples)
        flags: Flags = {"model": model, "data": self.shards(scale.of(main.data)), "out": samples}
        yield self.stage("samples", "tools/sample.py", flags, samples)

    def comparisons(self, main: System, readers: list[System]) -> Iterator[Stage]:
        """Figures 2, 3 and 4."""
        images = self.scale.of(main.probed[0])
        shown = [main] if len(main.probed) > 1 else readers
        last = [f"{self.model(system, system.recipe.steps).name}-{id}" for system in shown for id in system.probed]
        yield self.figure("datasets", "datasets", {"results": [file for file in self.rows if file.stem in last]})
        points = [self.model(system, step).name for system in readers if system.stages > 1 for step in system.steps]
        both = [self.results(f"{point}-{what}") for point in points for what in ("likelihood", images.id)]
        yield self.figure("loss", "loss", {"results": both, "dataset": images.name})
        yield self.figure("objectives", "objectives", {"results": tuple(self.rows)})

    def pages(self) -> Iterator[Stage]:
        """Tables with all models at their last step (the paper's if there are several), and the report of the main run."""
        main, tables = self.scale.of_recipe(self.scale.main), self.out / "tables.md"
        images = self.scale.of(main.data)
        name, last = main.recipe.name, f"{self.model(main, main.recipe.steps).name}-"
        early = tuple(f"{self.model(system, step).name}-" for system in self.scale.systems for step in system.steps[:-1])
        rows = [file for file in self.rows if not file.stem.startswith(early)]
        runs = [self.run_dir(system.recipe.name) for system in self.scale.systems]
        paper = (1, 2, 3, 4, 5) if len(runs) > 1 else None
        flags: Flags = {"results": rows, "paper": paper, "run_dir": runs}
        if rows:
            yield self.stage("tables", "tools/tables.py", flags, tables, printed=True)
        own = (last, f"{name}-untrained-", "pixels-")
        shown = [file for file in rows if file.stem.startswith(own) or file.parent.name.startswith(f"{name}-")]
        flags["results"] = shown or None
        if self.scale.name == "own":
            model, measured = self.model(main, main.recipe.steps), [file for file in rows if file.stem.startswith(last)]
            asked: Flags = {"model": model, "run_dir": self.run_dir(name), "results": measured or None}
            yield self.stage("card", "tools/model_card.py", asked, self.out / "card.md", printed=True)
        flags["run_dir"] = self.run_dir(name)
        drawn = ("layers",) if paper else ("layers", "training")  # the report draws these itself
        pictures = tuple(path for path in self.figures if path.stem not in drawn)
        flags |= {"pictures": pictures, "title": f"The paper at scale {self.scale.name}" if paper else f"{images.name}: {name}"}
        report = self.out / "report.html"
        yield self.stage("report", "tools/report.py", flags | {"out": report}, report)
