"""Which training images lie nearest to others in feature space, and which classes a probe takes for which.

In: feature sets. Out: row numbers, counts. Called by `tools/figures.py`, which draws them.
"""

from __future__ import annotations

import numpy as np

from igpt_ds.evaluate.features.files import FeatureSet
from igpt_ds.evaluate.probes.linear import Settings, View, check_labels, probe_view, training_images
from igpt_ds.evaluate.report.row_types import ProbeRow


def nearest(train: FeatureSet, evaluated: FeatureSet, queries: np.ndarray, layer: int, kind: str, k: int) -> np.ndarray:
    """The k training images most alike each query, the most alike first: queries int64 [Q] -> int64 [Q, k].

    Alike by the cosine between features from which the training images' mean is taken away: all of them share most of it.

    Raises:
        ValueError: k below 1 or above the training images; a layer or kind that is not there.
    """
    n = len(train.labels)
    if not 1 <= k <= n:
        raise ValueError(f"--neighbours {k} must lie between 1 and the {n} training images of {train.path}")
    everything, view = np.arange(n), View(train, (layer,), kind)
    mean = np.sum([chunk.sum(0) for chunk in view.chunks(everything)], axis=0) / n
    wanted = _unit(np.concatenate(list(View(evaluated, (layer,), kind).chunks(queries))) - mean)
    alike = np.concatenate([wanted @ _unit(chunk - mean).T for chunk in view.chunks(everything)], axis=1)
    return np.argsort(-alike, axis=1, kind="stable")[:, :k]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def confusion(train: FeatureSet, evaluated: FeatureSet, row: ProbeRow, settings: Settings) -> np.ndarray:
    """How often the probe of a row takes each class for each other: int64 [K, K], rows the true classes.

    The probe is fitted again with the penalty that the row says.

    Raises:
        ValueError: labels missing; features of another model or of other images than the row's.
    """
    hashes = {train.split: train.dataset_hash, evaluated.split: evaluated.dataset_hash}
    if (row.model_hash, row.dataset_hash) != (train.manifest.origin.model_hash, hashes):
        raise ValueError(f"{train.path} holds features of another model, or of other images, than the results' best probe")
    check_labels(evaluated)
    ids = training_images(train, None, settings.seed)
    views = [View(features, (row.layer,), row.features) for features in (train, evaluated)]
    _, predictions = probe_view(views[0], views[1:], ids, settings)
    K = len(train.classes)
    return np.bincount(evaluated.labels * K + predictions[0], minlength=K * K).reshape(K, K)
