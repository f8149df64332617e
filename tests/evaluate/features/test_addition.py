"""Splits that are extracted one after another into one directory, and train+val read without files of its own."""

import shutil

import numpy as np
import pytest

import igpt_ds
from igpt_ds.cli import FinishedError
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.layout import Part
from igpt_ds.evaluate.features.addition import addition_dir
from igpt_ds.evaluate.features.extract import Extraction, extract, extract_pixels
from igpt_ds.evaluate.features.files import open_features, part_dir
from igpt_ds.evaluate.features.joined import JoinedRows
from igpt_ds.evaluate.features.manifest import read_feature_manifest
from igpt_ds.evaluate.features.merge import merge_parts
from igpt_ds.evaluate.features.network import Network, open_model
from igpt_ds.evaluate.probes.linear import ProbeSettings, linear_probe
from igpt_ds.evaluate.probes.settings import RateSearch, SgdSettings
from igpt_ds.evaluate.probes.sgd_search import held_out_rows, sgd_probe
from igpt_ds.evaluate.report.results import make_row


@pytest.fixture
def extracted(model_dir):
    """extracted(out, shard_sets, ...) extracts from the tiny model."""

    def run(out, shard_sets, wanted=None, **of_network):
        model, origin = open_model(of_network.pop("model", model_dir), shard_sets[0], of_network.pop("untrained", None))
        extract(out, shard_sets, Network(model, batch=7, **of_network), origin, wanted)

    return run


def test_splits_one_after_another_are_those_of_one_command(extracted, features_dir, both_splits, tmp_path):
    train, val = both_splits
    out = tmp_path / "f"
    extracted(out, [val])
    extracted(out, [val, train])  # the first is there already
    assert read_feature_manifest(out).splits == read_feature_manifest(features_dir).splits
    assert read_feature_manifest(out).files == read_feature_manifest(features_dir).files, "sizes and sha256 of all arrays"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    open_features(out, "val").check([0, 1, 2], "raw")
    with pytest.raises(ValueError, match="f exists already"):
        extracted(out, [train, val])

    both = open_features(out, "val+train")
    assert (both.split, both.dataset_hash) == ("train+val", ShardSet(train.path, "train+val").dataset_hash)
    assert list(both.keys) == [*train.keys_of(np.arange(train.n_images)), *val.keys_of(np.arange(val.n_images))]
    expected = np.concatenate([open_features(out, split).layer(1, "raw") for split in ("train", "val")])
    np.testing.assert_array_equal(both.layer(1, "raw"), expected)
    np.testing.assert_array_equal(igpt_ds.open_features(out, "train+val").layer(1, "raw"), expected)
    with pytest.raises(ValueError, match=r"f has no split 'test'; it has val, train"):
        open_features(out, "train+test")


def test_probes_of_two_splits_are_those_of_an_extraction_of_both(both_splits, tmp_path):
    train, val = both_splits
    for shards in both_splits:
        extract_pixels(tmp_path / "apart", [shards])
    extract_pixels(tmp_path / "together", [ShardSet(train.path, "train+val"), val])
    found = []
    for name in ("apart", "together"):
        sets = [open_features(tmp_path / name, split) for split in ("train+val", "val")]
        exact = linear_probe(*sets, 0, "pixels", ProbeSettings((0.01, 0.1)))
        sgd = sgd_probe(*sets, 0, "pixels", SgdSettings(steps=20, batch_images=8), RateSearch((0.1,), held_out=0.2))
        found.append((exact, sgd))
    assert found[0] == found[1]
    assert (found[0][0].train_split, found[0][0].n_train) == ("train+val", 48)


def test_an_accuracy_on_training_images_is_named(tool, pixels_dir, tmp_path):
    words = ("--features", pixels_dir, "--C_grid", "0.1", "--out", tmp_path / "r.jsonl", "--train_split")
    assert "images of val are among those of train+val" in tool("linear_probe", *words, "train+val")[2]
    assert "are among" not in tool("linear_probe", *words, "train")[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"untrained": 3}, "weights is trained there and untrained here"),
        ({"model": 3}, "model_hash is "),
        ({"wanted": Extraction(layers=[0, 2])}, r"layers is \[0, 1, 2\] there and \[0, 2\] here"),
        ({"wanted": Extraction(kinds=["raw"])}, r"kinds is \['normed', 'raw'\] there and \['raw'\] here"),
        ({"wanted": Extraction(dtype="fp16")}, "dtype is fp32 there and fp16 here"),
        ({"precision": "bf16"}, "precision is fp32 there and bf16 here"),
        ({"name": "photos"}, "dataset is "),
        ({"classes": ["a", "b"]}, "classes is "),
        ({"split": "val"}, "n_images of split val is 11 there and 37 here"),
    ],
)
def test_other_features_are_refused_by_name(extracted, make_model_dir, features_dir, both_splits, tmp_path, changes, message):
    out = shutil.copytree(features_dir, tmp_path / "f")
    shards = ShardSet(both_splits[0].path, "train")
    shards.split = "test"
    for name in {"name", "classes", "split"} & set(changes):
        setattr(shards, name, changes.pop(name))
    if "model" in changes:
        changes["model"] = make_model_dir(tmp_path / "other", n_layer=changes["model"])
    with pytest.raises(ValueError, match=rf"f exists already and holds other features: {message}.*; choose another --out"):
        extracted(out, [shards], changes.pop("wanted", None), **changes)
    assert [path.name for path in tmp_path.iterdir() if path.name != "other"] == ["f"]


def test_a_killed_addition_leaves_the_others_whole_and_continues(extracted, features_dir, both_splits, tmp_path):
    train, val = both_splits
    out, addition = tmp_path / "f", tmp_path / "f.val"
    extracted(out, [train])
    extracted(addition, [val])  # as a process that was killed before it moved the split, or just after
    for killed_after_the_move in (False, True):
        if killed_after_the_move:
            shutil.copytree(features_dir / "val", out / "val")
            shutil.rmtree(addition / "val")
        open_features(out, "train").check([0, 1, 2], "raw")
        with pytest.raises(ValueError, match="has no split 'val'"):
            open_features(out, "train+val")
    with pytest.raises(FinishedError, match="f: an earlier run extracted val"):
        extracted(out, [val])
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert read_feature_manifest(out).files == read_feature_manifest(features_dir).files

    test = ShardSet(val.path, "val")
    test.split = "test"
    (tmp_path / "f.test.partial").mkdir()  # a process that was killed before its first row
    extracted(out, [test])
    assert list(read_feature_manifest(out).splits) == ["train", "val", "test"]
    assert addition_dir(out, ["test", "val"]) == addition_dir(out, ["val", "test"]), "the same work in any order"


def test_parts_of_a_further_split_merge_into_the_directory(extracted, features_dir, both_splits, tmp_path):
    train, val = both_splits
    out = tmp_path / "f"
    extracted(out, [train])
    for i in range(2):
        extracted(out, [train, val], Extraction(part=Part(i, 2)))
        assert part_dir(out, Part(i, 2)).is_dir()
    shutil.copytree(part_dir(out, Part(0, 2)), tmp_path / "again")
    assert list(merge_parts(out, 2).splits) == ["val"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "f"]
    assert read_feature_manifest(out).files == read_feature_manifest(features_dir).files
    with pytest.raises(ValueError, match="exists already"):
        merge_parts(out, 2)
    (tmp_path / "again").rename(part_dir(out, Part(0, 2)))
    with pytest.raises(ValueError, match=r"f has split val already, which its parts hold too; remove .*part-0-of-2"):
        merge_parts(out, 2)


def test_masked_and_whole_images_share_a_directory_but_no_split(extracted, make_model_dir, both_splits, tmp_path):
    train, val = both_splits
    bert = make_model_dir(tmp_path / "bert", objective="bert", mask_prob=0.3)
    out = tmp_path / "f"
    for shards, draws in ((train, 0), (val, 2)):
        extracted(out, [shards], Extraction(mask_draws=[draws]), model=bert)
    assert read_feature_manifest(out).origin.mask_prob == 0.3
    whole, masked = (open_features(out, split) for split in ("train", "val"))
    assert (whole.mask_draws, masked.mask_draws) == (0, 2)
    rows = [make_row(linear_probe(whole, other, 1, "normed", ProbeSettings((0.1,))), whole, other) for other in (whole, masked)]
    assert [row["mask_prob"] for row in rows] == [None, 0.3], "a row of whole images has no masks"
    with pytest.raises(ValueError, match=r"f has whole images of train and masked images of val, which do not go together"):
        open_features(out, "train+val")


def test_earlier_versions_have_train_and_val_too(made_features):
    random = np.random.default_rng(0)
    sides = {split: (random.normal(size=(n, 4)), random.integers(0, 3, n)) for split, n in (("train", 9), ("val", 5))}
    both = open_features(made_features(sides), "train+val")
    np.testing.assert_array_equal(both.layer(0, "normed"), np.concatenate([x for x, _ in sides.values()]).astype(np.float32))
    assert both.keys is None


@pytest.mark.parametrize("rows", [3, -1, slice(2, 9), slice(8, None, 2), slice(None, None, -1), [7, 1, 1], slice(3, 3)])
def test_joined_rows_are_those_of_one_array(rows):
    whole = np.arange(24.0).reshape(12, 2)
    joined = JoinedRows([whole[:5], whole[5:6], whole[6:]])
    rows = np.array(rows) if isinstance(rows, list) else rows
    np.testing.assert_array_equal(joined[rows], whole[rows])
    assert (len(joined), joined.shape, joined.dtype) == (12, (12, 2), whole.dtype)


def test_views_of_the_training_images_alone():
    """Three images of two crops each, then two validation images."""
    labels = np.array([0, 0, 1, 1, 0, 0, 1, 0])
    mask = held_out_rows(labels, 0.5, 2, 0, single=2)
    assert mask[:6].reshape(3, 2).any(1).tolist() == mask[:6].reshape(3, 2).all(1).tolist()
    assert mask[:6:2].sum() + mask[6:].sum() == 2
