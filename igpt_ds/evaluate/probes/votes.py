"""Masks of one image that vote (paper 4.6). Both kinds of probe and fine-tuning share this.

In: feature sets, or the predictions of each mask. Out: an error, or the class that most masks predict.
"""

from __future__ import annotations

import numpy as np

from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.files import FeatureSet


def check_masks(train: FeatureSet, evaluated: FeatureSet, n_masks: int) -> None:
    """Raises a ValueError if the features are of whole images, or have too few masks for a vote. A vote of 0 masks is none."""
    for features, need in ((train, min(1, n_masks)), (evaluated, n_masks)):
        if features.mask_draws < need:
            if not features.mask_draws and features.manifest.origin.objective == "ar":
                raise InputError(f"{features.path} is of a model with objective 'ar'; only bert models see masks, which vote")
            has = f"split {features.split!r} of {features.path} has {features.mask_draws} mask draws"
            raise InputError(f"{has}, and a vote needs {need}; extract with --mask_draws 1 {n_masks}")


def vote(predictions: np.ndarray, K: int, seed: int) -> np.ndarray:
    """The most frequent label, ties broken at random: int64 [M, N], labels 0..K-1 -> int64 [N]."""
    counts = np.stack([(predictions == label).sum(0) for label in range(K)], axis=1)
    return (counts + np.random.default_rng(seed).random(counts.shape)).argmax(1)
