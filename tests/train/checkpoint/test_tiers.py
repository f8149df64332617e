"""Two directories of states: the newest whole one counts, and what is damaged is named."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from igpt_ds.cli import SharedError
from igpt_ds.config import ModelConfig, Recipe
from igpt_ds.data.facts import DataFacts
from igpt_ds.train.checkpoint.collect import _states_of
from igpt_ds.train.checkpoint.directory import checkpoint_name, prune
from igpt_ds.train.checkpoint.fast_id import FastId, read_fast_id
from igpt_ds.train.checkpoint.manifest import Manifest, file_entry, write_manifest
from igpt_ds.train.checkpoint.newest import newest_state
from igpt_ds.train.checkpoint.saver import Saver, tiers_of
from igpt_ds.train.checkpoint.tiers import Tier, fast_tier, forget_fast, leave_fast, run_tier

STATES, MODEL = (f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt" for kind in ("optim", "model"))
RECIPE = Recipe("r", ModelConfig(2, 2, 16, 4, 512), 12, 100, 0.01, 3)


def make(directory: Path, step: int, world_size: int = 1, start: str = "") -> Path:
    """A state of rank 0, which with more ranks is a part."""
    path = directory / checkpoint_name(step)
    path.mkdir(parents=True)
    for name in (STATES, MODEL):
        (path / name).write_bytes(b"x" * 10)
    facts = {
        "recipe": RECIPE,
        "data": DataFacts("shards", "a", "p", 2),
        "precision": "fp32",
        "files": (file_entry(path / STATES), file_entry(path / MODEL)),
    }
    manifest = Manifest(**facts, step=step, images_seen=step, world_size=world_size, stage=3, start=start)  # type: ignore[arg-type]
    write_manifest(path, manifest)
    return path


def test_the_newest_whole_state_of_either_directory_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = run_tier(tmp_path / "run"), Tier(tmp_path / "fast", tmp_path / "run", fast=True)
    assert newest_state([slow, fast]) is None
    old, older, changed, torn = (
        make(slow.directory, 100),
        make(fast.directory, 110),
        make(fast.directory, 120),
        make(fast.directory, 130),
    )
    (changed / STATES).write_bytes(b"y" * 10)
    (torn / STATES).write_bytes(b"x")
    found = newest_state([slow, fast])
    assert found is not None
    assert found.path == older
    said = capsys.readouterr().err
    assert f"checkpoint skipped: {changed / STATES} is damaged" in said
    assert f"checkpoint skipped: {torn / STATES} has 1 bytes" in said
    assert not changed.exists()
    assert not torn.exists()
    newest = make(slow.directory, 140)
    (newest / STATES).write_bytes(b"y" * 10)
    assert (newest_state([slow, fast]) or found).path == older  # the other way round
    assert newest.with_name("step-00000140.broken").exists()
    (older / "manifest.json").write_text("{}")
    assert (newest_state([slow, fast]) or found).path == old
    fast.clear()
    assert not fast.directory.exists()


def test_a_run_without_a_usable_copy_starts_over_but_not_without_its_own(tmp_path: Path) -> None:
    slow, fast = run_tier(tmp_path / "run"), Tier(tmp_path / "fast", tmp_path / "run", fast=True)
    (make(fast.directory, 110) / "COMPLETE").unlink()
    assert newest_state([slow, fast]) is None
    (make(slow.directory, 100) / "COMPLETE").unlink()
    with pytest.raises(SharedError, match="holds no usable checkpoint"):
        newest_state([slow, fast])


def test_the_part_of_one_node_is_no_state_when_the_others_are_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = run_tier(tmp_path / "run"), Tier(tmp_path / "fast", tmp_path / "run", fast=True)
    old, part = make(slow.directory, 100), make(fast.directory, 110, world_size=2)
    found = newest_state([slow, fast])
    assert found is not None
    assert found.path == old
    assert f"checkpoint skipped: {part} has the files of one node, and the other nodes are gone" in capsys.readouterr().err


def test_states_that_cannot_be_used_do_not_push_out_those_of_a_start_from_the_beginning(tmp_path: Path) -> None:
    slow, fast = run_tier(tmp_path / "run"), Tier(tmp_path / "fast", tmp_path / "run", fast=True)
    for step in (400, 500):
        (make(fast.directory, step) / STATES).write_bytes(b"y" * 10)
    assert newest_state([slow, fast]) is None
    new = make(fast.directory, 100)
    assert prune(fast.directory, keep_last=2, keep_every=0) == []
    assert (newest_state([slow, fast]) or slow).path == new  # type: ignore[union-attr]


def test_a_disk_that_fails_costs_a_run_its_fast_directory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(path: Path, *rest: Any, **more: Any) -> Any:
            if fast_dir in path.parents:
                raise OSError(5, "Input/output error", str(path))
            return function(path, *rest, **more)

        return called

    slow, fast_dir = run_tier(tmp_path / "run"), tmp_path / "fast"
    slow.run_dir.mkdir()
    old = make(slow.directory, 100)
    make(fast_tier(fast_dir, slow.run_dir, resumes=True).directory, 110)
    (slow.run_dir / "run.json").touch()
    for name in ("mkdir", "glob"):
        monkeypatch.setattr(Path, name, failing(getattr(Path, name)))
    failed = fast_tier(fast_dir, slow.run_dir, resumes=True)
    assert not failed.works
    assert _states_of(failed) == {}
    found = newest_state([slow, failed])
    assert found is not None
    assert found.path == old


def test_a_run_has_a_fast_directory_of_its_own(tmp_path: Path) -> None:
    run_dir, fast_dir = tmp_path / "run", tmp_path / "fast"
    first = fast_tier(fast_dir, run_dir, resumes=True)
    assert (first.directory.parent, first.ranks) == (fast_dir, None)
    assert fast_tier(fast_dir, run_dir, resumes=True) == first
    assert list(first.directory.iterdir()) == []
    assert fast_tier(fast_dir, run_dir, resumes=False) != first  # a new run of the same name
    kept = make(fast_tier(fast_dir, run_dir, resumes=True).directory, 10)
    with pytest.raises(SharedError, match="holds states of this run; continue with --resume auto"):
        fast_tier(fast_dir, run_dir, resumes=False)
    assert kept.exists()


def test_only_a_run_that_has_begun_goes_on_without_its_fast_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, file = tmp_path / "run", tmp_path / "file"
    run_dir.mkdir()
    file.write_text("")
    refusal = f"--fast_dir {file} cannot be used on rank 0: Not a directory"
    with pytest.raises(SharedError, match=f"{refusal}; choose another directory"):
        fast_tier(file, run_dir, resumes=True)
    with pytest.raises(SharedError, match=f"{refusal}; choose another directory"):
        fast_tier(file, run_dir, resumes=True)
    slow = run_tier(run_dir)
    old = make(slow.directory, 100)
    (run_dir / "run.json").touch()
    unusable = fast_tier(file, run_dir, resumes=True)
    assert f"the run goes on without --fast_dir: {refusal}" in capsys.readouterr().out
    assert not unusable.works
    found = newest_state([slow, unusable])
    assert found is not None
    assert found.path == old


def test_states_that_cannot_be_removed_after_a_rollback_never_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    run_dir, fast_dir = tmp_path / "run", tmp_path / "fast"
    run_dir.mkdir()
    slow, fast = run_tier(run_dir), fast_tier(fast_dir, run_dir, resumes=True)
    old = make(slow.directory, 100)
    make(fast.directory, 110)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", read_only)
        assert fast.counts()
        fast.forget_newer(100)
    assert not fast.counts()  # so that this start does not save there either
    (run_dir / "run.json").touch()
    later = fast_tier(fast_dir, run_dir, resumes=True)
    assert later.known  # so that the run also goes on if it cannot use its new directory
    assert later.directory != fast.directory
    found = newest_state([slow, later])
    assert found is not None
    assert found.path == old


def test_after_a_rollback_the_states_of_a_node_that_was_away_do_not_count(tmp_path: Path) -> None:
    run_dir, fast_dir = tmp_path / "run", tmp_path / "fast"
    run_dir.mkdir()
    before = fast_tier(fast_dir, run_dir, resumes=True)
    make(before.directory, 110)
    after = before.start_over()
    assert list(fast_dir.iterdir()) == []
    make(before.directory, 110)  # the node is there again
    (run_dir / "run.json").touch()
    later = fast_tier(fast_dir, run_dir, resumes=True)
    assert later.directory == after.directory
    assert later.known
    assert newest_state([run_tier(run_dir), later]) is None


def test_of_one_step_the_run_directory_s_state_counts_and_a_damaged_one_is_set_aside(tmp_path: Path) -> None:
    run_dir, fast_dir = tmp_path / "run", tmp_path / "fast"
    run_dir.mkdir()
    slow, fast = run_tier(run_dir), fast_tier(fast_dir, run_dir, resumes=True)
    kept = make(slow.directory, 10)
    copy = make(fast.directory, 10)
    found = newest_state([slow, fast])
    assert found is not None
    assert found.path == kept
    damaged = next(path for path in kept.iterdir() if path.name.endswith("optim_states.pt"))
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    found = newest_state([slow, fast])
    assert found is not None
    assert found.path == copy
    assert not kept.exists()  # so that the end of the run saves step 10 again before it removes the copy
    assert kept.with_name(f"{kept.name}.broken").exists()


def test_a_start_without_the_fast_directory_of_the_last_one_is_refused_where_it_would_lose_steps(tmp_path: Path) -> None:
    run_dir, fast_dir, other = tmp_path / "run", tmp_path / "fast", tmp_path / "other"
    run_dir.mkdir()
    leave_fast(run_dir, None)  # there was none
    fast = fast_tier(fast_dir, run_dir, resumes=True)
    make(run_tier(run_dir).directory, 10)
    make(fast.directory, 20)
    fix = rf"continue with --resume auto --fast_dir {fast_dir}, or remove"
    for given in (None, other):
        with pytest.raises(SharedError, match=rf"holds step 20 of this run, .* {fix}"):
            leave_fast(run_dir, given)
    with pytest.raises(SharedError, match=fix):
        tiers_of(argparse.Namespace(run_dir=run_dir, fast_dir=None), resumes=False)
    leave_fast(run_dir, fast_dir)
    assert fast_tier(fast_dir, run_dir, resumes=True).directory == fast.directory
    make(run_tier(run_dir).directory, 20)
    leave_fast(run_dir, other)
    assert fast_tier(other, run_dir, resumes=True).directory.name != fast.directory.name
    make(run_tier(run_dir).directory, 30)
    leave_fast(run_dir, fast_dir)
    assert fast_tier(fast_dir, run_dir, resumes=True).directory != fast.directory  # a state of step 20 is not of this branch


def test_a_state_of_a_node_that_was_away_does_not_count_where_a_later_start_fell_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three starts: on node A, on node B, whose disk is empty, and on A again."""
    run_dir, disk, away = tmp_path / "run", tmp_path / "disk", tmp_path / "away"
    slow = run_tier(run_dir)
    kept = make(slow.directory, 100)
    first = fast_tier(disk, run_dir, resumes=True)
    first.begin(0)
    make(first.directory, 90, start=first.start)
    left = make(first.directory, 110, start=first.start)
    disk.rename(away)
    second = fast_tier(disk, run_dir, resumes=True)
    assert second.start != first.start
    assert (newest_state([slow, second]) or left).path == kept  # type: ignore[union-attr]
    second.begin(100)
    make(second.directory, 105, start=second.start)
    shutil.rmtree(disk)
    away.rename(disk)
    third = fast_tier(disk, run_dir, resumes=True)
    assert third.directory == first.directory
    assert (newest_state([slow, third]) or left).path == kept  # type: ignore[union-attr]
    assert f"{left} was left by a start that began at an earlier step" in capsys.readouterr().err
    third.begin(100)
    own = make(third.directory, 103, start=third.start)
    fourth = fast_tier(disk, run_dir, resumes=True)
    assert (newest_state([slow, fourth]) or left).path == own  # type: ignore[union-attr]


def test_a_start_after_the_place_was_forgotten_names_none(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tier = fast_tier(tmp_path / "fast", run_dir, resumes=True)
    forget_fast(run_dir)
    tier.begin(7)
    known = read_fast_id(run_dir)
    assert known is not None
    assert (known.where, known.starts) == (None, ((tier.start, 7),))


def test_states_of_older_code_and_those_before_a_later_start_count() -> None:
    starts = tuple((name * 32, step) for name, step in (("a", 0), ("b", 70), ("c", 60)))
    known = FastId("0" * 12, starts=starts)
    counted = {name: [step for step in range(10, 100, 10) if known.counts(name * 32, step)] for name in "abcd"}
    assert counted == {"a": [10, 20, 30, 40, 50, 60], "b": [10, 20, 30, 40, 50, 60], "c": list(range(10, 100, 10)), "d": []}
    assert known.counts("", 90)
    assert FastId("0" * 12).counts("a" * 32, 90)


def test_a_link_may_lead_to_another_disk_on_each_node(tmp_path: Path) -> None:
    run_dir, link = tmp_path / "run", tmp_path / "local"
    run_dir.mkdir()
    for name in "ab":
        (tmp_path / name).mkdir()
    link.symlink_to(tmp_path / "a")
    first = fast_tier(link, run_dir, resumes=True)
    link.unlink()
    link.symlink_to(tmp_path / "b")
    leave_fast(run_dir, link)
    assert fast_tier(link, run_dir, resumes=True).directory == first.directory
    leave_fast(run_dir, tmp_path / "b")  # the same place by another name
    assert read_fast_id(run_dir).identity == first.directory.name[-12:]  # type: ignore[union-attr]


def test_the_states_are_found_by_every_name_of_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, fast_dir, link = tmp_path / "run", tmp_path / "fast", tmp_path / "latest"
    first = fast_tier(fast_dir, run_dir, resumes=True)
    link.symlink_to(run_dir)
    assert fast_tier(fast_dir, link, resumes=True).directory == first.directory
    monkeypatch.chdir(run_dir)
    assert fast_tier(fast_dir, Path(), resumes=True).directory == first.directory
    run_dir.rename(tmp_path / "moved")
    assert fast_tier(fast_dir, tmp_path / "moved", resumes=True).directory == first.directory
    assert fast_tier(fast_dir, tmp_path / "moved", resumes=True).counts()


def test_a_start_that_lost_its_run_changes_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = run_tier(tmp_path / "run")
    state, unfinished = make(slow.directory, 100), slow.directory / "step-00000200.partial"
    unfinished.mkdir()
    (slow.run_dir / "owner").write_text("12.1\n")
    monkeypatch.setenv("IGPT_DS_OWNER", "12.0")
    with pytest.raises(SharedError, match="the other start continues"):
        newest_state([slow])
    saver = Saver(SimpleNamespace(), SimpleNamespace(), [slow], asynchronous=False)  # type: ignore[arg-type]
    with pytest.raises(SharedError, match="the other start continues"):
        saver.forget_newer(50)
    assert state.exists()
    assert unfinished.exists()


def test_a_damaged_id_is_refused(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for damaged in ("", f"{'0' * 12}\n/fast\nx 3\n"):
        (run_dir / "fast_id").write_text(damaged)
        with pytest.raises(
            SharedError, match=r"fast_id is damaged; write the 12 digits at the end of run-\.\.\. in --fast_dir into it"
        ):
            fast_tier(tmp_path / "fast", run_dir, resumes=True)


def test_a_rollback_without_the_fast_directory_forgets_its_states(tmp_path: Path) -> None:
    run_dir, fast_dir = tmp_path / "run", tmp_path / "fast"
    run_dir.mkdir()
    make(fast_tier(fast_dir, run_dir, resumes=True).directory, 110)
    forget_fast(run_dir)  # as Saver.forget_newer does without --fast_dir
    assert newest_state([run_tier(run_dir), fast_tier(fast_dir, run_dir, resumes=True)]) is None
    forget_fast(tmp_path / "another")
    assert not (tmp_path / "another").exists()
