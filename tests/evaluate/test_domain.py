"""The web filter: its parts against scikit-learn and brute force, and two planted domains through the whole tool."""

from __future__ import annotations

import json
import re
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from igpt_ds.data.palette import Palette
from igpt_ds.data.shards.build import write_dataset
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.data.shards.layout import ShardOptions
from igpt_ds.data.sources import open_source
from igpt_ds.evaluate.domain import FeatureReader, auc, fit_domain, fold_of, keep_best, n_to_keep
from igpt_ds.evaluate.features.files import open_features
from igpt_ds.evaluate.features.network import open_model

TOOL = Path(__file__).parents[2] / "tools" / "filter_shards.py"
RED, BLUE = 0, 2


def png_size(path):
    """Width and height from the header of a PNG."""
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return struct.unpack(">II", header[16:])


@pytest.fixture(scope="session")
def planted(tmp_path_factory, tiny_dataset):
    """Makes shards of noisy 4x4 images with the tiny palette: planted([RED, BLUE, ...], seed) -> directory, split "train"."""

    def make(channels, seed, palette=None, n_px=4):
        directory = tmp_path_factory.mktemp("planted")
        random = np.random.default_rng(seed)
        (directory / "raw" / "image").mkdir(parents=True)
        for number, channel in enumerate(channels):
            image = random.integers(0, 100, (n_px, n_px, 3), dtype=np.uint8)
            image[..., channel] += 150
            Image.fromarray(image).save(directory / "raw" / "image" / f"{number:04d}.png")
        palette = palette or ShardSet(tiny_dataset, "train").palette
        write_dataset(
            directory / "shards", open_source(f"imagefolder:{directory / 'raw'}"), palette, ShardOptions(n_px, val_fraction=0.0)
        )
        return directory / "shards"

    return make


@pytest.fixture(scope="session")
def reference(planted):
    return planted([RED] * 60, seed=1)


@pytest.fixture(scope="session")
def candidates(planted):
    """Sixty images, every third of them red as the reference is, the others blue."""
    return planted([RED if number % 3 == 0 else BLUE for number in range(60)], seed=2)


@pytest.fixture
def read(model_dir, both_splits):
    return FeatureReader(open_model(model_dir, both_splits[0])[0], layer=1, batch=7)


# --------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_features_are_those_that_are_extracted(read, features_dir, both_splits, layer):
    train = both_splits[0]
    expected = open_features(features_dir, "train").layer(layer, "normed")
    got = FeatureReader(read.model, layer, batch=5).all(train, np.arange(train.n_images))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    some = np.array([9, 2, 5])
    batches = list(FeatureReader(read.model, layer, batch=2)(train, some))
    assert [ids.tolist() for ids, _ in batches] == [[9, 2], [5]]
    np.testing.assert_allclose(np.concatenate([values for _, values in batches]), expected[some], rtol=1e-5, atol=1e-6)


def test_half_precision_is_near(read, both_splits):
    ids = np.arange(8)
    half = FeatureReader(read.model, 1, precision="bf16").all(both_splits[0], ids)
    full = read.all(both_splits[0], ids)
    np.testing.assert_allclose(half, full, rtol=0.05, atol=0.05)
    assert (half != full).any()


def test_features_that_are_not_finite_stop(read, both_splits):
    with torch.no_grad():
        read.model.wpe[0] = torch.inf
    with pytest.raises(ValueError, match=r"layer 1 is not finite for images of .*; check the model, or use fp32"):
        read.all(both_splits[0], np.arange(3))


# --------------------------------------------------------------------------------------------------- classifiers


def test_each_image_is_scored_by_a_fit_on_the_other_fold(read, reference, candidates):
    """Scikit-learn, fitted on one fold of the same images, gives the scores of the other."""
    sides = [ShardSet(candidates, "train"), ShardSet(reference, "train")]
    domain = fit_domain(read, sides[1], sides[0], fit_images=50, seed=4)
    random = np.random.default_rng(4)
    ids = [np.sort(random.choice(60, 50, replace=False)) for _ in sides]
    features = np.concatenate([read.all(shards, some) for shards, some in zip(sides, ids, strict=True)]).astype(np.float64)
    folds, labels = fold_of(np.concatenate(ids), 4), np.repeat([0, 1], 50)
    expected = np.empty(100)
    for fold in (0, 1):
        own = folds == fold
        scaler = StandardScaler().fit(features[~own])
        model = LogisticRegression(C=domain.C, tol=1e-10, max_iter=10_000)
        model.fit(scaler.transform(features[~own]), labels[~own])
        expected[own] = model.decision_function(scaler.transform(features[own]))
    got = np.concatenate([domain.candidate_scores, domain.reference_scores])
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    again = domain.score(ids[0], features[:50].astype(np.float32))
    np.testing.assert_array_equal(again, domain.candidate_scores)
    assert domain.auc == pytest.approx(roc_auc_score(labels, got))
    assert domain.accuracy == pytest.approx(((got > 0) == labels).mean())
    assert (domain.n_fit, domain.converged, got.dtype) == (50, True, np.float32)


def test_sets_that_are_alike_cannot_be_told_apart(read, planted):
    """Images of one kind on both sides: a score of what was fitted on would look better than chance."""
    sides = [ShardSet(planted([RED, BLUE] * 60, seed), "train") for seed in (11, 12)]
    assert 0.35 < fit_domain(read, *sides).auc < 0.65


def test_the_order_of_domains_is_found(read, reference, candidates):
    domain = fit_domain(read, ShardSet(reference, "train"), ShardSet(candidates, "train"))
    red = np.arange(60) % 3 == 0
    assert domain.candidate_scores[red].min() > domain.candidate_scores[~red].max()
    assert domain.n_fit == 60
    assert domain.auc > 0.75


@pytest.mark.parametrize("fit_images", [39, 10])
def test_too_few_images_are_refused(read, reference, candidates, fit_images):
    text = f"--fit_images {fit_images}, 60 reference images and 60 candidates give {fit_images} images to fit on; at least 40 of"
    with pytest.raises(ValueError, match=text):
        fit_domain(read, ShardSet(reference, "train"), ShardSet(candidates, "train"), fit_images=fit_images)


def test_folds_halve_the_images_by_their_ids_alone():
    ids = np.arange(10_000)
    folds = fold_of(ids, 3)
    assert set(folds.tolist()) == {0, 1}
    assert abs(folds.mean() - 0.5) < 0.02
    np.testing.assert_array_equal(fold_of(ids[::-7], 3), folds[::-7])
    assert 0.4 < (fold_of(ids, 4) != folds).mean() < 0.6
    assert abs(np.corrcoef(folds[1:], folds[:-1])[0, 1]) < 0.05


@settings(deadline=None)
@given(
    positive=st.lists(st.integers(-3, 3), min_size=1, max_size=20), negative=st.lists(st.integers(-3, 3), min_size=1, max_size=20)
)
def test_auc_is_scikit_learns(positive, negative):
    labels = [1] * len(positive) + [0] * len(negative)
    assert auc(np.array(positive), np.array(negative)) == pytest.approx(roc_auc_score(labels, positive + negative))


@settings(deadline=None)
@given(scores=st.lists(st.integers(-3, 3), min_size=1, max_size=40), data=st.data())
def test_the_best_are_kept_and_ties_fall_to_small_ids(scores, data):
    n = data.draw(st.integers(1, len(scores)))
    kept, threshold = keep_best(np.array(scores, dtype=np.float32), n)
    order = sorted(range(len(scores)), key=lambda number: (-scores[number], number))
    assert kept.tolist() == sorted(order[:n])
    assert threshold == scores[order[n - 1]]


def test_how_many_are_kept():
    assert [n_to_keep(10, keep) for keep in (0.05001, 0.15, 0.25, 0.66, 1)] == [1, 2, 2, 7, 10]
    for keep in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=re.escape(f"--keep {keep} must be above 0 and at most 1")):
            n_to_keep(10, keep)
    with pytest.raises(ValueError, match=r"--keep 0.01 of 10 candidates is less than one image; use a larger share"):
        n_to_keep(10, 0.01)


# --------------------------------------------------------------------------------------------------- the tool


@pytest.fixture
def tool(tool):
    """tool(*arguments) of tools/filter_shards.py."""
    return partial(tool, "filter_shards")


def test_reference_like_candidates_are_kept(tool, model_dir, reference, candidates, tmp_path):
    arguments = ["--model", model_dir, "--reference", reference, "--candidates", candidates, "--keep", 0.3]
    status, said, errors = tool(*arguments, "--out", tmp_path / "kept", "--seed", 5, "--batch", 9)
    assert (status, errors) == (0, "")
    source, kept = ShardSet(candidates, "train"), ShardSet(tmp_path / "kept", "train")
    report = tmp_path / "kept_report"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "kept_report"]
    assert sorted(path.name for path in report.iterdir()) == ["histogram.png", "report.json", "scores.npy", "sheet.png"]

    scores = np.load(report / "scores.npy")
    assert (scores.dtype, scores.shape) == (np.float32, (60,))
    ids = np.sort(np.lexsort((np.arange(60), -scores))[:18])
    assert (ids % 3 == 0).all()  # all of them red
    assert kept.n_images == 18
    np.testing.assert_array_equal(kept.tokens(np.arange(18)), source.tokens(ids))

    facts = json.loads((report / "report.json").read_text())
    assert json.loads((tmp_path / "kept" / "index.json").read_text())["derived"] == facts
    assert facts["candidates"]["dataset_hash"] == source.dataset_hash
    assert facts["reference"]["dataset_hash"] == ShardSet(reference, "train").dataset_hash
    assert (facts["layer"], facts["keep"], facts["n_kept"], facts["seed"], facts["n_fit"]) == (1, 0.3, 18, 5, 60)
    assert facts["threshold"] == pytest.approx(scores[ids].min())
    assert len(facts["model_hash"]) == 64
    assert facts["auc"] > 0.75
    for text in ("layer 1 of 0..2", "AUC 0.", "18 images (30.00%)", "60 candidates scored", "images/s", f"{report}: report.json"):
        assert text in said
    assert png_size(report / "histogram.png") == (1200, 600)
    assert png_size(report / "sheet.png")[0] > 8 * 96
    status, _, error = tool(*arguments, "--out", tmp_path / "other", "--write_from", tmp_path / "kept")
    assert (status, f"--write_from {tmp_path / 'kept'} does not hold the images of {candidates} in their order" in error) == (
        2,
        True,
    )
    assert not (tmp_path / "other").exists()


def test_scores_do_not_depend_on_batches_and_everything_may_be_kept(tool, model_dir, reference, candidates, tmp_path):
    arguments = ["--model", model_dir, "--reference", reference, "--candidates", candidates, "--layer", 2, "--fit_images", 50]
    for name, batch in (("a", 3), ("b", 60)):
        assert (
            tool(*arguments, "--keep", 1, "--out", tmp_path / name, "--report", tmp_path / f"r{name}", "--batch", batch)[0] == 0
        )
    np.testing.assert_allclose(*(np.load(tmp_path / name / "scores.npy") for name in ("ra", "rb")), rtol=1e-3, atol=1e-3)
    assert ShardSet(tmp_path / "a", "train").n_images == 60
    assert tool(*arguments, "--keep", 1, "--out", tmp_path / "c", "--write_from", candidates)[0] == 0
    assert ShardSet(tmp_path / "c", "train").dataset_hash == ShardSet(tmp_path / "a", "train").dataset_hash


def test_bad_input_is_one_line_and_leaves_nothing(tool, model_dir, reference, candidates, planted, tiny_dataset, tmp_path):
    black = Palette(np.full((8, 3), -1, dtype=np.float32) + np.arange(8, dtype=np.float32)[:, None] / 8)
    recolored = planted([RED] * 3, seed=3, palette=black)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "index.json").touch()
    (tmp_path / "there_report").mkdir()
    (tmp_path / "there_report" / "old.json").write_text("{}\n")
    usual = {"--model": model_dir, "--reference": reference, "--candidates": candidates, "--keep": 0.5, "--out": tmp_path / "new"}
    for change, complaint in [
        ({"--keep": 0}, "--keep 0.0 must be above 0"),
        ({"--keep": 0.001}, "--keep 0.001 of 60 candidates is less than one image"),
        ({"--batch": 0}, "--batch 0 must be at least 1"),
        ({"--seed": -1}, "--seed -1 must be at least 0"),
        ({"--layer": 3}, "--layers 3 does not exist; the model has layers 0..2"),
        ({"--out": tmp_path / "there"}, f"{tmp_path / 'there'} exists already; choose another name or remove it"),
        ({"--report": tmp_path / "there_report"}, f"{tmp_path / 'there_report'} exists already"),
        ({"--candidates": reference}, "hold the same images; name two different sets"),
        ({"--candidates": recolored}, "do not fit one model; make both with the n_px and palette.npy of --model"),
        ({"--reference": recolored, "--candidates": planted([RED] * 4, 4, black)}, "was trained with palette"),
        ({"--candidates_split": "test"}, "has no split 'test'"),
        ({"--reference_split": "test"}, "has no split 'test'"),
        ({"--fit_images": 5}, "give 5 images to fit on"),
    ]:
        status, said, errors = tool(*(word for pair in (usual | change).items() for word in pair))
        assert (status, said, errors.count("\n")) == (2, "", 1), errors
        assert complaint in errors
        assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "there_report"]
