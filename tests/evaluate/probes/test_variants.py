"""Layers side by side, few labels, votes over masks: each against the same made by hand."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from igpt_ds.data.mixture import open_mixture
from igpt_ds.data.subsets import few
from igpt_ds.evaluate.features.files import open_features
from igpt_ds.evaluate.probes import sgd_search
from igpt_ds.evaluate.probes.linear import ProbeSettings, linear_probe
from igpt_ds.evaluate.probes.settings import SgdSettings
from igpt_ds.evaluate.probes.variants import balanced_subset, best_layer, concat, low_data, mask_vote, window
from igpt_ds.evaluate.probes.votes import vote
from igpt_ds.evaluate.report.results import read_results

GRID = ProbeSettings.of([1e-3, 1e-2, 1e-1, 1.0])


def cloud(labels, width, spread, seed):
    centres = np.random.default_rng(99).normal(size=(3, width))
    return centres[labels] + spread * np.random.default_rng(seed).normal(size=(len(labels), width))


@pytest.fixture
def many(made_features):
    """Makes six layers, the third the clearest: many(masks) -> (train, val), with so many masks of val, each noisier."""

    def make(masks=0, layers=6):
        labels = {"train": np.repeat(np.arange(3), 100), "val": np.repeat(np.arange(3), 40)}
        path = made_features({split: (cloud(y, 8, 1.0, 0), y) for split, y in labels.items()}, name=f"many{masks}{layers}")
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["layers"] = list(range(layers))
        for split, y in labels.items():
            draws = masks if split == "val" else min(1, masks)
            manifest["splits"][split]["mask_draws"] = draws
            for layer in range(layers):
                for mask in range(max(1, draws)):
                    x = cloud(y, 8, 1.2 + abs(layer - 2) / 2, [layer, mask, len(y)])
                    end = f"_mask{mask}" if draws else ""
                    np.save(path / split / f"layer_{layer:02d}_normed{end}.npy", x.astype(np.float32))
        manifest["mask_seed"] = 7 if masks else None
        (path / "manifest.json").write_text(json.dumps(manifest))
        return open_features(path, "train"), open_features(path, "val")

    return make


def test_the_best_layer_is_that_of_whole_probes(many):
    train, val = many()
    said = []
    layer = best_layer(train, train.layers, "normed", GRID, said.append)
    held_out = [linear_probe(train, val, one, "normed", GRID).held_out_accuracy for one in train.layers]
    assert layer == int(np.argmax(held_out))
    assert len(said) == 6
    assert said[layer] == f"{train.path} layer {layer} normed: held out {100 * held_out[layer]:.2f} %"
    assert best_layer(train, [4], "normed", GRID, said.append) == 4
    assert len(said) == 6, "a single one is not searched for"


@pytest.mark.parametrize(
    ("centre", "expected"), [(0, (0, 1, 2, 3, 4)), (2, (0, 1, 2, 3, 4)), (3, (1, 2, 3, 4, 5)), (5, (1, 2, 3, 4, 5))]
)
def test_five_layers_around_one(centre, expected):
    assert window(range(6), centre) == expected
    assert window([0, 4, 8, 12, 16], 4) == (0, 4, 8, 12, 16)


def test_concat_is_a_probe_of_all_the_features(many, made_features):
    train, val = many()
    probe = concat(train, val, 3, "normed", GRID)
    assert (probe.layer, probe.layers) == (3, [1, 2, 3, 4, 5])
    wide = {one.split: (np.hstack([one.layer(layer, "normed") for layer in probe.layers]), one.labels) for one in (train, val)}
    path = made_features(wide, name="wide")
    by_hand = linear_probe(open_features(path, "train"), open_features(path, "val"), 0, "normed", GRID)
    assert probe.n_features == 40
    assert (probe.C, probe.accuracy, probe.held_out_accuracies) == (by_hand.C, by_hand.accuracy, by_hand.held_out_accuracies)
    assert probe.objective == pytest.approx(by_hand.objective, rel=1e-9)
    train, val = many(layers=4)
    with pytest.raises(ValueError, match=r"concat needs 5 layers and the features hold 0\.\.3; extract more layers"):
        concat(train, val, 2, "normed", GRID)


def test_subsets_are_balanced_and_differ(many):
    train, _ = many()
    subsets = [balanced_subset(train, 12, 0, number) for number in range(5)]
    for ids in subsets:
        assert np.bincount(train.labels[ids]).tolist() == [4, 4, 4]
        assert (np.diff(ids) > 0).all()
    assert len({tuple(ids) for ids in subsets}) == 5
    assert np.array_equal(balanced_subset(train, 12, 0, 3), subsets[3])
    assert not np.array_equal(balanced_subset(train, 12, 1, 3), subsets[3])
    for wrong in (10, 3, 303):
        with pytest.raises(
            ValueError, match=rf"--n_labels {wrong} must be a multiple of the 3 classes, with at least 2 and at most 100 images"
        ):
            balanced_subset(train, wrong, 0, 0)


def test_few_labels(many):
    train, val = many()
    few, more = (low_data(train, val, 2, "normed", n_labels, GRID) for n_labels in (6, 60))
    assert (few.n_labels, few.folds, more.folds, few.n_train, few.n_eval) == (6, 2, 5, 300, 120)
    for found in (few, more):
        assert len(found.subset_accuracies) == len(found.C_of_subsets) == found.n_subsets == 5
        assert found.accuracy == pytest.approx(np.mean(found.subset_accuracies))
        assert found.deviation == pytest.approx(np.std(found.subset_accuracies, ddof=1))
        assert set(found.C_of_subsets) <= set(GRID.C_grid)
        assert found.converged
    assert few.accuracy < more.accuracy
    assert few.deviation > more.deviation
    assert low_data(train, val, 2, "normed", 6, GRID) == few
    one = low_data(train, val, 2, "normed", 6, GRID, subsets=1)
    assert (one.n_subsets, one.deviation) == (1, None), "one value has no deviation"


def test_other_labels_do_not_choose_the_penalty(many):
    """Labels outside a subset may be anything: what was fitted, and what it reports, stay."""
    train, val = many()
    plain = low_data(train, val, 2, "normed", 30, GRID, subsets=1)
    outside = np.setdiff1d(np.arange(300), balanced_subset(train, 30, 0, 0))
    used = train.labels.copy()
    file = train.path / "train" / "layer_02_normed.npy"
    x = np.load(file)
    x[outside] = np.random.default_rng(0).permutation(x[outside])
    np.save(file, x)
    assert np.array_equal(train.labels, used)
    assert low_data(train, val, 2, "normed", 30, GRID, subsets=1) == plain


def test_votes():
    predictions = np.array([[0, 1, 2, 0], [0, 1, 1, 1], [1, 2, 1, 2], [2, 1, 1, 0], [0, 0, 1, 1]])
    assert vote(predictions[:, :3], 3, 0).tolist() == [0, 1, 1]
    tied = np.repeat(np.array([[0], [0], [1], [1], [2]]), 1000, axis=1)
    broken = vote(tied, 3, 0)
    assert set(broken) == {0, 1}, "a label with fewer votes never wins"
    assert 400 < (broken == 0).sum() < 600, "ties are broken at random"
    assert np.array_equal(vote(tied, 3, 0), broken)
    assert not np.array_equal(vote(tied, 3, 1), broken)


def test_a_vote_over_masks(many):
    train, val = many(masks=5)
    probe = mask_vote(train, val, 2, "normed", GRID)
    assert (probe.n_masks, probe.mask_seed, len(probe.single_accuracies)) == (5, 7, 5)
    assert probe.single_accuracies[0] == linear_probe(train, val, 2, "normed", GRID).accuracy
    assert probe.single_accuracy == pytest.approx(np.mean(probe.single_accuracies))
    assert probe.accuracy > max(probe.single_accuracies), "masks of independent noise are stronger together"
    one = mask_vote(train, val, 2, "normed", GRID, n_masks=1)
    assert one.accuracy == one.single_accuracy == probe.single_accuracies[0]
    with pytest.raises(
        ValueError, match=r"split 'val' of .* has 5 mask draws, and a vote needs 6; extract with --mask_draws 1 6"
    ):
        mask_vote(train, val, 2, "normed", GRID, n_masks=6)
    with pytest.raises(ValueError, match=r"many\d* is of a model with objective 'ar'; only bert models see masks, which vote"):
        mask_vote(*many(), 2, "normed", GRID)


def test_a_vote_over_masks_by_sgd(many, tmp_path, tool):
    train, val = many(masks=5)
    out, more = tmp_path / "r.jsonl", ("--steps", 300, "--batch_images", 16, "--rates", 0.1, 0.03, "--held_out", 0.2)
    flags = ("sgd_probe", "--features", train.path, "--layers", 1, 2, "--out", out, *more)
    assert tool(*flags)[0] == 0
    _, said, _ = tool(*flags, "--protocol", "mask_vote")
    assert "rows of earlier probes give layers 1, 2" in said
    *single, row = read_results(out)
    best = max(single, key=lambda one: one.held_out_accuracy)
    assert (row.protocol, row.layer, row.n_masks, row["mask_seed"]) == ("mask_vote", best.layer, 5, 7)
    assert row.rate == best.rate
    assert row["single_accuracies"][0] == best.accuracy, "the same fit, read on the first mask"
    assert row.single_accuracy == pytest.approx(np.mean(row["single_accuracies"]))
    assert row.accuracy > max(row["single_accuracies"])
    with pytest.raises(ValueError, match=r"has 5 mask draws, and a vote needs 6"):
        sgd_search.sgd_probe(train, val, 2, "normed", dataclasses.replace(SgdSettings(), n_masks=6))


def test_fine_tunings_draw_the_same_subsets(pixels_dir, tiny_dataset):
    """Features have a row for each image of their split, in its order: a row's number is the image's."""
    train, images = open_features(pixels_dir, "train"), open_mixture([tiny_dataset], one_view=True)
    for number in range(3):
        ids = balanced_subset(train, 6, 5, number)
        subset = few(images, 6, 5, number).shard_sets[0]
        assert np.array_equal(subset.tokens(np.arange(6)), images.shard_sets[0].tokens(ids))
        assert subset.labels(np.arange(6)).tolist() == train.labels[ids].tolist()
