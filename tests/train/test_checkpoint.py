"""Only whole checkpoints count; the rest is named and passed over."""

import json
from pathlib import Path

import pytest

from igpt_ds.cli import SharedError
from igpt_ds.train.checkpoint import (
    checkpoint_name,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune,
    read_manifest,
    set_aside_newer,
)


def make(directory: Path, step: int) -> Path:
    """A checkpoint of two ranks' worth of files, as `save_checkpoint` leaves it."""
    path = directory / checkpoint_name(step)
    path.mkdir(parents=True)
    files = []
    for rank in range(2):
        file = path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        file.write_bytes(b"x" * (10 + rank))
        files.append({"name": file.name, "bytes": 10 + rank, "sha256": "?"})
    manifest = {"format": "igpt_ds.checkpoint", "version": 1, "world_size": 2, "step": step, "files": files}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "COMPLETE").write_text("2 files\n")
    return path


def test_the_newest_is_by_step_not_by_name_or_age(tmp_path: Path) -> None:
    for step in (200, 1000, 30):
        make(tmp_path, step)
    (tmp_path / "step-00002000.partial").mkdir()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0].name == "step-00001000"
    assert found[1]["step"] == 1000


def test_nothing_there(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "checkpoints") is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "COMPLETE").unlink(), "is not complete"),
        (lambda path: next(path.glob("*rank_1*")).write_bytes(b"x"), "has 1 bytes instead of 11"),
        (lambda path: next(path.glob("*rank_0*")).unlink(), "is missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "is not valid JSON"),
        (lambda path: (path / "manifest.json").write_text('{"format": "x"}'), "is not version 1"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, 100)
    damage(make(tmp_path, 200))
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / checkpoint_name(200))
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["step"] == 100
    error = capsys.readouterr().err
    assert "checkpoint passed over" in error
    assert message in error


def test_pruning_keeps_the_last_and_every_kth(tmp_path: Path) -> None:
    for step in range(100, 1000, 100):
        make(tmp_path, step)
    prune(tmp_path, keep_last=2, keep_every=300)
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(step) for step in (300, 600, 800, 900)]


def test_checkpoints_of_later_steps_are_set_aside(tmp_path: Path) -> None:
    """Else a damaged one, passed over when a run resumed, would outlive the good ones when old ones are pruned."""
    for step in (100, 200, 300):
        make(tmp_path, step)
    (tmp_path / "step-00000100.bak").mkdir()
    set_aside_newer(tmp_path, 100)
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(100)]
    assert (tmp_path / f"{checkpoint_name(300)}.broken" / "COMPLETE").exists()


class NoEngine:
    """Whatever is asked of it is a failure: nothing may be loaded."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf16"}, "is of another run: precision is fp32 there and bf16 here; choose another --run_dir"),
        ({"recipe": {"lr": 2}}, "is of another run: lr is 1 there and 2 here; choose another --run_dir"),
        ({"recipe": {"lr": 2, "objective": "bert"}}, "is of another run: objective is ar there and bert here"),
        ({"recipe": {"lr": 1, "mask_prob": 0.2}}, r"is of another run: mask_prob is 0\.15 there and 0\.2 here"),
        (
            {"data": {"dataset_hash": "b", "path": "shards"}},
            "was trained on other images than shards; name the shards and weights",
        ),
        (
            {"data": {"dataset_hash": "a", "path": "shards", "order": "stream"}},
            r"saw its images in order 2 and this run would in stream; use the code and the way of reading \(--stream or not\)",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    facts = {"precision": "fp32", "recipe": {"lr": 1}, "data": {"dataset_hash": "a", "path": "shards", "order": 2}}
    with pytest.raises(SharedError, match=message):
        load_checkpoint(NoEngine(), tmp_path, facts | {"world_size": 1, "files": []}, facts | changes)


def test_a_file_that_is_not_what_was_written_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path, 100)
    facts = {"precision": "fp32", "recipe": {}, "data": {"dataset_hash": "a", "path": "shards"}}
    manifest = read_manifest(path) | facts | {"world_size": 1}
    with pytest.raises(SharedError, match=r"zero_pp_rank_0_mp_rank_00_optim_states\.pt is damaged \(sha256 differs\)"):
        load_checkpoint(NoEngine(), path, manifest, facts)


def test_pruning_never_removes_the_newest_complete_one(tmp_path: Path) -> None:
    make(tmp_path, 100)
    (make(tmp_path, 200) / "COMPLETE").unlink()
    prune(tmp_path, keep_last=1, keep_every=0)
    assert newest_checkpoint(tmp_path)[1]["step"] == 100
