"""What a rollback leaves out is never seen, all else once and in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.data.loader import Batch
from igpt_ds.train.manifest import VERSION
from igpt_ds.train.rollback import (
    Range,
    Stream,
    good_checkpoint,
    leave_out,
    position,
    range_to_skip,
    read_rollbacks,
    record,
    skipped_ranges,
)

BATCH = 12
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
    record(tmp_path, [{"step": 9, "skipped": (24, 36)}, {"step": 20, "skipped": (60, 72)}])
    found = read_rollbacks(tmp_path)
    assert [rollback["step"] for rollback in found] == [9, 20]
    assert skipped_ranges(found, {}) == [(24, 36), (60, 72)]
    assert skipped_ranges([], {"skipped_ranges": [[24, 36]]}) == [(24, 36)]
    assert skipped_ranges(found, {"skipped_ranges": [[24, 36]]}) == [(24, 36), (60, 72)]
    (tmp_path / "rollbacks.json").write_text("[]")
    with pytest.raises(ValueError, match=r"rollbacks\.json is not version 1 of igpt_ds\.rollbacks; read it with the code"):
        read_rollbacks(tmp_path)


def test_the_good_checkpoint_is_older_than_the_doubt_and_whole(tmp_path: Path) -> None:
    for step, since in ((4, None), (8, None), (9, 9), (12, None)):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        manifest = {"format": "igpt_ds.checkpoint", "version": VERSION, "step": step, "files": [], "guards": {"since": since}}
        (path / "manifest.json").write_text(json.dumps(manifest))
        (path / "COMPLETE").touch()
    found = {since: good_checkpoint(tmp_path, since) for since in (4, 5, 9, 11)}
    assert {since: pair and pair[1]["step"] for since, pair in found.items()} == {4: None, 5: 4, 9: 8, 11: 8}
    (tmp_path / "step-00000008" / "COMPLETE").unlink()
    again = good_checkpoint(tmp_path, 11)
    assert again is not None
    assert again[1]["step"] == 4
