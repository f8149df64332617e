"""The list of recipes: what each trains, and how long it takes on one H100 by the plan's estimate. Called by --list_recipes."""

from __future__ import annotations

from collections.abc import Iterator

from igpt_ds.config import RECIPES, Recipe
from igpt_ds.console import duration
from igpt_ds.plan.gpus import GPUS
from igpt_ds.plan.options import Request, options
from igpt_ds.plan.step_time import Cluster
from igpt_ds.plan.text import columns, run_time

GPU = "h100-80g"
IMAGES_PER_S = {"cifar10_nano_ar_16": 67.2, "digits_nano_ar_8": 542.0}  # on two cores with bf16 units: docs/measured.md
_HEAD = ("recipe", "layers x width, heads", "image", "parameters", "batch", "steps", "lr", "on one H100", "on two CPU cores")


def recipe_table() -> str:
    """A line for each recipe. `python -m igpt_ds.plan --recipe NAME` prints the rest of its estimate."""
    note = "On one H100: python -m igpt_ds.plan --recipe NAME plans more. On two CPU cores: where it was measured."
    return "\n".join([*columns([_HEAD, *_rows()]), "", note])


def _rows() -> Iterator[tuple[str, ...]]:
    for recipe in RECIPES.values():
        model = recipe.model
        best = options(Request(recipe, 1, Cluster(GPUS[GPU])))[0]
        yield (
            recipe.name,
            f"{model.n_layer} x {model.n_embd}, {model.n_head}",
            f"{model.n_px}x{model.n_px}",
            f"{best.parameters:,}",
            str(recipe.batch_images),
            f"{recipe.steps:,}",
            f"{recipe.lr:g}",
            run_time(best.hours),
            _measured(recipe),
        )


def _measured(recipe: Recipe) -> str:
    rate = IMAGES_PER_S.get(recipe.name)
    return duration(60 * round(recipe.steps * recipe.batch_images / rate / 60)) if rate else ""
