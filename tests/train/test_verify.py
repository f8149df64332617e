"""Which shards a start reads, and what it notices. That two ranks share them is test_data_launch.py's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from igpt_ds.data.mixture import open_mixture
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.train.stream import verify

Read = Callable[..., int]


@pytest.fixture
def data(tiny_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dataset, tmp_path / "data"))


@pytest.fixture
def read(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Read:
    """read(mode) starts once and returns the number of shards that were read."""

    def start(mode: str = "once", on_bad: str = "stop") -> int:
        images = open_mixture([data], on_bad=on_bad, max_bad=0.1)
        verify(images, ShardSet(data, "val"), mode, tmp_path / "verified.json")
        said = capsys.readouterr()
        if mode == "never":
            assert said.out.startswith("shards not verified: the sizes of ")
            return 0
        return int(said.out.partition("shards verified: ")[2].split()[0])

    return start


def spoil(file: Path, row: int, same_time: bool = False) -> None:
    """Changes a token of an image."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[row * 2048 + 1536 + 128] ^= 1
    file.write_bytes(content)
    if same_time:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_restart_reads_only_what_changed(read: Read, data: Path, tmp_path: Path) -> None:
    n_shards = len(list(data.glob("*.tar")))
    assert read("never") == 0
    assert not (tmp_path / "verified.json").exists()
    assert [read(), read(), read("always")] == [n_shards, 0, n_shards]
    os.utime(data / "train-000001.tar", ns=(0, 1))
    assert [read(), read()] == [1, 0]
    (data / "index.json").write_text((data / "index.json").read_text() + "\n")
    assert [read(), read()] == [n_shards, 0]
    (tmp_path / "verified.json").write_text("{}")  # a record that cannot be used costs a reading, not the run
    assert [read(), read()] == [n_shards, 0]


def test_damage_after_a_start_is_found_with_its_shard_and_the_fix(read: Read, data: Path) -> None:
    read()
    spoil(data / "train-000001.tar", 3)
    for mode in ("once", "always"):
        with pytest.raises(
            ValueError, match=r"train-000001\.tar: bytes .* damaged: image 3 of this shard; make the shards again"
        ):
            read(mode)
    assert read("never") == 0


def test_bytes_that_changed_under_the_same_size_and_time_are_noticed_when_read(read: Read, data: Path) -> None:
    read()
    spoil(data / "train-000000.tar", 3, same_time=True)
    assert read() == 0
    with pytest.raises(ValueError, match=r"train-000000\.tar: image 3"):
        ShardSet(data, "train").tokens(np.arange(8))
    with pytest.raises(ValueError, match="image 3 of this shard"):
        read("always")


def test_skipped_images_are_remembered_and_refused_by_a_run_that_stops(
    read: Read, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(data / "train-000000.tar", 5)
    n_shards = len(list(data.glob("*.tar")))
    images = open_mixture([data], on_bad="skip", max_bad=0.1)
    for expected in (n_shards, 0):
        verify(images, ShardSet(data, "val"), "once", data / "verified.json")
        said = capsys.readouterr()
        assert f"shards verified: {expected} read" in said.out
        assert "1 of 37 training images are damaged and skipped" in said.out
        assert images.n_skipped == 1
    with pytest.raises(ValueError, match="image 5 of this shard"):
        verify(open_mixture([data]), None, "once", data / "verified.json")


def test_damage_outside_of_the_images_is_skipped_and_found_again(read: Read, data: Path) -> None:
    file = data / "train-000000.tar"
    content = bytearray(file.read_bytes())
    content[2048] ^= 1  # a name in a tar header
    file.write_bytes(content)
    n_shards = len(list(data.glob("*.tar")))
    assert [read("once", "skip"), read("once", "skip")] == [n_shards, 1]
    with pytest.raises(ValueError, match="image 1 of this shard"):
        read()


def test_ids_of_rows_leave_out_excluded_images(data: Path, tmp_path: Path) -> None:
    shards = ShardSet(data, "train", exclude=np.array([2, 17]))
    second = shards.entries[0].n_images
    assert shards.ids_of(0, np.array([1, 2, 3])).tolist() == [1, 2]
    assert shards.ids_of(1, np.array([17 - second, 18 - second])).tolist() == [16]


def test_one_of_several_ranks_leaves_the_sizes_to_the_shared_check(
    read: Read, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "train-000001.tar").write_bytes(b"torn")
    with pytest.raises(ValueError, match="is missing or torn: 4 bytes"):
        ShardSet(data, "train")
    monkeypatch.setenv("WORLD_SIZE", "2")
    images = open_mixture([data])
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match=r"train-000001\.tar: .* the file ends after 4 of .*; make the shards again"):
        verify(images, None, "never", data / "verified.json")
    with pytest.raises(ValueError, match=r"train-000001\.tar is missing or torn: 4 bytes"):  # if nobody had asked
        images.shard_sets[0].tokens(np.arange(images.n_images))
    (data / "train-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"train-000001\.tar: .* the file ends after 0 of .*; make the shards again"):
        verify(images, None, "once", data / "verified.json")
