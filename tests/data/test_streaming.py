"""Shards read in sequence by webdataset: every image comes, and a stream that is cut stops the run."""

import dataclasses
import itertools
import os
import shutil
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from igpt_ds.data.loader import Augment, BatchLayout
from igpt_ds.data.palette import Palette, save_palette
from igpt_ds.data.shards.build import write_dataset
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.index import read_index, write_index
from igpt_ds.data.shards.layout import ShardOptions
from igpt_ds.data.streaming import LIMITS, ShardStream, StreamLoader
from igpt_ds.schema import to_json


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, memory, palette8):
    """60 images, 10 a shard; read only."""
    path = tmp_path_factory.mktemp("streamed") / "whole"
    write_dataset(path, memory(60), palette8, ShardOptions(4, val_fraction=0, images_per_shard=10))
    return path


@pytest.fixture
def away(dataset, tmp_path):
    """The same dataset in two places: (directory of index and palette, directory of the training shards)."""
    shards, index = tmp_path / "bucket", tmp_path / "index"
    shutil.copytree(dataset, shards)
    index.mkdir()
    for name in ("index.json", "palette.npy"):
        (shards / name).rename(index / name)
    return index, shards


def take(loader, n, images_seen=0):
    stream = loader.stream(images_seen)
    batches = list(itertools.islice(stream, n))
    stream.close()
    return torch.cat([batch.tokens for batch in batches]).numpy(), torch.cat([batch.labels for batch in batches]).numpy()


@pytest.mark.parametrize("url", ["pipe:cat {bucket}/{{shard}}", "{bucket}/{{shard}}", "file:{bucket}/{{shard}}"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_each_image_comes_once_an_epoch(away, dataset, url, world_size):
    """With a buffer of one the order is that of the shards; with a large one it is another one of the same images."""
    stream = ShardStream(away[0], url.format(bucket=away[1]))
    loaders = [
        StreamLoader(stream, BatchLayout(10 * world_size, 10, rank, world_size), 3, buffer_images=1) for rank in range(world_size)
    ]
    whole = ShardSet(dataset, "train")
    orders = []
    for epoch in range(2):
        found = [take(loader, 6 // world_size, epoch * 60) for loader in loaders]
        tokens, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
        ids = [int(np.flatnonzero((whole.tokens(np.arange(60)).reshape(60, 16) == grid).all(1))[0]) for grid in tokens]
        assert sorted(ids) == list(range(60))
        np.testing.assert_array_equal(labels, whole.labels(np.array(ids)))
        shards = [shard for loader in loaders for shard in loader.shards_of(epoch)]
        assert ids == [shard * 10 + place for shard in shards for place in range(10)]
        orders.append(shards)
    assert orders[0] != orders[1]


def test_a_buffer_shuffles_and_loses_nothing(away):
    stream = ShardStream(away[0], f"{away[1]}/{{shard}}")
    plain = take(StreamLoader(stream, BatchLayout(60, 60), seed=1, buffer_images=1), 20)[0]
    mixed = take(StreamLoader(stream, BatchLayout(60, 60), seed=1, buffer_images=30), 20)[0]
    assert (plain == mixed).all(axis=1).mean() < 0.1
    counts = Counter(grid.tobytes() for grid in mixed)
    assert len(counts) == 60
    assert abs(np.array(list(counts.values())) - 20).max() <= 2  # at most what still lies in the buffer
    again = take(StreamLoader(stream, BatchLayout(60, 60), seed=1, buffer_images=30), 20)[0]
    np.testing.assert_array_equal(mixed, again)
    assert not (take(StreamLoader(stream, BatchLayout(60, 60), seed=2, buffer_images=30), 20)[0] == mixed).all()


def test_ranks_see_different_images_and_augment_them(away, dataset):
    stream = ShardStream(away[0], f"{away[1]}/{{shard}}")
    parts = [
        take(StreamLoader(stream, BatchLayout(20, 10, rank, 2), seed=1, augment=Augment(flip=True), buffer_images=1), 3)[0]
        for rank in range(2)
    ]
    every = ShardSet(dataset, "train").tokens(np.arange(60))
    both = {grid.tobytes() for grid in every} | {grid[:, ::-1].tobytes() for grid in every}
    seen = [{grid.tobytes() for grid in part} for part in parts]
    assert seen[0] | seen[1] <= both
    assert not seen[0] & seen[1]
    assert not seen[0] <= {grid.tobytes() for grid in every}


def test_resume_goes_on_at_the_beginning_of_a_shard(away):
    stream = ShardStream(away[0], f"{away[1]}/{{shard}}")
    loader = StreamLoader(stream, BatchLayout(10, 5), seed=3, buffer_images=1)
    whole = take(loader, 24)[0]
    for seen in (0, 10, 30, 60, 90):
        np.testing.assert_array_equal(take(loader, 2, seen)[0], whole[seen : seen + 10])
    np.testing.assert_array_equal(take(loader, 2, 25)[0], whole[20:30])  # some twice rather than never


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_carry_their_positions_in_the_stream_of_all_ranks(away, rank):
    stream = StreamLoader(ShardStream(away[0], f"{away[1]}/{{shard}}"), BatchLayout(12, 3, rank, 2)).stream(24)
    found = [next(stream).positions.tolist() for _ in range(4)]
    stream.close()
    assert found == [[first + 3 * rank + place for place in range(3)] for first in (24, 30, 36, 42)]


def test_labels_are_left_out_when_nobody_needs_them(away):
    loader = StreamLoader(ShardStream(away[0], f"{away[1]}/{{shard}}"), BatchLayout(10, 10), with_labels=False)
    batch = next(loader.stream(0))
    assert (batch.tokens.dtype, batch.tokens.shape, batch.labels.shape) == (torch.uint16, (10, 16), (0,))


def cut(shard, bytes_kept):
    os.truncate(shard, bytes_kept)


def flip_a_name(shard, image):
    with open(shard, "r+b") as file:
        file.seek(image * 2048 + 3)
        file.write(b"\xff")


def set_token(shard, image, value=b"\xff\xff"):
    with open(shard, "r+b") as file:
        file.seek(image * 2048 + 1536 + 128)
        before = file.read(2)
        file.seek(-2, 1)
        file.write(value or bytes([before[0] ^ 1, 0]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda shard: cut(shard, 7 * 2048),
            "gave 7 images where the index says 10; the transfer was cut or the shard is damaged",
        ),
        (lambda shard: cut(shard, 7 * 2048 + 700), r"gave [78] images where the index says 10|broke after [78] of 10 images"),
        (lambda shard: cut(shard, 7 * 2048 + 1800), r"broke after 7 of 10 images \(unexpected end of data.*check the URL"),
        (lambda shard: cut(shard, 0), r"of 10 images|gave 0 images where the index says 10"),
        (lambda shard: flip_a_name(shard, 4), "gave 4 images where the index says 10"),
        (lambda shard: set_token(shard, 4), "image 0000000.4 is not 4x4 tokens below 8"),
        (lambda shard: set_token(shard, 4, None), "its sha256 is not that of the index"),
        (lambda shard: shard.unlink(), "broke after 0 of 10 images"),
        (lambda shard: shard.write_bytes(2 * shard.read_bytes()[:20480] + bytes(1024)), "should not come after|duplicate"),
    ],
    ids=[
        "between images",
        "in a header",
        "in tokens",
        "at once",
        "a flipped bit in a header",
        "a token",
        "another token",
        "no file",
        "twice",
    ],
)
@pytest.mark.parametrize("url", ["pipe:cat {bucket}/{{shard}}", "{bucket}/{{shard}}"])
def test_a_stream_that_is_cut_stops_the_run(away, url, damage, message, capfd):
    damage(away[1] / "train-000003.tar")
    stream = StreamLoader(ShardStream(away[0], url.format(bucket=away[1])), BatchLayout(10, 10), seed=3, buffer_images=1).stream(
        0
    )
    with pytest.raises(ValueError, match=rf"^stream \S.*train-000003\.tar .*({message})"):
        list(itertools.islice(stream, 200))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_closing_the_stream_ends_its_command(away):
    stream = StreamLoader(ShardStream(away[0], f"pipe:cat {away[1]}/{{shard}}"), BatchLayout(2, 2), buffer_images=4).stream(0)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_what_cannot_be_streamed(away):
    index = away[0]
    with pytest.raises(ValueError, match=r"--stream https://host/x\.tar has no place for the name of a shard; write {shard}"):
        ShardStream(index, "https://host/x.tar")
    with pytest.raises(ValueError, match="is no shard directory"):
        ShardStream(index / "nothing", "{shard}")
    stream = ShardStream(index, "{shard}")
    with pytest.raises(ValueError, match="has 6 training shards to stream and this run has 7 ranks; start fewer ranks"):
        StreamLoader(stream, BatchLayout(7, 1, 0, 7))
    with pytest.raises(ValueError, match="batch_images=5 does not divide into 2 ranks"):
        StreamLoader(stream, BatchLayout(5, 2, 0, 2))
    save_palette(index / "palette.npy", Palette(np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)))
    with pytest.raises(ValueError, match=r"palette\.npy is not the palette that the shards were made with; copy theirs"):
        ShardStream(index, "{shard}")
    values = read_index(index)
    write_index(index, dataclasses.replace(values, splits={"test": values.splits["train"]}))
    with pytest.raises(ValueError, match="has no split 'train'; it has test"):
        ShardStream(index, "{shard}")


def test_training_and_validation_images_in_one_stream(tmp_path, memory, palette8):
    path = tmp_path / "both"
    write_dataset(path, memory(60), palette8, ShardOptions(4, val_fraction=0.3, images_per_shard=10))
    stream, mapped = ShardStream(path, f"{path}/{{shard}}", "train+val"), ShardSet(path, "train+val")
    assert (stream.n_images, stream.dataset_hash, stream.facts().split) == (60, mapped.dataset_hash, "train+val")
    tokens, _ = take(StreamLoader(stream, BatchLayout(10, 10), 3, buffer_images=1), 6)
    assert sorted(tokens.tolist()) == sorted(mapped.tokens(np.arange(60)).reshape(60, -1).tolist())


def test_a_stream_says_what_it_is(away):
    stream = ShardStream(away[0], "{shard}")
    assert stream.n_images == 60
    facts = to_json(stream.facts())
    assert (facts["order"], facts["stream"], facts["path"]) == ("stream", "{shard}", str(away[0]))
    assert list(facts) == ["path", "dataset_hash", "palette_hash", "order", "stream", "split"]
    for word in ("--resume", "ranks", "buffer", "damaged"):
        assert word in LIMITS


def test_a_name_in_the_index_is_no_command(away, tmp_path):
    index = read_index(away[0])
    split = index.splits["train"]
    hostile = [dataclasses.replace(split.shards[0]), *split.shards[1:]]
    object.__setattr__(hostile[0], "name", f"x; touch {tmp_path}/ran")
    write_index(away[0], dataclasses.replace(index, splits={"train": dataclasses.replace(split, shards=hostile)}))
    with pytest.raises(ValueError, match=r"name 'x; touch .*, which is not a plain file name"):
        ShardStream(away[0], "pipe:cat {shard}")
    assert not (tmp_path / "ran").exists()
