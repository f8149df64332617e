"""What is written is what is read, by us and by plain webdataset; anything else is refused by name."""

import gc
import hashlib
import json
import shutil
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_ds.data.images import fit_to_square
from igpt_ds.data.palette import Palette, save_palette
from igpt_ds.data.shards import ShardSet, split_of, write_dataset
from igpt_ds.data.sources import ImageFolder, open_source


def everything(shards):
    ids = np.arange(shards.n_images)
    return shards.tokens(ids), shards.labels(ids)


@pytest.fixture
def damaged(tiny, tmp_path):
    """A copy of the tiny dataset to break."""
    return shutil.copytree(tiny, tmp_path / "damaged")


def edit_index(path, **changes):
    index = json.loads((path / "index.json").read_text()) | changes
    (path / "index.json").write_text(json.dumps(index))


# --------------------------------------------------------------------------------------------------- round trip


def test_every_image_is_there_once_in_its_split(tiny, memory, palette8):
    expected = {"train": [], "val": []}
    for key, image, label in memory(40):
        expected[split_of(key, 0, 0.3)].append((palette8.encode(image), label))
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
    records = {key: (image, label) for key, image, label in open_source("digits:")}
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


def test_index_tells_what_a_reader_must_know(tiny, palette8):
    index = json.loads((tiny / "index.json").read_text())
    splits = index.pop("splits")
    assert index == {
        "format": "igpt_ds.shards",
        "version": 1,
        "name": tiny.name,
        "n_px": 4,
        "n_vocab": 8,
        "palette": "palette.npy",
        "palette_hash": palette8.hash,
        "filter": "bicubic",
        "source": "memory:",
        "seed": 0,
        "val_fraction": 0.3,
        "n_skipped": 0,
        "classes": ["cat", "dog", "owl"],
    }
    assert sorted(splits) == ["train", "val"]
    named = [shard["name"] for split in splits.values() for shard in split["shards"]]
    assert sorted([*named, "index.json", "palette.npy"]) == sorted(file.name for file in tiny.iterdir())
    for split in splits.values():
        assert [shard["n_images"] for shard in split["shards"][:-1]] == [7] * (len(split["shards"]) - 1)
        assert sum(shard["n_images"] for shard in split["shards"]) == split["n_images"]
        for shard in split["shards"]:
            content = (tiny / shard["name"]).read_bytes()
            assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_same_input_same_bytes(tmp_path, memory, palette8, tiny):
    write_dataset(tmp_path / "again", memory(40), palette8, 4, val_fraction=0.3, images_per_shard=7, name=tiny.name)
    for file in tiny.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_dataset_hash_is_of_the_images_not_of_the_files(tmp_path, memory, palette8, tiny):
    other_size = write_dataset(tmp_path / "a", memory(40), palette8, 4, val_fraction=0.3, images_per_shard=100)
    other_images = write_dataset(tmp_path / "b", memory(40, seed=1), palette8, 4, val_fraction=0.3)
    shards = ShardSet(tiny, "train")
    assert other_size["splits"]["train"]["dataset_hash"] == shards.dataset_hash
    assert other_images["splits"]["train"]["dataset_hash"] != shards.dataset_hash != ShardSet(tiny, "val").dataset_hash


def test_large_images_are_squared_and_skipped_ones_counted(tmp_path, image_folder, palette8):
    source = image_folder({"cat": 8, "dog": 8}, max_bad_fraction=0.1)
    (tmp_path / "raw" / "dog" / "2.png").write_bytes(b"broken")
    index = write_dataset(tmp_path / "out", source, palette8, 3, val_fraction=0, resize_filter="box")
    assert (index["filter"], index["n_skipped"], list(index["splits"])) == ("box", 1, ["train"])
    tokens, labels = everything(ShardSet(tmp_path / "out", "train"))
    expected = [palette8.encode(fit_to_square(image, 3, "box")) for _, image, _ in ImageFolder(tmp_path / "raw", 0.1)]
    np.testing.assert_array_equal(tokens, np.stack(expected))
    assert labels.tolist() == [0] * 8 + [1] * 7


def test_tokens_and_labels_of_the_widest_kind(tmp_path, memory):
    """65,536 colours and a thousand classes: nothing overflows, records keep their length."""
    grey = np.linspace(-1, 1, 65536, dtype=np.float32)
    palette = Palette(np.stack([grey, grey, grey], axis=1))
    source = memory(1001, n_px=1)
    source.classes = [f"class{index}" for index in range(1000)]
    write_dataset(tmp_path / "wide", source, palette, 1, val_fraction=0)
    tokens, labels = everything(ShardSet(tmp_path / "wide", "train"))
    np.testing.assert_array_equal(labels, np.arange(1001) % 1000)
    np.testing.assert_array_equal(tokens, palette.encode(source.images))
    assert tokens.max() > 60000


# --------------------------------------------------------------------------------------------------- the split


def test_split_is_a_stable_property_of_the_key():
    keys = [f"class/{index}.jpg" for index in range(20_000)]
    val = [key for key in keys if split_of(key, 0, 0.1) == "val"]
    assert abs(len(val) - 2000) < 4 * np.sqrt(2000 * 0.9)
    assert val[:5] == [f"class/{index}.jpg" for index in (0, 5, 31, 39, 62)]
    larger = {key for key in keys if split_of(key, 0, 0.2) == "val"}
    assert set(val) < larger
    other_seed = {key for key in keys if split_of(key, 1, 0.1) == "val"}
    assert len(other_seed & set(val)) < 300  # a tenth of a tenth
    assert {split_of(key, 0, 0) for key in keys} == {"train"}
    assert split_of("odd\udce9name.jpg", 0, 0.5) in ("train", "val")  # a file name that is not UTF-8


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5])
def test_impossible_val_fraction_is_refused(tmp_path, memory, palette8, fraction):
    with pytest.raises(ValueError, match=f"val_fraction={fraction} must be at least 0 and below 1"):
        write_dataset(tmp_path / "out", memory(4), palette8, 4, val_fraction=fraction)


def test_an_empty_split_is_refused_and_leaves_nothing(tmp_path, memory, palette8):
    with pytest.raises(ValueError, match=r"none of the 4 images of memory: falls to val; change val_fraction=1e-09"):
        write_dataset(tmp_path / "out", memory(4), palette8, 4, val_fraction=1e-9)
    with pytest.raises(ValueError, match=r"none of the 0 images of memory: falls to train"):
        write_dataset(tmp_path / "out", memory(0), palette8, 4)
    assert not list(tmp_path.iterdir())


def test_impossible_shard_size_is_refused(tmp_path, memory, palette8):
    with pytest.raises(ValueError, match="images_per_shard=0 must be at least 1"):
        write_dataset(tmp_path / "out", memory(4), palette8, 4, images_per_shard=0)


def test_existing_directory_is_refused(tiny, memory, palette8):
    with pytest.raises(ValueError, match=rf"{tiny} exists already"):
        write_dataset(tiny, memory(40), palette8, 4)


def test_a_failing_source_leaves_nothing(tmp_path, image_folder, palette8):
    source = image_folder({"cat": 8})
    (tmp_path / "raw" / "cat" / "7.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="1 unreadable"):
        write_dataset(tmp_path / "out", source, palette8, 3, images_per_shard=2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


# --------------------------------------------------------------------------------------------------- refusals of the reader


def test_no_dataset_directory(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            ValueError, match=rf"{path} is no shard directory: it has no index.json; make one with tools/make_shards"
        ):
            ShardSet(path, "train")


@pytest.mark.parametrize("changes", [{"version": 2}, {"format": "other"}])
def test_other_formats(damaged, changes):
    edit_index(damaged, **changes)
    with pytest.raises(ValueError, match=r"index.json is not igpt_ds.shards version 1; make the shards again"):
        ShardSet(damaged, "train")


def test_index_that_is_no_object(damaged):
    (damaged / "index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index.json is not igpt_ds.shards version 1"):
        ShardSet(damaged, "train")


def test_damaged_index(damaged):
    edit_index(damaged, splits={"train": {}})
    with pytest.raises(ValueError, match=r"index.json is damaged \(KeyError: .*\); make the shards again"):
        ShardSet(damaged, "train")


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
    with pytest.raises(ValueError, match=r"train-000000.tar is missing or torn: \d+ bytes, expected 2048000;"):
        ShardSet(damaged, "train")


# Names and preambles of image 3's two members, its label, and the upper byte of its first token, which no palette has.
@pytest.mark.parametrize("offset", [0, 8, 11, 512, 1024, 1032, 1034, 1536, 1600, 1665])
def test_an_image_at_the_wrong_place(damaged, offset):
    place = 3 * 2048 + offset
    with open(damaged / "train-000000.tar", "r+b") as shard:
        shard.seek(place)
        byte = shard.read(1)
        shard.seek(place)
        shard.write(bytes([byte[0] ^ 0x41]))
    shards = ShardSet(damaged, "train")
    shards.tokens(np.array([2, 4]))
    for read in (shards.tokens, shards.labels):
        message = r"train-000000.tar: byte 6144 does not hold image 3 of train; make the shards again with tools/make_shards.py"
        with pytest.raises(ValueError, match=message):
            read(np.array([0, 3, 8]))


def test_verify_finds_a_changed_pixel(damaged):
    with open(damaged / "val-000000.tar", "r+b") as shard:
        shard.seek(1664)
        shard.write(b"\x07")
    shards = ShardSet(damaged, "val")
    shards.tokens(np.arange(shards.n_images))
    with pytest.raises(ValueError, match=r"val-000000.tar has changed since it was written: .*; make the shards again"):
        shards.verify()
