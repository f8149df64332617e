"""Random balanced subsets of labelled images (paper 4.7): the same for linear probes and fine-tunings with few labels.

In: images with classes, a seed, the number of a subset. Out: the images of the subset. Called by `evaluate/probes/variants.py`,
and by finetune.py.
"""

from __future__ import annotations

import numpy as np

from igpt_ds.data.mixture import Mixture
from igpt_ds.errors import InputError

SUBSETS = 5  # paper 4.7


def balanced_subset(
    labels: np.ndarray, n_classes: int, n_labels: int, seed: int, number: int, what: str, least: int = 1
) -> np.ndarray:
    """The images of a random subset with equally many of each class: int64 [n_labels], rising.

    Args:
        labels: the class of each image, int64 [N].
        number: that of the subset.
        what: the flag, for the error: "--labels 40".
        least: images of a class that the caller needs.

    Raises:
        ValueError: n_labels is no multiple of the classes, or a class has too few images.
    """
    places = [np.flatnonzero(labels == k) for k in range(n_classes)]
    each, fewest = n_labels // n_classes, min(map(len, places))
    if n_labels % n_classes or not least <= each <= fewest:
        need = f"a multiple of the {n_classes} classes, with at least {least} and at most {fewest} images of each"
        raise InputError(f"{what} must be {need}")
    random = np.random.default_rng([seed, number, n_labels])
    return np.sort(np.concatenate([random.choice(place, each, replace=False) for place in places]))


def few(pool: Mixture, n_labels: int, seed: int, number: int) -> Mixture:
    """A random balanced subset of the images of one dataset, with all stored views of each.

    Raises:
        ValueError: as `balanced_subset`.
    """
    shards, first = pool.shard_sets[0], pool.shard_sets[0].first_views()
    first = np.arange(shards.n_images) if first is None else first
    labels = shards.all_labels()[first]
    chosen = balanced_subset(labels, len(pool.classes), n_labels, seed, number, f"--labels {n_labels}")
    ends = np.append(first[1:], shards.n_images)
    ids = np.concatenate([np.arange(first[image], ends[image]) for image in chosen])
    return Mixture([shards.take(ids)], None, pool.on_bad, pool.max_bad, one_view=True)
