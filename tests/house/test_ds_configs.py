"""The third law: a ds_config holds nothing of the recipe's, and each of its keys has its reason in the README."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.config import RECIPES
from igpt_ds.ds_config import join, load_ds_config

DIRECTORY = Path(__file__).parents[2] / "ds_configs"
FILES = sorted(DIRECTORY.glob("*.json"))


def keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all leaves."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_there_are_ds_configs():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ds_config_is_accepted_and_joins_every_recipe(path):
    ds_config = load_ds_config(path)
    for recipe in RECIPES.values():
        run = join(recipe, ds_config, world_size=8, micro_batch=1)
        assert run.ds_config["train_batch_size"] == recipe.batch_images
        assert run.ds_config["gradient_clipping"] == recipe.clip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ds_config_is_named_by_what_it_does_and_documented(path):
    readme = (DIRECTORY / "README.md").read_text()
    assert f"`{path.name}`" in readme, f"README.md does not list {path.name}"
    undocumented = [key for key in keys(json.loads(path.read_text())) if f"`{key}`" not in readme]
    assert not undocumented, f"README.md gives no reason for {undocumented}"


def test_readme_explains_no_key_that_nothing_uses():
    used = {key for path in FILES for key in keys(json.loads(path.read_text()))}
    rows = [line.split("`")[1] for line in (DIRECTORY / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert {row for row in rows if not row.endswith(".json")} == used
