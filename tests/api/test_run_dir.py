"""`igpt_ds.load` of a run directory: the newest checkpoint, as tools/consolidate.py gathers it."""

from __future__ import annotations

import json

import pytest

import igpt_ds
from igpt_ds.model.store import read_info


@pytest.mark.slow
def test_a_run_dir_gives_the_model_of_its_newest_checkpoint(launch, command, tool, tmp_path, tiny_dataset):
    done = launch([*command("run"), "--steps", "6", "--warmup_steps", "1"], ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    model = igpt_ds.load(tmp_path / "run")
    assert tool("consolidate", "--run_dir", tmp_path / "run", "--out", tmp_path / "model")[0] == 0
    assert model.info == read_info(tmp_path / "model")
    assert (model.info.step, model.path) == (6, tmp_path / "run")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["crop"] == "none"
    assert model.nats(igpt_ds.open_shards(tiny_dataset, "val")).shape == (11,)
    assert igpt_ds.load(tmp_path / "run" / "checkpoints" / "step-00000004").info.step == 4
    for path, step in (("run", 6), ("run/checkpoints", 6), ("run/checkpoints/step-00000004", 4), ("model", 6)):
        status, said, wrong = tool("evaluate", "--model", tmp_path / path, "--data", tiny_dataset, "--limit", 4)
        assert (status, f"{tmp_path / path} (step {step}) on " in said) == (0, True), wrong
    assert igpt_ds.load(tmp_path / "run" / "checkpoints").info.step == 6
