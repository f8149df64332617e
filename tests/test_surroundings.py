"""The tests' own ground: the tiny dataset is what it says, and a launch leaves nothing behind."""

from __future__ import annotations

import numpy as np
import psutil
import pytest

from igpt_ds.data.shards.dataset import ShardSet


def test_tiny_dataset_has_two_splits_of_the_tiny_images(tiny_dataset, tiny_config):
    train, val = (ShardSet(tiny_dataset, split) for split in ("train", "val"))
    assert train.classes == ["blue", "green", "red"]
    assert (train.n_px, train.n_vocab) == (tiny_config.n_px, tiny_config.n_vocab)
    assert train.n_images + val.n_images == 48
    assert val.n_images >= 4
    assert set(train.labels(np.arange(train.n_images))) == {0, 1, 2}


def test_launch_returns_what_the_program_said(launch):
    done = launch(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_launch_ends_children_in_other_sessions(launch, tmp_path):
    note = tmp_path / "pid"
    launch(["sh", "-c", f"setsid sh -c 'echo $$ > {note}; exec sleep 60' >/dev/null 2>&1 & sleep 0.3"])
    orphan = int(note.read_text())
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE


def test_launch_fails_the_test_at_its_time_limit(launch):
    with pytest.raises(pytest.fail.Exception, match=r"did not end in 0.2 s"):
        launch(["sleep", "60"], timeout=0.2)
