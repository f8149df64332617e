"""`open_features` and `open_shards`: what the tools wrote, as arrays."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import igpt_ds
from igpt_ds.data.shards.dataset import ShardSet


@pytest.fixture(scope="module")
def features_dir(tmp_path_factory, tiny_dataset):
    from igpt_ds.evaluate.features.extract import extract_pixels

    path = tmp_path_factory.mktemp("api") / "pixels"
    extract_pixels(path, [ShardSet(tiny_dataset, split) for split in ("train", "val")])
    return path


def test_features_and_shards_belong_together(features_dir, tiny_dataset):
    shards = igpt_ds.open_shards(str(tiny_dataset))
    features = igpt_ds.open_features(str(features_dir))
    assert (features.split, features.splits, len(features)) == ("train", ["train", "val"], 37)
    assert (shards.split, shards.splits, len(shards)) == ("train", ["train", "val"], 37)
    np.testing.assert_array_equal(features.labels, shards.labels)
    assert features.classes == shards.classes == ["blue", "green", "red"]
    assert (features.layers, features.kinds) == ([0], ["pixels"])
    expected = shards.palette[shards.tokens()].reshape(37, 48)
    np.testing.assert_array_equal(features.layer(0), expected)
    np.testing.assert_array_equal(features.layer(0, "pixels"), expected)
    assert len(igpt_ds.open_features(features_dir, "val")) == len(igpt_ds.open_shards(tiny_dataset, "val")) == 11
    assert len(igpt_ds.open_shards(tiny_dataset, "train+val")) == 48
    assert igpt_ds.open_shards(tiny_dataset, "val+train").split == "train+val", "the order of its images"


def test_shards_are_a_sequence(tiny_dataset):
    shards, stored = igpt_ds.open_shards(tiny_dataset), ShardSet(tiny_dataset, "train")
    tokens, label, key = shards[3]
    assert (tokens.shape, tokens.dtype, type(label)) == ((16,), np.int64, int)
    np.testing.assert_array_equal(tokens, stored.tokens(np.array([3]))[0].ravel())
    assert label == stored.labels(np.array([3]))[0] == shards.labels[3]
    several = shards[:5]
    assert (several.tokens.shape, several.label.shape, several.key[3]) == ((5, 16), (5,), key)
    np.testing.assert_array_equal(shards[-1].tokens, shards.tokens()[-1])
    assert len(list(shards)) == len(shards)
    with pytest.raises(IndexError):
        shards[len(shards)]
    assert (shards.pixels().shape, shards.pixels().dtype, shards.n_px) == ((37, 4, 4, 3), np.uint8, 4)
    assert shards[:0].tokens.shape == (0, 16)


def test_what_was_opened_says_what_it_is(features_dir, tiny_dataset):
    assert repr(igpt_ds.open_features(features_dir)) == (
        f"<igpt_ds.Features {features_dir}: split 'train' of train, val; 37 images x 48 features, layers 0, pixels>"
    )
    assert repr(igpt_ds.open_shards(tiny_dataset, "val")) == (
        f"<igpt_ds.Shards {tiny_dataset}: 'shards' split 'val' of train, val; 11 images of 4x4, 8 colours, 3 classes>"
    )


def test_what_cannot_be_opened_is_named(features_dir, tiny_dataset, tmp_path):
    wrong = [
        (igpt_ds.open_features, (tiny_dataset,), "is no feature directory"),
        (igpt_ds.open_features, (tmp_path / "none",), "none is no feature directory"),
        (igpt_ds.open_features, (features_dir, "test"), "has no split 'test'; it has train, val"),
        (igpt_ds.open_shards, (tiny_dataset, 3), "split=3 must be the name of a split: train, val"),
        (igpt_ds.open_shards, ("a\0b",), "must be the path of a directory"),
        (igpt_ds.open_shards, (features_dir,), "is no shard directory"),
        (igpt_ds.open_shards, (tiny_dataset, "test"), "has no split 'test'; it has train, val"),
    ]
    for function, arguments, pattern in wrong:
        with pytest.raises(igpt_ds.InputError, match=pattern):
            function(*arguments)
    features = igpt_ds.open_features(features_dir)
    for arguments in ((7,), (0, "normed")):
        with pytest.raises(igpt_ds.InputError, match="does not exist; the features hold"):
            features.layer(*arguments)


def test_shards_travel_to_the_workers_of_a_loader(tiny_dataset):
    shards = igpt_ds.open_shards(tiny_dataset, "val")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(shards)).tokens(), shards.tokens())
