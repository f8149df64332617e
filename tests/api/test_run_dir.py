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
    assert igpt_ds.load(tmp_path / "run" / "checkpoints").info.step == 6
