"""Nearest training images in feature space, and the confusion matrix of a probe.

In: feature sets. Out: row numbers, counts. Called by `tools/figures.py`, which draws them.
"""

from __future__ import annotations

import numpy as np

from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.files import FeatureSet
from igpt_ds.evaluate.probes.linear import ProbeSettings, View, check_labels, probe_view, training_images
from igpt_ds.evaluate.report.row_types import ProbeRow


def nearest_images(train: FeatureSet, evaluated: FeatureSet, queries: np.ndarray, layer: int, kind: str, k: int) -> np.ndarray:
    """The k most similar training images of each query, the most similar first: queries int64 [Q] -> int64 [Q, k].

    The similarity is the cosine between features minus the mean of the training images, because all images share most of it.

    Raises:
        ValueError: k is out of range; the layer or kind does not exist.
    """
    n = len(train.labels)
    if not 1 <= k <= n:
        raise InputError(f"--neighbours {k} must lie between 1 and the {n} training images of {train.path}")
    everything, view = np.arange(n), View(train, (layer,), kind)
    mean = np.sum([chunk.sum(0) for chunk in view.chunks(everything)], axis=0) / n
    wanted = _unit(np.concatenate(list(View(evaluated, (layer,), kind).chunks(queries))) - mean)
    alike = np.concatenate([wanted @ _unit(chunk - mean).T for chunk in view.chunks(everything)], axis=1)
    return np.argsort(-alike, axis=1, kind="stable")[:, :k]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def probe_confusion(train: FeatureSet, evaluated: FeatureSet, row: ProbeRow, settings: ProbeSettings) -> np.ndarray:
    """The confusion matrix of a row's probe: int64 [K, K]; rows are true classes, columns predictions.

    The probe is fitted again with the penalty of the row.

    Raises:
        ValueError: labels are missing; the features are of another model or of other images than the row.
    """
    hashes = {train.split: train.dataset_hash, evaluated.split: evaluated.dataset_hash}
    if (row.model_hash, row.dataset_hash) != (train.manifest.origin.model_hash, hashes):
        raise InputError(f"{train.path} holds features of another model, or of other images, than the results' best probe")
    check_labels(evaluated)
    ids = training_images(train, None, settings.seed)
    views = [View(features, (row.layer,), row.features) for features in (train, evaluated)]
    _, predictions = probe_view(views[0], views[1:], ids, settings)
    K = len(train.classes)
    return np.bincount(evaluated.labels * K + predictions[0], minlength=K * K).reshape(K, K)
