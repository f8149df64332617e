"""Nearest neighbours in feature space, and the confusions of a probe that is fitted again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from igpt_ds.evaluate.features.files import open_features
from igpt_ds.evaluate.neighbours import nearest_images, probe_confusion
from igpt_ds.evaluate.probes.linear import ProbeSettings, linear_probe
from igpt_ds.evaluate.report.results import make_row

SETTINGS = ProbeSettings.of([0.01, 1.0])


@pytest.fixture
def sets(made_features):
    random = np.random.default_rng(0)
    made = {}
    for split, n in (("train", 90), ("val", 30)):
        labels = np.arange(n) % 3
        made[split] = (random.normal(0, 1, (n, 5)) + 2 * np.eye(5)[labels] + 50, labels)
    path = made_features(made)
    return [open_features(path, split) for split in ("train", "val")]


def test_neighbours_are_those_of_a_plain_search(sets):
    train, val = sets
    found = nearest_images(train, val, np.array([4, 0, 29]), 0, "normed", 6)
    x, y = (np.asarray(one.layer(0, "normed"), dtype=np.float64) for one in sets)
    mean = x.mean(0)
    for query, ids in zip((4, 0, 29), found, strict=True):
        a, b = y[query] - mean, x - mean
        cosines = b @ a / np.linalg.norm(a) / np.linalg.norm(b, axis=1)
        assert list(ids) == list(np.argsort(-cosines)[:6])
    assert nearest_images(train, train, np.arange(90), 0, "normed", 1)[:, 0].tolist() == list(range(90)), (
        "nothing is nearer than itself"
    )
    for k in (0, 91):
        with pytest.raises(ValueError, match=f"--neighbours {k} must lie between 1 and the 90 training images"):
            nearest_images(train, val, np.array([0]), 0, "normed", k)


def test_confusions_are_those_of_the_reported_probe(sets):
    train, val = sets
    probe = linear_probe(train, val, 0, "normed", SETTINGS)
    row = make_row(probe, train, val)
    counts = probe_confusion(train, val, row, dataclasses.replace(SETTINGS, C_grid=(row["C"],)))
    assert counts.shape == (3, 3)
    assert counts.sum(1).tolist() == np.bincount(val.labels).tolist()
    assert np.trace(counts) / counts.sum() == pytest.approx(probe.accuracy)
    with pytest.raises(ValueError, match="features of another model, or of other images, than the results' best probe"):
        probe_confusion(train, val, row | {"model_hash": "other"}, SETTINGS)
