"""run.json, train.jsonl and a plan's table: records, or one error that names the file, the field and the fix."""

from __future__ import annotations

import json

import pytest

from igpt_ds.config import get_recipe, recipe_to_dict
from igpt_ds.evaluate.classification import Confusion, read_confusion, write_confusion
from igpt_ds.evaluate.report.run_files import CurveRow, PlanRow, ReportedRun, read_curve, read_plan
from igpt_ds.json_files import seal

RUN = {"recipe": recipe_to_dict(get_recipe("cifar10_nano_ar_16")), "world_size": 2, "precision": "bf16", "git_commit": None}


def without(values, name):
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize("name", ["recipe", "world_size", "precision"])
def test_every_field_of_a_run(tmp_path, name):
    path = tmp_path / "run.json"
    assert ReportedRun.of(RUN, path).recipe == get_recipe("cifar10_nano_ar_16")
    for wrong in (without(RUN, name), RUN | {name: ["x"]}):
        with pytest.raises(ValueError, match=rf"^run config {path} has (no '{name}'|{name} \['x'\]).*; name the --run_dir"):
            ReportedRun.of(wrong, path)


@pytest.mark.parametrize("name", ["step", "images_seen", "loss", "val_loss", "images_per_s", "mfu"])
def test_every_field_of_a_curve(tmp_path, name):
    good = {"step": 1, "images_seen": 64, "loss": 2.5, "val_loss": None, "images_per_s": 3, "mfu": 0.1, "lr": 0.01}
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps({"step": 2, "images_seen": 128}) + "\n")
    assert read_curve(tmp_path) == [CurveRow(1, 64, 2.5, None, 3, 0.1), CurveRow(2, 128)]
    wrong = [good | {name: "x"}, *([without(good, name)] if name in ("step", "images_seen") else [])]
    for row in wrong:
        file.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=rf"^{file} line 2 has (no '{name}'|{name} 'x').*; remove the line"):
            read_curve(tmp_path)


@pytest.mark.parametrize("name", ["gpus", "fits", "days", "mfu", "recipe", "gpu"])
def test_every_field_of_a_plan(tmp_path, name):
    good = {"gpus": 8, "fits": True, "days": 2.5, "mfu": 0.3, "recipe": "r", "gpu": "h100", "ds_config": "z"}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps([good, {"gpus": 1, "reason": "no layout"}]))
    assert read_plan(file) == [PlanRow(8, True, 2.5, 0.3, "r", "h100"), PlanRow(1)]
    wrong = [good | {name: ["x"]}, *([without(good, name)] if name in ("gpus", "days", "mfu") else [])]
    for row in wrong:
        file.write_text(json.dumps([good, row]))
        with pytest.raises(
            ValueError, match=rf"^{file} row 2 (has|fits and has) (no '?{name}'?|{name} \['x'\]).*; write it with"
        ):
            read_plan(file)
    for nothing in ({}, [], [good], 3):
        file.write_text(json.dumps(nothing))
        with pytest.raises(ValueError, match=rf"^{file} is no table of a plan; write it with `python -m igpt_ds\.plan"):
            read_plan(file)


@pytest.mark.parametrize("name", ["model_hash", "split", "classes", "counts"])
def test_every_field_of_a_confusion_matrix(tmp_path, name):
    path, made = tmp_path / "c.json", Confusion("h", "val", ["a", "b"], [[3, 1], [0, 4]])
    write_confusion(path, made)
    assert read_confusion(path) == made
    values = json.loads(path.read_text())
    for wrong in (without(values, name), values | {name: 3}, values | {"counts": [[1, 2]], name: values[name]}):
        if wrong == values:
            continue
        path.write_text(json.dumps(seal(wrong)))
        with pytest.raises(ValueError, match=rf"^confusion matrix {path} has (no '{name}'|{name} 3|counts).*; make it with"):
            read_confusion(path)
