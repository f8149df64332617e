"""What a rollback leaves out is never seen, all else once and in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.config import ModelConfig, Recipe
from igpt_ds.data.facts import DataFacts
from igpt_ds.data.loader import Batch
from igpt_ds.train.checkpoint.directory import list_checkpoints, prune
from igpt_ds.train.checkpoint.manifest import GuardStates, Manifest, write_manifest
from igpt_ds.train.safety.rollback import (
    Rollback,
    good_checkpoint,
    range_to_skip,
    read_rollbacks,
    skipped_ranges,
    write_rollbacks,
)
from igpt_ds.train.safety.spikes import Guard
from igpt_ds.train.safety.stops import Stop
from igpt_ds.train.safety.watchdog import Watchdog
from igpt_ds.train.session import Watch
from igpt_ds.train.stream import Range, Stream, leave_out, position

BATCH = 12
RECIPE = Recipe("r", ModelConfig(2, 2, 16, 4, 512), BATCH, 100, 0.01, 3)
ranges = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 10)).map(lambda pair: (BATCH * pair[0], BATCH * sum(pair))), max_size=6
)


def joined(news: list[Range]) -> list[Range]:
    found: list[Range] = []
    for new in news:
        found = leave_out(found, new)
    return found


@settings(max_examples=200, deadline=None)
@given(ranges)
def test_every_image_that_is_not_left_out_is_seen_once_and_in_order(news: list[Range]) -> None:
    skipped = joined(news)
    out = {image for first, end in news for image in range(first, end)}
    places = [position(step, BATCH, skipped) for step in range(60)]
    expected = [place for place in range(0, 2000, BATCH) if place not in out]
    assert places == expected[:60]
    assert joined(list(reversed(news))) == skipped


@settings(max_examples=200, deadline=None)
@given(ranges, st.integers(0, 30), st.integers(1, 20), st.one_of(st.none(), st.integers(1, 200)))
def test_a_rollback_changes_nothing_before_it_and_leaves_out_the_last_images(
    news: list[Range], back_to: int, more: int, images: int | None
) -> None:
    skipped, step = joined(news), back_to + more
    seen = [position(number, BATCH, skipped) for number in range(step)]
    first, end = range_to_skip(step, back_to, images, BATCH, skipped)
    after = leave_out(skipped, (first, end))
    again = [position(number, BATCH, after) for number in range(step)]
    assert again[:back_to] == seen[:back_to]
    gone = [place for place in seen if first <= place < end]
    assert len(gone) == (more if images is None else min(more, -(-images // BATCH)))
    assert gone == seen[-len(gone) :]
    assert not set(gone) & set(again)


class Numbers:
    """Batches of two images that say where they stand; counts how often it was opened."""

    def __init__(self) -> None:
        self.opened: list[int] = []

    def stream(self, images_seen: int) -> Iterator[Batch]:
        self.opened.append(images_seen)
        while True:
            yield Batch(torch.zeros(2, 1), torch.zeros(0), images_seen)
            images_seen += 2


def test_the_stream_is_opened_again_where_it_jumps_and_only_there() -> None:
    numbers = Numbers()
    stream = Stream(numbers, 4, 2)
    firsts = [[batch.first for batch in stream.step(step, [(8, 16)])] for step in range(4)]
    assert firsts == [[0, 2], [4, 6], [16, 18], [20, 22]]
    assert numbers.opened == [0, 16]
    assert [batch.first for batch in stream.step(1, [(4, 16)])] == [16, 18]
    stream.close()


def test_rollbacks_are_kept_beside_the_run(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == []
    rollbacks = [Rollback(9, 8, 4, (24, 36), "spike"), Rollback(20, 18, 16, (60, 72), "spike")]
    write_rollbacks(tmp_path, rollbacks)
    assert read_rollbacks(tmp_path) == rollbacks
    before = replace(manifest(4), skipped_ranges=((24, 36),))
    assert skipped_ranges(rollbacks, None) == [(24, 36), (60, 72)]
    assert skipped_ranges([], before) == [(24, 36)]
    assert skipped_ranges(rollbacks, before) == [(24, 36), (60, 72)]


def manifest(step: int, since: int | None = None) -> Manifest:
    """Of a checkpoint without files, saved in a doubt that began at step `since`."""
    run = {"recipe": RECIPE, "data": DataFacts("shards", "d", "p"), "precision": "fp32", "world_size": 1, "stage": 3}
    return Manifest(**run, step=step, images_seen=8 * step, guards=GuardStates(since=since), files=())


def save(checkpoints: Path, step: int, since: int | None = None) -> None:
    path = checkpoints / f"step-{step:08d}"
    path.mkdir(parents=True)
    write_manifest(path, manifest(step, since))


def good(checkpoints: Path, since: int, rollbacks: Sequence[Rollback] = ()) -> int | None:
    found = good_checkpoint(checkpoints, since, rollbacks)
    return None if found is None else found.manifest.step


def test_the_good_checkpoint_is_from_before_the_state_that_was_the_first_outlier_and_whole(tmp_path: Path) -> None:
    """The loss of step 10 is that of the state after 9."""
    for step, since in ((4, None), (8, None), (9, 9), (12, None)):
        save(tmp_path, step, since)
    assert {since: good(tmp_path, since) for since in (1, 4, 5, 6, 9, 10, 13)} == {
        1: None,
        4: None,
        5: None,
        6: 4,
        9: 4,
        10: 8,
        13: 8,
    }
    (tmp_path / "step-00000008" / "COMPLETE").unlink()
    assert good(tmp_path, 10) == 4


def test_a_second_rollback_from_the_same_place_goes_further_back(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    done = [Rollback(13, 10, 8, (0, 8), "")]
    assert good(tmp_path, 10) == 8
    assert good(tmp_path, 12, done) == 6  # the run has not got past step 13
    assert good(tmp_path, 14, done) == 8
    done.append(Rollback(15, 12, 6, (0, 8), ""))
    assert good(tmp_path, 12, done) == 4
    done.append(Rollback(11, 9, 2, (0, 8), ""))
    assert good(tmp_path, 9, done) == 2  # there is none older


def test_while_a_doubt_lasts_the_checkpoint_from_before_it_stays(tmp_path: Path) -> None:
    """Two stops in one doubt, each with a checkpoint, the only one to keep."""
    guard = Guard(RECIPE, "fp32")
    watch = Watch(Stop(tmp_path), Watchdog(tmp_path, 0), guard, [], [], 3, None, False)
    for step in (4, 8):
        save(tmp_path, step)
        guard.see(step, 3.0, False)
        prune(tmp_path, 1, 0, watch.protected(tmp_path))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000008"]
    for step in (10, 11):
        guard.see(step, 30.0, False)
        save(tmp_path, step, guard.since)
        prune(tmp_path, 1, 0, watch.protected(tmp_path))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000008", "step-00000011"]
    assert good(tmp_path, 10) == 8
    guard.see(12, 3.0, False)
    save(tmp_path, 12)
    prune(tmp_path, 1, 0, watch.protected(tmp_path))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000012"]
