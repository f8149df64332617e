"""The paths of a scale's files, and the stages that make them: what stages.py and pictures.py share.

In: a scale, a directory, and how trainings fit the machines. Out: paths and `Stage`s.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from igpt_ds.config import RECIPES, Recipe
from igpt_ds.paper.stage import Flags, Stage, Value, words
from igpt_ds.paper.system import Images, Scale, System, Tuning

Machine = Callable[[Recipe], Flags]


def chosen(recipe: Recipe, out: Path) -> Flags:
    """The flag that names a recipe: --recipe if it is known, else --config with the file that tools/paper_plan.py writes."""
    known = RECIPES.get(recipe.name) == recipe
    return {"recipe": recipe.name} if known else {"config": out / "recipes" / f"{recipe.name}.json"}


class Maker:
    """Makes stages, and knows where their files are."""

    def __init__(self, scale: Scale, out: Path, machine: Machine) -> None:
        self.scale, self.out, self._machine = scale, out, machine
        self.rows: list[Path] = []  # results files of the paper's tables and figures, in the order of their stages
        self.compared: list[Path] = []  # results files of what is only compared, each behind the first of its system
        self.figures: list[Path] = []

    def stage(
        self, name: str, command: tuple[str, ...], leaves: Path, section: str, rows: int = 0, printed: bool = False
    ) -> Stage:
        """A stage; a results file is added to `self.rows`."""
        if rows:
            self.rows.append(leaves)
        return Stage(name, command, leaves, rows, printed, section=section)

    def machine(self, system: System) -> Flags:
        """The flags of a training that say how it fits the machines."""
        return {"ds_config": system.ds_config} if system.ds_config else self._machine(system.recipe)

    def shards(self, id: str) -> Path:
        """The shards of a data set."""
        return self.out / "shards" / id

    def run_dir(self, name: str) -> Path:
        """A run directory."""
        return self.out / "runs" / name

    def tuned(self, system: System, tuning: Tuning) -> Path:
        """The run directory of a fine-tuning."""
        return self.run_dir(f"{system.recipe.name}-{tuning.images}-{tuning.name}")

    def search(self, name: str) -> Path:
        """The directory of a search for a learning rate."""
        return self.out / "searches" / name

    def model(self, system: System, step: int | None = None) -> Path:
        """A model dir; without a step that of the last."""
        return self.out / "models" / f"{system.recipe.name}-{step or system.recipe.steps}"

    def features(self, name: str, images: Images) -> Path:
        """The features of a model, or of pixels, on a data set."""
        return self.out / "features" / f"{name}-{images.id}"

    def results(self, name: str) -> Path:
        """A results file."""
        return self.out / "results" / f"{name}.jsonl"

    def layers(self, system: System) -> int:
        """How many layers are probed: 0..n_layer."""
        return system.recipe.model.n_layer + 1

    def probe(self, name: str, images: Images, rows: int, section: str, protocol: str = "", **more: Value) -> Stage:
        """A probe by L-BFGS of the features of that name."""
        file = self.results(f"{name}-{images.id}{'-' + protocol if protocol else ''}")
        flags: Flags = {"features": self.features(name, images), "protocol": protocol or None, "train_split": images.train_split}
        flags |= {"eval_split": images.eval_split} | more | {"out": file}
        return self.stage(f"probe-{file.stem}", words("tools/linear_probe.py", flags), file, section, rows)

    def figure(self, name: str, kind: str, flags: Flags, section: str, *runs: Path) -> Stage:
        """A PNG by tools/figures.py."""
        file = self.out / "figures" / f"{name}.png"
        self.figures.append(file)
        return self.stage(f"figure-{name}", words("tools/figures.py", flags | {"out": file}, kind, *runs), file, section)
