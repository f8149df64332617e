"""What is read is what was written, by us and by plain webdataset; anything else is refused by name."""

import dataclasses
import gc
import json
import shutil
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.data.palette import Palette, save_palette
from igpt_ds.data.shards.dataset import DamagedImagesError, ShardSet
from igpt_ds.data.shards.index import ShardIndex, read_index, write_index
from igpt_ds.data.shards.layout import split_of
from igpt_ds.data.sources import open_source
from igpt_ds.json_files import seal


def everything(shards):
    return shards.read(np.arange(shards.n_images))


@pytest.fixture
def damaged(tiny, tmp_path):
    """A copy of the tiny dataset to break."""
    return shutil.copytree(tiny, tmp_path / "damaged")


def edit_index(path, **changes):
    index = json.loads((path / "index.json").read_text()) | changes
    (path / "index.json").write_text(json.dumps(seal(index)))


# --------------------------------------------------------------------------------------------------- round trip


def test_every_image_is_there_once_in_its_split(tiny, memory, palette8):
    expected = {"train": [], "val": []}
    source = memory(40)
    for entry, image in zip(source.entries(), source.images, strict=True):
        expected[split_of(entry.key, 0, 0.3)].append((palette8.encode(image), entry.label))
    for split, records in expected.items():
        shards = ShardSet(tiny, split)
        assert (shards.path, shards.split, shards.n_images) == (tiny, split, len(records))
        assert (shards.n_px, shards.n_vocab, shards.classes) == (4, 8, ["cat", "dog", "owl"])
        assert shards.palette_hash == shards.palette.hash == palette8.hash
        tokens, labels = everything(shards)
        assert (tokens.dtype, labels.dtype) == (np.uint16, np.int64)
        np.testing.assert_array_equal(tokens, np.stack([tokens for tokens, _ in records]))
        np.testing.assert_array_equal(labels, [label for _, label in records])
        shards.verify()


def test_digits_come_back_as_their_pixels(digits):
    source = open_source("digits:")
    entries = list(source.entries())
    records = {entry.key: (image, entry.label) for entry, image in zip(entries, source.read(entries), strict=True)}
    kept = {split: [key for key in records if split_of(key, 0, 0.1) == split] for split in ("train", "val")}
    for split, keys in kept.items():
        shards = ShardSet(digits, split)
        tokens, labels = everything(shards)
        np.testing.assert_array_equal(shards.palette.decode(tokens), np.stack([records[key][0] for key in keys]))
        np.testing.assert_array_equal(labels, [records[key][1] for key in keys])
    assert 120 < len(kept["val"]) < 240


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_ids_in_any_order(tiny, data):
    shards = ShardSet(tiny, "train")
    ids = np.array(data.draw(st.lists(st.integers(0, shards.n_images - 1), max_size=30)), dtype=np.int64)
    tokens, labels = everything(shards)
    np.testing.assert_array_equal(shards.tokens(ids), tokens[ids])
    np.testing.assert_array_equal(shards.labels(ids), labels[ids])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files to be collected
def test_plain_webdataset_reads_the_same(digits):
    for split in ("train", "val"):
        shards = ShardSet(digits, split)
        tokens, labels = everything(shards)
        files = sorted(str(file) for file in digits.glob(f"{split}-*.tar"))
        records = list(webdataset.WebDataset(files, shardshuffle=False).decode())
        assert [record["__key__"] for record in records] == [f"{index:09d}" for index in range(shards.n_images)]
        assert {type(record["cls"]) for record in records} == {int}
        np.testing.assert_array_equal(np.stack([record["npy"] for record in records]), tokens)
        np.testing.assert_array_equal([record["cls"] for record in records], labels)
    gc.collect()


def test_shards_are_plain_ustar_without_time(tiny):
    first = (tiny / "train-000000.tar").read_bytes()
    assert first[257:263] == b"ustar\0"
    with tarfile.open(tiny / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:4]] == ["000000000.cls", "000000000.npy", "000000001.cls", "000000001.npy"]
    assert len(members) == 2 * 7
    assert {member.mtime for member in members} == {0}
    assert len({b.offset - a.offset for a, b in zip(members[::2], members[2::2], strict=False)}) == 1


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_excluded_images_are_left_out_and_the_others_move_up(tiny, data):
    whole = ShardSet(tiny, "train")
    tokens, labels = everything(whole)
    out = data.draw(st.sets(st.integers(0, whole.n_images - 1), max_size=whole.n_images - 1))
    kept = np.setdiff1d(np.arange(whole.n_images), list(out))
    shards = ShardSet(tiny, "train", exclude=np.array(sorted(out), dtype=np.int64))
    assert shards.n_images == len(kept)
    np.testing.assert_array_equal(everything(shards)[0], tokens[kept])
    np.testing.assert_array_equal(everything(shards)[1], labels[kept])
    assert (shards.dataset_hash == whole.dataset_hash) == (not out)


def test_all_images_excluded(tiny):
    n_images = ShardSet(tiny, "val").n_images
    with pytest.raises(ValueError, match=f"all {n_images} images of val in .* are excluded"):
        ShardSet(tiny, "val", exclude=np.arange(n_images))


def test_folding_validation_back(tiny):
    parts = [ShardSet(tiny, split) for split in ("train", "val")]
    both = ShardSet(tiny, "train+val")
    for of_both, of_parts in zip(everything(both), zip(*map(everything, parts), strict=True), strict=True):
        np.testing.assert_array_equal(of_both, np.concatenate(of_parts))
    assert len({shards.dataset_hash for shards in (*parts, both)}) == 3
    both.verify()


# --------------------------------------------------------------------------------------------------- refusals of the reader


def test_no_dataset_directory(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            ValueError, match=rf"{path} is no shard directory: it has no index.json; make one with tools/make_shards"
        ):
            ShardSet(path, "train")


@pytest.mark.parametrize("changes", [{"version": 1}, {"version": 4}, {"version": None}, {"format": "other"}])
def test_other_formats(damaged, changes):
    edit_index(damaged, **changes)
    with pytest.raises(
        ValueError, match=r"index.json is not igpt_ds.shards version 2 or 3: it is version .*; make the shards again"
    ):
        ShardSet(damaged, "train")


def test_version_2_is_read(damaged, tiny):
    splits = json.loads((damaged / "index.json").read_text())["splits"]
    for split in splits.values():
        for shard in split["shards"]:
            shard["blocks"] = ["0123abcd"]
    edit_index(damaged, version=2, splits=splits)
    for split in ("train", "val"):
        old, new = ShardSet(damaged, split), ShardSet(tiny, split)
        assert old.dataset_hash == new.dataset_hash
        for of_old, of_new in zip(everything(old), everything(new), strict=True):
            np.testing.assert_array_equal(of_old, of_new)
        old.verify()


def test_index_that_is_no_object(damaged):
    (damaged / "index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index.json has content \[\], which is not an object"):
        ShardSet(damaged, "train")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_change_of_the_index_is_seen(tiny, tmp_path_factory, data):
    index = json.loads((tiny / "index.json").read_text())
    place, key = index, data.draw(st.sampled_from(sorted(set(index) - {"format", "version"})))
    while isinstance(place[key], dict | list) and place[key]:
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place))) if isinstance(place, dict) else data.draw(st.integers(0, len(place) - 1))
    place[key] = data.draw(st.sampled_from([None, "other", 12345, [], -1]).filter(lambda value: value != place[key]))
    path = tmp_path_factory.mktemp("index")
    (path / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"index.json was changed since it was written: its sha256 differs; .*; make the shards again"
    ):
        read_index(path)


NEEDED = ("name", "n_px", "n_vocab", "palette", "palette_hash", "classes", "splits")
FIELDS = sorted(field.name for field in dataclasses.fields(ShardIndex))


def other_type(value):
    """A value of another JSON type."""
    return 0.5 if isinstance(value, str | int) and not isinstance(value, bool) else "other"


@pytest.mark.parametrize("name", FIELDS)
def test_an_index_without_a_field(damaged, name):
    index = json.loads((damaged / "index.json").read_text())
    index.pop(name, None)
    (damaged / "index.json").write_text(json.dumps(seal(index)))
    if name in NEEDED:
        with pytest.raises(ValueError, match=rf"{damaged}/index.json has no '{name}'; make the shards again"):
            read_index(damaged)
    else:
        assert getattr(read_index(damaged), name) is None
        ShardSet(damaged, "train").verify()


@pytest.mark.parametrize("name", FIELDS)
def test_an_index_with_a_field_of_another_type(damaged, name):
    value = other_type(json.loads((damaged / "index.json").read_text()).get(name))
    edit_index(damaged, **{name: value})
    with pytest.raises(
        ValueError, match=rf"{damaged}/index.json has {name} {value!r}, which is not an? .*; make the shards again"
    ):
        read_index(damaged)


@pytest.mark.parametrize(
    "name", ["n_images", "dataset_hash", "shards", "shards.name", "shards.n_images", "shards.bytes", "shards.sha256"]
)
def test_an_index_with_a_broken_split_or_shard(damaged, name):
    whole = json.loads((damaged / "index.json").read_text())["splits"]
    for broken in (None, 0.5):
        splits = json.loads(json.dumps(whole))
        outer, _, inner = name.rpartition(".")
        place = splits["val"]["shards"][1] if outer else splits["val"]
        if broken is None:
            del place[inner]
        else:
            place[inner] = broken
        edit_index(damaged, splits=splits)
        where = rf"splits\.val\.{outer}\[1\]\.{inner}" if outer else rf"splits\.val\.{inner}"
        told = f"has no '{where}'" if broken is None else f"has {where} 0.5, which is not an? "
        with pytest.raises(ValueError, match=f"index.json {told}.*; make the shards again"):
            read_index(damaged)


def test_what_is_written_is_read(tiny, tmp_path):
    index = read_index(tiny)
    for kept in (index, dataclasses.replace(index, source=None, derived={"keep": [0.5, {"n": 1}]})):
        write_index(tmp_path, kept)
        assert read_index(tmp_path) == kept


def test_unknown_split_names_those_that_exist(tiny):
    with pytest.raises(ValueError, match=r"shards has no split 'test'; it has train, val"):
        ShardSet(tiny, "test")


def test_other_palette(damaged):
    save_palette(damaged / "palette.npy", Palette(np.full((8, 3), -0.5, dtype=np.float32)))
    with pytest.raises(ValueError, match=r"palette.npy is not the palette that the shards were made with; make the shards again"):
        ShardSet(damaged, "train")


def test_torn_and_missing_shards(damaged):
    file = damaged / "train-000001.tar"
    size = file.stat().st_size
    with open(file, "r+b") as shard:
        shard.truncate(size - 512)
    with pytest.raises(
        ValueError, match=rf"{file} is missing or torn: {size - 512} bytes, expected {size}; make the shards again"
    ):
        ShardSet(damaged, "train")
    ShardSet(damaged, "val")  # the other split is whole
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file} is missing or torn: 0 bytes, expected {size}"):
        ShardSet(damaged, "train")


def test_shard_too_short_for_its_images(damaged):
    index = json.loads((damaged / "index.json").read_text())
    index["splits"]["train"]["shards"][0]["n_images"] = 1000
    edit_index(damaged, splits=index["splits"])
    with pytest.raises(ValueError, match=r"train-000000.tar holds \d+ bytes, but 1000 images take 2049024;"):
        ShardSet(damaged, "train")


def flip(file, offset, bits=0x41):
    """Changes one byte."""
    with open(file, "r+b") as shard:
        shard.seek(offset)
        byte = shard.read(1)
        shard.seek(offset)
        shard.write(bytes([byte[0] ^ bits]))


# A digit of image 3's label, a byte of its checksum, the first and the last byte of its tokens.
@pytest.mark.parametrize("offset", [512, 520, 1016, 1023, 1664, 1664 + 31])
def test_a_damaged_image_is_named_and_the_others_are_read(damaged, offset):
    flip(damaged / "train-000000.tar", 3 * 2048 + offset)
    shards = ShardSet(damaged, "train")
    shards.read(np.array([2, 4]))
    for read in (shards.tokens, shards.labels, shards.read):
        message = r"train-000000.tar: image 3 at byte 6144 is damaged; make the shards again .* by train.py --on_bad skip"
        for _ in range(2):
            with pytest.raises(DamagedImagesError, match=message) as caught:
                read(np.array([0, 3, 8, 3]))
            assert caught.value.ids.tolist() == [3, 3]
    assert shards.damaged_ids().tolist() == [3]


def test_damaged_images_are_named_by_the_ids_that_stay(damaged):
    flip(damaged / "train-000001.tar", 2 * 2048 + 1670)
    shards = ShardSet(damaged, "train", exclude=np.array([0, 4]))
    with pytest.raises(DamagedImagesError, match=r"train-000001.tar: image 2 at byte 4096") as caught:
        everything(shards)
    assert caught.value.ids.tolist() == shards.damaged_ids().tolist() == [7 + 2 - 2]


def test_verify_names_the_damaged_bytes(damaged):
    flip(damaged / "val-000000.tar", 2048 + 1664)
    with pytest.raises(ValueError, match=r"val-000000.tar: bytes 2048 to 4095 are damaged: image 1 of this shard; make"):
        ShardSet(damaged, "val").verify()
    ShardSet(damaged, "train").verify()


def test_no_ids(tiny):
    tokens, labels = ShardSet(tiny, "train").read(np.zeros(0, dtype=np.int64))
    assert (tokens.shape, tokens.dtype, labels.shape) == ((0, 4, 4), np.uint16, (0,))


def test_read_index(tiny):
    assert read_index(tiny).n_px == 4
