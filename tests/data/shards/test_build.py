"""A dataset directory is the same bytes however it was made: at once, by parts, by many processes, or after being killed."""

import dataclasses
import hashlib
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from igpt_ds.data.images import square
from igpt_ds.data.left_out import LeftOut
from igpt_ds.data.palette import Palette, save_palette
from igpt_ds.data.shards import build, merge
from igpt_ds.data.shards.build import copy_images, list_images, write_dataset, write_shards
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.index import read_index
from igpt_ds.data.shards.layout import PLAN, Part, ShardOptions, ShardPlan, ShardSettings, make_plan, split_of
from igpt_ds.data.shards.merge import finish_begun, making, merge_shards
from igpt_ds.data.sources import open_source
from igpt_ds.json_files import seal


def everything(path, split="train"):
    shards = ShardSet(path, split)
    return shards.read(np.arange(shards.n_images))


def same(one, other):
    """The same files with the same bytes."""
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in other.iterdir())
    for file in one.iterdir():
        assert (other / file.name).read_bytes() == file.read_bytes(), file.name


# --------------------------------------------------------------------------------------------------- what is written


def test_index_tells_what_a_reader_must_know(tiny, palette8):
    index = json.loads((tiny / "index.json").read_text())
    assert index == seal(index)
    del index["sha256"]
    splits = index.pop("splits")
    assert set(index.pop("made_with")) == {"numpy", "pillow", "simplejpeg", "torch"}
    assert len(index.pop("source_hash")) == 64
    assert index == {
        "format": "igpt_ds.shards",
        "version": 3,
        "name": tiny.name,
        "n_px": 4,
        "n_vocab": 8,
        "palette": "palette.npy",
        "palette_hash": palette8.hash,
        "source": "memory:",
        "labels": "use",
        "filter": "bicubic",
        "crop": "none",
        "views": 1,
        "seed": 0,
        "val_fraction": 0.3,
        "images_per_shard": 7,
        "n_unreadable": 0,
        "classes": ["cat", "dog", "owl"],
    }
    assert list(splits) == ["train", "val"]
    named = [shard["name"] for split in splits.values() for shard in split["shards"]]
    keys = [f"{split}-keys.jsonl" for split in splits]
    assert sorted([*named, *keys, "index.json", "palette.npy"]) == sorted(file.name for file in tiny.iterdir())
    for split in splits.values():
        assert [shard["n_images"] for shard in split["shards"][:-1]] == [7] * (len(split["shards"]) - 1)
        assert sum(shard["n_images"] for shard in split["shards"]) == split["n_images"]
        for shard in split["shards"]:
            content = (tiny / shard["name"]).read_bytes()
            assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_the_fraction_for_validation_is_the_source_s_own(tmp_path, memory, palette8):
    index = write_dataset(tmp_path / "out", memory(400, val_fraction=0.5), palette8, ShardOptions(4))
    assert index.val_fraction == 0.5
    assert 150 < index.splits["val"].n_images < 250


def test_test_images_are_never_trained_on(tmp_path, memory, palette8):
    source = memory(60, n_test=20)
    write_dataset(tmp_path / "out", source, palette8, ShardOptions(4, val_fraction=0.25))
    tokens, labels = everything(tmp_path / "out", "test")
    np.testing.assert_array_equal(tokens, palette8.encode(source.images[40:]))
    np.testing.assert_array_equal(labels, np.arange(40, 60) % 3)
    assert len(everything(tmp_path / "out", "train+val")[1]) == 40


def test_dataset_hash_tells_images_apart(tmp_path, memory, palette8, tiny):
    other = write_dataset(tmp_path / "b", memory(40, seed=1), palette8, ShardOptions(4, val_fraction=0.3, images_per_shard=7))
    shards = ShardSet(tiny, "train")
    assert other.splits["train"].dataset_hash != shards.dataset_hash != ShardSet(tiny, "val").dataset_hash


def test_large_images_are_squared_and_unreadable_ones_counted(tmp_path, folder, palette8, capsys):
    raw = folder({"cat": 8, "dog": 8})
    (raw / "dog" / "2.png").write_bytes(b"broken")
    source = open_source(f"imagefolder:{raw}")
    index = write_dataset(tmp_path / "out", source, palette8, ShardOptions(3, val_fraction=0, filter="box"), max_bad=0.1)
    assert (index.filter, index.n_unreadable, list(index.splits)) == ("box", 1, ["train"])
    assert "skipped: dog/2.png cannot be read as an image" in capsys.readouterr().err
    tokens, labels = everything(tmp_path / "out")
    files = [file for file in sorted(raw.rglob("*.png")) if file.name != "2.png" or file.parent.name == "cat"]
    expected = [palette8.encode(square(np.asarray(Image.open(file)), 3, resize_filter="box")) for file in files]
    np.testing.assert_array_equal(tokens, np.stack(expected))
    assert labels.tolist() == [0] * 8 + [1] * 7


def test_what_is_left_out_is_in_the_index(tmp_path, folder, palette8):
    raw = folder({"cat": 6, "dog": 2, "owl": 1, "emu/deep": 1})
    (raw / "loose.png").write_bytes((raw / "cat/0.png").read_bytes())
    (raw / "owl/0.png").rename(raw / "owl/0.HEIC")
    (raw / "owl/0.HEIC").write_bytes(b"")
    (raw / "dog/notes.txt").write_text("-")
    source = open_source(f"imagefolder:{raw}")
    with pytest.raises(
        ValueError, match=r"2 left out, more than the 0.15 of 11 .*loose.png.*emu/deep/0.png.*move them into class"
    ):
        write_dataset(tmp_path / "out", source, palette8, ShardOptions(3, val_fraction=0), max_bad=0.15)
    assert not making(tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"1 unreadable and 2 left out, more than the 0.2 of 11 images .*owl/0.HEIC"):
        write_dataset(tmp_path / "out", source, palette8, ShardOptions(3, val_fraction=0), max_bad=0.2)
    index = write_dataset(tmp_path / "out", source, palette8, ShardOptions(3, val_fraction=0), max_bad=0.3)
    assert read_index(tmp_path / "out") == index
    assert index.left_out == [
        LeftOut(".heic", "empty", 1, ["owl/0.HEIC"], True),
        LeftOut(".png", "beside the class folders", 1, ["loose.png"], True),
        LeftOut(".png", "deeper than a class folder", 1, ["emu/deep/0.png"], True),
        LeftOut("", "classes without images", 2, ["emu", "owl"], False),
        LeftOut(".txt", "not images by name", 1, ["dog/notes.txt"], False),
    ]


def test_ignored_labels_and_large_images_belong_to_the_settings(tmp_path, folder, palette8):
    raw = folder({"cat": 3, "dog/deep": 3})
    source = open_source(f"imagefolder:{raw}", "ignore")
    with pytest.raises(ValueError, match=r"its 6 x 5 pixels are more than 29, .*set --max_pixels"):
        write_dataset(tmp_path / "out", source, palette8, ShardOptions(3, val_fraction=0, max_pixels=29))
    with pytest.raises(
        ValueError,
        match=r"begun with other settings \(labels 'ignore', now 'use'; max_pixels 29, now None\)|"
        r"begun with other settings \(max_pixels 29, now None; labels 'ignore', now 'use'\)",
    ):
        write_dataset(tmp_path / "out", open_source(f"imagefolder:{raw}"), palette8, ShardOptions(3, val_fraction=0))
    index = write_dataset(tmp_path / "other", source, palette8, ShardOptions(3, val_fraction=0, max_pixels=30))
    assert (index.splits["train"].n_images, index.classes, index.max_pixels) == (6, ["unlabelled"], 30)


def test_tokens_and_labels_of_the_widest_kind(tmp_path, memory):
    """65,536 colours and a thousand classes: nothing overflows, records keep their length."""
    grey = np.linspace(-1, 1, 65536, dtype=np.float32)
    palette = Palette(np.stack([grey, grey, grey], axis=1))
    source = memory(1001, n_px=1)
    source.classes = [f"class{index}" for index in range(1000)]
    write_dataset(tmp_path / "wide", source, palette, ShardOptions(1, val_fraction=0))
    tokens, labels = everything(tmp_path / "wide")
    np.testing.assert_array_equal(labels, np.arange(1001) % 1000)
    np.testing.assert_array_equal(tokens, palette.encode(source.images))
    assert tokens.max() > 60000


def test_views_are_random_crops_of_training_images_alone(tmp_path, memory, palette8):
    source = memory(12, n_px=20, n_test=2)
    index = write_dataset(
        tmp_path / "out", source, palette8, ShardOptions(4, val_fraction=0.3, crop="random", views=3, images_per_shard=7)
    )
    keys = [f"image{number}" for number in range(10)]
    train = [number for number in range(10) if split_of(keys[number], 0, 0.3) == "train"]
    val = [number for number in range(10) if number not in train]
    tokens, labels = everything(tmp_path / "out")
    how = {"crop": "random", "seed": 0}
    expected = [square(source.images[n], 4, **how, key=keys[n], view=view) for n in train for view in range(3)]
    np.testing.assert_array_equal(tokens, palette8.encode(np.stack(expected)))
    np.testing.assert_array_equal(labels, np.repeat(np.array(train) % 3, 3))
    assert [shard.n_images for shard in index.splits["train"].shards[:-1]] == [6] * (-(-len(train) // 2) - 1)
    for split, numbers in (("val", val), ("test", [10, 11])):
        central = np.stack([square(source.images[number], 4, crop="center") for number in numbers])
        np.testing.assert_array_equal(everything(tmp_path / "out", split)[0], palette8.encode(central))


# --------------------------------------------------------------------------------------------------- the same bytes


def test_same_input_same_bytes(tmp_path, memory, palette8, tiny):
    write_dataset(tmp_path / "again", memory(40), palette8, ShardOptions(4, val_fraction=0.3, images_per_shard=7), name=tiny.name)
    same(tiny, tmp_path / "again")


def test_worker_processes_change_nothing(tmp_path, folder, palette8, monkeypatch):
    monkeypatch.setattr(build, "IMAGES_PER_PROCESS", 1)
    source = open_source(f"imagefolder:{folder({'cat': 30, 'dog': 30})}")
    for name, workers in (("one", 1), ("two", 2)):
        write_dataset(tmp_path / name, source, palette8, ShardOptions(3, images_per_shard=20), workers=workers, name="same")
    same(tmp_path / "one", tmp_path / "two")


@settings(max_examples=20, deadline=None)
@given(n_parts=st.integers(1, 8), order=st.randoms(use_true_random=False), bad=st.sets(st.integers(0, 39), max_size=10))
def test_parts_in_any_order_make_what_one_run_makes(tmp_path_factory, memory, palette8, n_parts, order, bad):
    path = tmp_path_factory.mktemp("parts")
    source = memory(40, unreadable=tuple(bad))
    write_dataset(path / "one", source, palette8, ShardOptions(4, val_fraction=0.3, images_per_shard=7), name="same", max_bad=1)
    options = ShardOptions(4, 0.3, 7).settings(source, palette8)
    parts = list(range(n_parts))
    order.shuffle(parts)
    for part in parts:
        list_images(path / "many", source, palette8, options)
        write_shards(path / "many", source, part=Part(part, n_parts), max_bad=1)
    merge_shards(path / "many", "same", max_bad=1)
    same(path / "one", path / "many")
    tokens, _ = everything(path / "one")
    kept = [n for n in range(40) if n not in bad and split_of(f"image{n}", 0, 0.3) == "train"]
    np.testing.assert_array_equal(tokens, palette8.encode(source.images[kept]))


def test_a_whole_shard_of_unreadable_images_is_left_out(tmp_path, memory, palette8):
    index = write_dataset(
        tmp_path / "out",
        memory(12, unreadable=(4, 5, 6, 7)),
        palette8,
        ShardOptions(4, val_fraction=0, images_per_shard=4),
        max_bad=1,
    )
    assert [shard.name for shard in index.splits["train"].shards] == ["train-000000.tar", "train-000002.tar"]
    assert sorted(file.name for file in (tmp_path / "out").glob("*.tar")) == ["train-000000.tar", "train-000002.tar"]
    assert ShardSet(tmp_path / "out", "train").n_images == 8


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path, folder, launch):
    """SIGKILL in the middle; the same command finishes with the same bytes, and makes no shard twice."""
    raw = folder({"cat": 300, "dog": 300})
    save_palette(tmp_path / "palette.npy", Palette(np.array([[-1, -1, -1], [1, 1, 1]], dtype=np.float32)))
    command = ["tools/make_shards.py", "--source", f"imagefolder:{raw}", "--palette", tmp_path / "palette.npy", "--n_px", "3"]
    command += ["--images_per_shard", "20", "--name", "same", "--workers", "1"]
    assert launch([*command, "--out", tmp_path / "whole"]).returncode == 0
    killed = launch.start([*command, "--out", tmp_path / "out"])
    while killed.poll() is None and not list(making(tmp_path / "out").glob("train-000003.tar.json")):
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "out").exists(), "it was killed too late to show anything"
    times = {file.name: file.stat().st_mtime_ns for file in making(tmp_path / "out").glob("*.tar")}
    assert len(times) >= 4
    assert launch([*command, "--out", tmp_path / "out"]).returncode == 0
    same(tmp_path / "whole", tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times} == times


def test_a_worker_process_that_dies_is_told_and_the_run_goes_on(tmp_path, folder, launch):
    """SIGKILL for a worker, as a machine without memory does it."""
    raw = folder({"cat": 1100, "dog": 1100})
    save_palette(tmp_path / "palette.npy", Palette(np.array([[-1, -1, -1], [1, 1, 1]], dtype=np.float32)))
    command = ["tools/make_shards.py", "--source", f"imagefolder:{raw}", "--palette", tmp_path / "palette.npy", "--n_px", "3"]
    command += ["--workers", "2", "--out", tmp_path / "out"]
    process = launch.start(command)
    workers = []
    while process.poll() is None and not workers:  # children of the fork server, which is a child of the tool
        family = psutil.Process(process.pid).children(recursive=True)
        workers = [member for member in family if member.ppid() != process.pid]
    workers[0].kill()
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "make_shards.py: error: one of 2 worker processes died; run the same command again; if memory" in stderr
    assert launch([*command, "--workers", "1"]).returncode == 0


def test_copied_images_are_the_ones_asked_for(tmp_path, tiny):
    whole = ShardSet(tiny, "train")
    ids = np.random.default_rng(0).permutation(whole.n_images)[:11]
    index = copy_images(tmp_path / "some", whole, ids, name="some", note={"kept": 11})
    assert (index.name, index.derived, list(index.splits)) == ("some", {"kept": 11}, ["train"])
    for found, expected in zip(everything(tmp_path / "some"), whole.read(ids), strict=True):
        np.testing.assert_array_equal(found, expected)
    some = ShardSet(tmp_path / "some", "train")
    some.verify()
    assert some.keys_of(np.arange(11)) == whole.keys_of(ids)


def test_keys_name_the_images_of_the_rows(tmp_path, memory, palette8):
    source = memory(60, n_test=20, unreadable=(3, 50))
    write_dataset(tmp_path / "out", source, palette8, ShardOptions(4, val_fraction=0.25, images_per_shard=7), max_bad=0.1)
    for split in ("train", "val", "test", "train+val"):
        shards = ShardSet(tmp_path / "out", split, exclude=np.array([0, 4]))
        tokens, keys = shards.tokens(np.arange(shards.n_images)), shards.keys_of(np.arange(shards.n_images))
        numbers = [int(key.removeprefix("image")) for key in keys]
        np.testing.assert_array_equal(tokens, palette8.encode(source.images[numbers]))
    ids = np.arange(60 - 20 - 1)
    assert len(set(ShardSet(tmp_path / "out", "train+val").keys_of(ids))) == len(ids)


def test_all_crops_of_an_image_have_its_key(tmp_path, folder, palette8):
    source = open_source(f"imagefolder:{folder({'cat': 5, 'dog': 5})}")
    write_dataset(tmp_path / "out", source, palette8, ShardOptions(4, val_fraction=0.3, crop="random", views=3))
    keys = ShardSet(tmp_path / "out", "train").keys_of(np.arange(6))
    assert keys[:3] == [keys[0]] * 3
    assert keys[3:] == [keys[3]] * 3
    assert keys[0] != keys[3]


def test_shards_of_older_versions_have_no_keys(tmp_path, tiny):
    old = shutil.copytree(tiny, tmp_path / "old")
    index = json.loads((old / "index.json").read_text())
    for split in index["splits"].values():
        del split["keys"]
    (old / "index.json").write_text(json.dumps(seal(index)))
    for file in old.glob("*-keys.jsonl"):
        file.unlink()
    assert ShardSet(old, "train").keys_of(np.arange(2)) is None
    assert ShardSet(old, "train").dataset_hash == ShardSet(tiny, "train").dataset_hash
    copied = copy_images(tmp_path / "some", ShardSet(old, "train"), np.arange(2), note={})
    assert copied.splits["train"].keys is None


def test_nothing_to_copy(tmp_path, tiny):
    with pytest.raises(ValueError, match=r"no images of .* are left to write to .*some"):
        copy_images(tmp_path / "some", ShardSet(tiny, "train"), np.zeros(0, dtype=np.int64), note={})
    assert not list(tmp_path.iterdir())


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


@settings(max_examples=30, deadline=None)
@given(present=st.sets(st.integers(0, 59), min_size=20))
def test_the_split_of_an_image_does_not_depend_on_the_others(tmp_path_factory, memory, present):
    path = tmp_path_factory.mktemp("plan")
    source = memory(60)
    everybody = list(source.entries())
    source.entries = lambda: iter([everybody[number] for number in sorted(present)])
    make_plan(
        path / "plan", source, ShardSettings(n_px=4, val_fraction=0.4, images_per_shard=7, source="memory:", palette_hash="")
    )
    found = {entry.key: shard.split for shard in ShardPlan(path / "plan").shards() for entry in shard.entries()}
    assert found == {f"image{number}": split_of(f"image{number}", 0, 0.4) for number in present}


def test_equal_files_are_in_one_split(tmp_path, folder, palette8):
    raw = folder({"cat": 60, "dog": 60})
    for number in range(60):
        shutil.copy(raw / "cat" / f"{number}.png", raw / "dog" / f"copy of {number}.png")
    source = open_source(f"imagefolder:{raw}")
    index = write_dataset(tmp_path / "out", source, palette8, ShardOptions(4, val_fraction=0.3, test_fraction=0.2))
    assert index.test_fraction == 0.2
    found = {}
    for split in index.splits:
        shards = ShardSet(tmp_path / "out", split)
        found |= dict.fromkeys(shards.keys_of(np.arange(shards.n_images)), split)
    assert {split: list(found.values()).count(split) for split in ("train", "val", "test")} == {
        "train": 101,
        "val": 29,
        "test": 50,
    }
    assert len(found) == 180
    assert all(found[f"cat/{number}.png"] == found[f"dog/copy of {number}.png"] for number in range(60))
    (raw / "cat" / "0.png").rename(raw / "cat" / "zzz.png")
    make_plan(tmp_path / "plan", source, ShardOptions(4, test_fraction=0.2).settings(source, palette8))
    split = next(s.split for s in ShardPlan(tmp_path / "plan").shards() for e in s.entries() if e.key == "cat/zzz.png")
    assert (split == "test") == (found["cat/0.png"] == "test"), "the name does not choose"


@pytest.mark.parametrize("seed", [2, 3])
def test_a_test_split_of_equal_files_names_its_fractions(tmp_path, palette8, folder, seed):
    raw = folder({"cat": 1})
    for number in range(4):
        shutil.copy(raw / "cat" / "0.png", raw / "cat" / f"copy{number}.png")
    chosen = ShardOptions(4, val_fraction=0, test_fraction=0.5, seed=seed)
    with pytest.raises(ValueError, match=r"none of the 5 images of .*change test_fraction=0.5 or the seed; equal files are in"):
        write_dataset(tmp_path / "out", open_source(f"imagefolder:{raw}"), palette8, chosen)


def test_splits_that_the_source_has_are_not_drawn(tmp_path, memory, palette8, folder):
    with pytest.raises(ValueError, match=r"memory: has test images of its own, such as image40; leave out --test_fraction 0.2"):
        write_dataset(tmp_path / "out", memory(60, n_test=20), palette8, ShardOptions(4, test_fraction=0.2))
    with pytest.raises(ValueError, match=r"none of the 60 images of memory: falls to test; change test_fraction=1e-09"):
        write_dataset(tmp_path / "out", memory(60), palette8, ShardOptions(4, test_fraction=1e-9))
    source = open_source(f"imagefolder:{folder({'train/cat': 4, 'val/cat': 3, 'test/cat': 2})}")
    with pytest.raises(ValueError, match=r"has validation images of its own, such as val/.*; leave out --val_fraction 0.1"):
        write_dataset(tmp_path / "out", source, palette8, ShardOptions(4, val_fraction=0.1))
    index = write_dataset(tmp_path / "out", source, palette8, ShardOptions(4))
    assert {split: about.n_images for split, about in index.splits.items()} == {"train": 4, "val": 3, "test": 2}
    assert ShardSet(tmp_path / "out", "val").keys_of(np.arange(1)) == ["val/cat/0.png"]


# --------------------------------------------------------------------------------------------------- refusals


def options(**changes):
    standard = {"source": "memory:", "palette_hash": "", "n_px": 4, "val_fraction": 0.1, "images_per_shard": 7, "seed": 0}
    return standard | {"filter": "bicubic", "crop": "none", "views": 1} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_fraction": -0.1}, "val_fraction=-0.1 must be at least 0 and below 1"),
        ({"val_fraction": 1}, "val_fraction=1 must be at least 0 and below 1"),
        ({"images_per_shard": 0}, "images_per_shard=0 must be at least 1"),
        ({"n_px": 0}, "n_px=0 must be at least 1"),
        ({"n_px": 1025}, "n_px=1025 must be at most 1024"),
        ({"max_pixels": 0}, "max_pixels=0 must be at least 1"),
        ({"views": 0}, "views=0 must be at least 1"),
        ({"filter": "sinc"}, "filter 'sinc' is unknown; known: "),
        ({"crop": "left"}, "crop 'left' is unknown; known: none, center, random"),
        ({"views": 2}, "views=2 of one image differ with crop 'random' only, not 'none'"),
        ({"views": 8, "crop": "random"}, "views=8 do not fit images_per_shard=7"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        ShardSettings(**options(**changes))


def test_an_empty_split_is_refused_and_leaves_nothing(tmp_path, memory, palette8):
    with pytest.raises(ValueError, match=r"none of the 4 images of memory: falls to val; change val_fraction=1e-09"):
        write_dataset(tmp_path / "out", memory(4), palette8, ShardOptions(4, val_fraction=1e-9))
    with pytest.raises(ValueError, match=r"source memory: holds no training images"):
        write_dataset(tmp_path / "out", memory(0), palette8, ShardOptions(4))
    assert not list(tmp_path.iterdir())


def test_more_images_than_names(tmp_path, memory, palette8):
    settings_ = ShardSettings(**options(views=10**9 // 4, crop="random", images_per_shard=10**9, val_fraction=0))
    with pytest.raises(ValueError, match="train would have 4 images x 250000000 views; at most 999999999"):
        make_plan(tmp_path / "plan", memory(4), settings_)


def test_existing_directory_is_refused(tiny, memory, palette8):
    with pytest.raises(ValueError, match=rf"{tiny} exists already"):
        write_dataset(tiny, memory(40), palette8, ShardOptions(4))


def test_other_settings_than_begun_with(tmp_path, memory, palette8):
    list_images(tmp_path / "out", memory(40), palette8, ShardSettings(**options(palette_hash=palette8.hash)))
    with pytest.raises(ValueError, match=r"out.making was begun with other settings \(seed 0, now 1\); continue with those, or"):
        list_images(tmp_path / "out", memory(40), palette8, ShardSettings(**options(palette_hash=palette8.hash, seed=1)))


def test_too_many_unreadable_images_stop_and_can_be_repaired(tmp_path, folder, palette8):
    raw = folder({"cat": 8})
    whole = (raw / "cat" / "7.png").read_bytes()
    (raw / "cat" / "7.png").write_bytes(b"broken")
    source = open_source(f"imagefolder:{raw}")
    message = r"imagefolder:.*: 1 unreadable, more than the 0.001 of 8 images that --max_bad allows: cat/7.png .*; repair"
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "out", source, palette8, ShardOptions(3, images_per_shard=2))
    assert not (tmp_path / "out").exists()
    (raw / "cat" / "7.png").write_bytes(whole)
    assert write_dataset(tmp_path / "out", source, palette8, ShardOptions(3, images_per_shard=2)).n_unreadable == 0
    assert not making(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "workers=0 must be at least 1"),
        ({"max_bad": 1.5}, "max_bad=1.5 must lie between 0 and 1"),
        ({"part": Part(3, 3)}, "part 3/3 does not exist; the first of n is 0/n, the last n-1/n"),
        ({"part": Part(-1, 3)}, "part -1/3 does not exist"),
    ],
)
def test_impossible_work(tmp_path, memory, palette8, changes, message):
    list_images(tmp_path / "out", memory(40), palette8, ShardSettings(**options(palette_hash=palette8.hash)))
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path / "out", memory(40), **changes)


def test_merging_too_early(tmp_path, memory, palette8):
    list_images(tmp_path / "out", memory(40), palette8, ShardSettings(**options(palette_hash=palette8.hash)))
    write_shards(tmp_path / "out", memory(40), part=Part(0, 2))
    with pytest.raises(ValueError, match=r"out.making: 3 of 6 shards are missing, the first train-000001.tar; make them first"):
        merge_shards(tmp_path / "out")


@pytest.fixture
def begun(tmp_path, memory, palette8):
    """A dataset of 40 images of which the first of two parts is made."""
    list_images(tmp_path / "out", memory(40), palette8, ShardSettings(**options(palette_hash=palette8.hash)))
    write_shards(tmp_path / "out", memory(40), part=Part(0, 2))
    return making(tmp_path / "out")


@pytest.mark.parametrize("change", [lambda lines: lines[:-1], lambda lines: lines[:-1] + lines[:1], lambda lines: ["{"]])
def test_a_damaged_list_of_images(begun, memory, change):
    file = begun / "plan" / "train-000001.jsonl"
    file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")
    with pytest.raises(ValueError, match=rf"{file} is damaged; remove {begun} and begin again"):
        write_shards(begun.with_suffix(""), memory(40))


def test_a_damaged_palette_of_a_begun_dataset(begun, memory, palette8):
    colors = palette8.colors.copy()
    colors[3, 1] = 0.25
    save_palette(begun / "palette.npy", Palette(colors))
    with pytest.raises(ValueError, match=rf"{begun}/palette.npy is not the palette of {begun}/plan; remove {begun} and begin"):
        list_images(begun.with_suffix(""), memory(40), palette8, ShardSettings(**options(palette_hash=palette8.hash)))


@pytest.mark.parametrize("content", ["{}", "[]", '{"shard": {}, "unreadable": [], "sha256": ""}'])
def test_a_damaged_entry_of_a_shard(begun, memory, content):
    file = begun / "train-000000.tar.json"
    file.write_text(content)
    with pytest.raises(
        ValueError, match=rf"entry of a shard {file} .*; remove it and run the same command again, which makes the"
    ):
        write_shards(begun.with_suffix(""), memory(40))
    file.unlink()
    write_shards(begun.with_suffix(""), memory(40))
    merge_shards(begun.with_suffix(""))
    for split in ("train", "val"):
        ShardSet(begun.with_suffix(""), split).verify()


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"torn")])
def test_a_shard_that_is_gone_is_made_again_and_never_in_an_index(begun, memory, damage):
    out = begun.with_suffix("")
    write_shards(out, memory(40))
    damage(begun / "train-000001.tar")
    with pytest.raises(ValueError, match=r"train-000001.tar (is gone|has 4 bytes instead of \d+); run the same command again"):
        merge_shards(out)
    write_shards(out, memory(40))
    merge_shards(out)
    ShardSet(out, "train").verify()


def test_a_merge_killed_after_its_index_is_ended_with_the_same_settings(begun, memory, palette8, monkeypatch):
    out, same = begun.with_suffix(""), ShardSettings(**options(palette_hash=palette8.hash))
    write_shards(out, memory(40))
    assert finish_begun(out, same) is None
    monkeypatch.setattr(merge, "remove", fail)
    with pytest.raises(RuntimeError, match="killed"):
        merge_shards(out)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"out.making was begun with other settings \(seed 0, now 1\)"):
        finish_begun(out, dataclasses.replace(same, seed=1))
    index = finish_begun(out, same)
    kept = ["index.json", "palette.npy", *(f"{split}-keys.jsonl" for split in index.splits)]
    kept += [shard.name for split in index.splits.values() for shard in split.shards]
    assert sorted(file.name for file in out.iterdir()) == sorted(kept)
    ShardSet(out, "val").verify()


def fail(_):
    raise RuntimeError("killed")


def test_a_directory_that_another_process_finished(begun, memory, palette8):
    class Finishing(type(memory(40))):
        def read(self, entries):
            if begun.exists():
                write_shards(begun.with_suffix(""), memory(40))
                merge_shards(begun.with_suffix(""))
            return super().read(entries)

    with pytest.raises(ValueError, match=r"out.making disappeared: another process has finished or removed it; look at .*out"):
        write_shards(begun.with_suffix(""), Finishing(memory(40).images))
    assert not begun.exists()
    ShardSet(begun.with_suffix(""), "train").verify()


def test_a_merged_directory_that_cannot_be_put_in_place(begun, memory):
    write_shards(begun.with_suffix(""), memory(40))
    begun.with_suffix("").mkdir()
    (begun.with_suffix("") / "something").write_text("else")
    with pytest.raises(ValueError, match=r"out exists already; choose another name or remove it"):
        merge_shards(begun.with_suffix(""))


def test_workers_end_with_a_killed_tool(tmp_path, folder, launch):
    raw = folder({"cat": 1100, "dog": 1100})
    save_palette(tmp_path / "palette.npy", Palette(np.array([[-1, -1, -1], [1, 1, 1]], dtype=np.float32)))
    command = ["tools/make_shards.py", "--source", f"imagefolder:{raw}", "--palette", tmp_path / "palette.npy", "--n_px", "3"]
    process = launch.start([*command, "--workers", "2", "--out", tmp_path / "out"])
    family = []
    while process.poll() is None and len(family) < 3:
        family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=600)
    assert not alive


def test_a_damaged_plan(tmp_path, memory, palette8):
    plan = list_images(tmp_path / "out", memory(40), palette8, ShardSettings(**options(palette_hash=palette8.hash)))
    assert plan.n_entries == 40
    (making(tmp_path / "out") / "plan" / "plan.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match=r"plan .*plan.json is not igpt_ds.plan version 1: it has no 'format'; remove .*out.making and begin again",
    ):
        write_shards(tmp_path / "out", memory(40))
    (making(tmp_path / "out") / "plan" / "plan.json").write_text(json.dumps(PLAN.seal({})))
    with pytest.raises(ValueError, match=r"plan .*plan.json has no 'settings'; remove .*out.making"):
        write_shards(tmp_path / "out", memory(40))
    shutil.rmtree(making(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"plan .* does not exist"):
        merge_shards(tmp_path / "out")
