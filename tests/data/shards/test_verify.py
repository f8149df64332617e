"""Whatever happens to a shard's bytes is found and named."""

import shutil
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.data.shards.build import write_dataset
from igpt_ds.data.shards.index import read_index
from igpt_ds.data.shards.layout import ShardOptions
from igpt_ds.data.shards.verify import all_damage, shard_damage


@pytest.fixture
def entry(tiny):
    return read_index(tiny).splits["train"].shards[1]


def test_whole_shards_have_no_damage(tiny):
    for about in read_index(tiny).splits.values():
        assert all(not found for _, found in all_damage(tiny, about.shards, 4))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_changed_byte_is_found_in_its_image(tiny, tmp_path_factory, data):
    about = read_index(tiny).splits["train"].shards[1]
    content = bytearray((tiny / about.name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    file = tmp_path_factory.mktemp("damage") / about.name
    file.write_bytes(content)
    (damage,) = shard_damage(file, about, 4)
    assert damage.file == file
    assert damage.first <= at <= damage.last
    assert damage.last - damage.first < 2048, "narrower than an image's record"


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_truncation_is_found_where_it_begins(tiny, tmp_path_factory, data):
    about = read_index(tiny).splits["train"].shards[1]
    content = (tiny / about.name).read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    file = tmp_path_factory.mktemp("damage") / about.name
    file.write_bytes(content[:at])
    (damage,) = shard_damage(file, about, 4)
    assert (damage.first, damage.last) == (at, len(content) - 1)
    assert f"the file ends after {at} of {len(content)} bytes" in str(damage)


def test_a_file_that_is_gone_or_goes_on(tiny, tmp_path, entry):
    (damage,) = shard_damage(tmp_path / entry.name, entry, 4)
    assert (damage.first, damage.last) == (0, entry.bytes - 1)
    file = tmp_path / entry.name
    file.write_bytes((tiny / entry.name).read_bytes() + b"more")
    (damage,) = shard_damage(file, entry, 4)
    assert (damage.first, damage.last) == (entry.bytes, entry.bytes + 3)
    assert "the file continues after its" in str(damage)


def test_two_images_that_changed_places(tiny, tmp_path, entry):
    content = (tiny / entry.name).read_bytes()
    file = tmp_path / entry.name
    file.write_bytes(content[2048:4096] + content[:2048] + content[4096:])
    (damage,) = shard_damage(file, entry, 4)
    assert (damage.first, damage.last) == (0, entry.bytes - 1)
    assert f"bytes 0 to {entry.bytes - 1} are damaged: its sha256 is not the index's" in str(damage)


def test_another_sha256(tiny, entry):
    (damage,) = shard_damage(tiny / entry.name, replace(entry, sha256="0" * 64), 4)
    assert "its sha256 is not the index's, though every image matches its own checksum" in str(damage)


def test_damage_is_named_past_the_first_thousand_images(tmp_path, palette8, memory):
    write_dataset(tmp_path / "many", memory(1300, 2), palette8, ShardOptions(2, val_fraction=0))
    (entry,) = read_index(tmp_path / "many").splits["train"].shards
    file = tmp_path / "many" / entry.name
    content = bytearray(file.read_bytes())
    for at in (3 * 2048 + 1664, 1200 * 2048 + 5):  # a token, and a byte of a name
        content[at] ^= 1
    file.write_bytes(content)
    assert [damage.what for damage in shard_damage(file, entry, 2)] == ["image 3 of this shard", "image 1200 of this shard"]


def test_the_tool_names_all_damage_and_exits_with_1(tiny, tmp_path, launch):
    path = shutil.copytree(tiny, tmp_path / "damaged")
    assert launch(["tools/verify_shards.py", "--data", path]).returncode == 0
    for name in ("train-000000.tar", "val-000000.tar"):
        content = bytearray((path / name).read_bytes())
        content[2048 + 1700] ^= 1
        (path / name).write_bytes(content)
    (path / "train-000001.tar").unlink()
    done = launch(["tools/verify_shards.py", "--data", path])
    assert done.returncode == 1
    assert done.stderr.count("damaged: shard") == 3
    assert "train-000000.tar: bytes 2048 to 4095 are damaged: image 1 of this shard" in done.stderr
    assert "damaged     3 images or byte ranges" in done.stdout
