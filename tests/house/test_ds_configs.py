"""The third law: a ds_config holds nothing of the recipe's, and each of its keys has its reason in the README."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from igpt_ds.config import RECIPES
from igpt_ds.ds_config import join, load_ds_config
from igpt_ds.ds_config_keys import refuse_harmful
from igpt_ds.train.engine import check_ds_config

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
        assert run.ds_config["train_batch_size"] == recipe.batch_images * run.sequence_parallel
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


def test_readme_says_why_and_where_it_was_read():
    table = (DIRECTORY / "README.md").read_text().partition("| key | reason | source |")[2]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert rows
    for key, reason, source in rows:
        assert len(reason) > 20, key
        assert source.strip("| ") or key == "| `steps_per_print`", f"{key} has no source"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_deepspeed_knows_every_key(path):
    check_ds_config(load_ds_config(path), path)


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
def test_what_no_checkpoint_covers_is_refused(section):
    values = {"zero_optimization": {"stage": 3, section: {"device": "nvme", "nvme_path": "/local"}}}
    with pytest.raises(ValueError, match=rf"zero_optimization\.{section}\.device='nvme' is not supported: .*; use cpu$"):
        refuse_harmful(values, Path("a.json"))
    values["zero_optimization"][section]["device"] = "cpu"
    refuse_harmful(values, Path("a.json"))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 5}},
            r"^ds_config a\.json: unknown key 'zero_optimization\.stage3_prefetch_bucket' \(did you mean 'stage3_prefetch_",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"devize": "cpu"}}},
            r"unknown key 'zero_optimization\.offload_optimizer\.devize' \(did you mean 'device'\?\); known: device, nvme_path, ",
        ),
        ({"bf16": {"enable": True}}, r"unknown key 'bf16\.enable' \(did you mean 'enabled'\?\); known: enabled, "),
        ({"data_types": {"grad_accum": "fp32"}}, r"unknown key 'data_types\.grad_accum' \(did you mean 'grad_accum_dtype'\?\)"),
        ({"checkpoint": {"load_universl": True}}, r"unknown key 'checkpoint\.load_universl' \(did you mean 'load_universal'\?\)"),
        ({"checkpoint": "Fail"}, r"^ds_config a\.json: 'checkpoint' must be an object, not 'Fail'$"),
        (
            {"zero_optimization": {"cpu_offload": True}},
            r"no 'zero_optimization\.cpu_offload' any more; use zero_optimization\.of",
        ),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": "big"}},
            r"^ds_config a\.json: zero_optimization\.reduce_bucket_size: Input should be a valid integer",
        ),
        ({"fp16": {"enabled": True, "loss_scale": -1}}, r"^ds_config a\.json: fp16\.loss_scale: .*fp16\.loss_scale must be >= 0"),
    ],
)
def test_what_deepspeed_would_refuse_or_ignore_is_refused_by_name(section, message):
    with pytest.raises(ValueError, match=message):
        check_ds_config(section, Path("a.json"))
