"""Predictions for new images: the probability of each class, by a fine-tuned model or by a saved probe.

In: images (`data/given_images.py` or a split of shards), a model. Out: `Predictions`, as a table or as JSON. Called by
`tools/evaluate_classifier.py` and the Python API.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from igpt_ds.data.given_images import GivenImages
from igpt_ds.data.shards.dataset import ImageSet, ShardSet
from igpt_ds.errors import InputError
from igpt_ds.evaluate.classification import MASK_SEED, ClassifyingNetwork, check_head, voting_mask
from igpt_ds.evaluate.features.network import Network
from igpt_ds.evaluate.probes.saved import ProbeAbout, SavedProbe
from igpt_ds.evaluate.probes.settings import N_MASKS
from igpt_ds.evaluate.probes.votes import vote
from igpt_ds.model.store import ModelInfo

TOP = 3  # classes of an image in a table


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predicted class of each image, int64 [N], and the probability of each class, float64 [N, number of classes]."""

    classes: list[str]
    labels: np.ndarray
    probabilities: np.ndarray

    def accuracy(self, labels: np.ndarray) -> tuple[float | None, int]:
        """The share of right predictions in 0..1, None without labels, and the number of labelled images.

        Args:
            labels: class indices, int64 [N]; -1 for an image without a label.
        """
        known = labels >= 0
        n = int(known.sum())
        return (float((self.labels == labels)[known].mean()) if n else None), n

    def top(self, image: int, n: int = TOP) -> list[tuple[str, float]]:
        """The n likeliest classes of an image and their probabilities, the likeliest first."""
        row = self.probabilities[image]
        return [(self.classes[label], float(row[label])) for label in np.argsort(-row, kind="stable")[:n]]

    def table(self, files: Sequence[str]) -> str:
        """A line for each image: its file, the predicted class and its probability, the likeliest classes."""
        rows = [("file", "class", "probability", f"top {min(TOP, len(self.classes))}")]
        for image, (file, label) in enumerate(zip(files, self.labels, strict=True)):
            top = ", ".join(f"{name} {value:.4f}" for name, value in self.top(image))
            rows.append((file, self.classes[label], f"{self.probabilities[image, label]:.4f}", top))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join([*(text.ljust(width) for text, width in zip(row[:3], widths, strict=True)), row[3]]) for row in rows
        )

    def to_dict(self, images: GivenImages) -> dict[str, object]:
        """The JSON object of predictions for images that a user named; see the help of tools/evaluate_classifier.py."""
        labels = images.labels_among(self.classes)
        accuracy, n_labelled = self.accuracy(labels)
        rows = []
        for image, (file, label) in enumerate(zip(images.keys, labels, strict=True)):
            rows.append(
                {
                    "file": file,
                    "class": self.classes[self.labels[image]],
                    "probability": float(self.probabilities[image, self.labels[image]]),
                    "top": [{"class": name, "probability": value} for name, value in self.top(image)],
                    "label": self.classes[label] if label >= 0 else None,
                    "probabilities": self.probabilities[image].tolist(),
                }
            )
        left_out = [dataclasses.asdict(row) for row in images.left_out]
        about = {"classes": self.classes, "n_images": images.n_images, "n_labelled": n_labelled, "accuracy": accuracy}
        return {**about, "images": rows, "left_out": left_out}


def classify(
    network: ClassifyingNetwork, info: ModelInfo, images: ImageSet, batch: int, device: str, mask_draws: int = N_MASKS
) -> Predictions:
    """Predictions of a fine-tuned model. A bert model sees each image through masks, which vote; probabilities are means.

    Args:
        network: in eval mode, on the device.

    Raises:
        ValueError: its class head was not trained.
    """
    check_head(info)
    assert info.class_head is not None
    mask_prob = info.mask_prob if info.objective == "bert" else None
    draws, classes, parts = mask_draws if mask_prob is not None else 1, list(info.class_head.classes), []
    with torch.inference_mode():
        for ids in _batches(images, batch):
            tokens = torch.from_numpy(images.tokens(ids).reshape(len(ids), -1)).to(device).long()
            masks = [voting_mask(ids, draw, tokens.size(1), mask_prob) for draw in range(draws)]
            on_device = [None if mask is None else mask.to(device) for mask in masks]
            found = [network(tokens, mask, with_pixels=False)[1].double().softmax(1) for mask in on_device]
            parts.append(torch.stack(found).cpu().numpy())
    probabilities = _finite(np.concatenate(parts, axis=1), images)
    return Predictions(classes, vote(probabilities.argmax(2), len(classes), MASK_SEED), probabilities.mean(0))


def apply_probe(
    probe: SavedProbe, network: Network, images: ImageSet, mask_draws: int = N_MASKS, progress: bool | None = None
) -> Predictions:
    """Predictions of a saved probe, whose model the caller has compared with the network's (`SavedProbe.check_model`).

    A probe of masked images sees each image through masks, which vote; probabilities are means (paper 4.6).
    """
    draws, classes, parts = range(mask_draws if probe.about.mask_prob is not None else 1), list(probe.about.classes), []
    for ids in _batches(images, network.batch, progress):
        grids = images.tokens(ids)
        parts.append(np.stack([probe.probabilities(probe.features(network, grids, ids, draw)) for draw in draws]))
    probabilities = _finite(np.concatenate(parts, axis=1), images)
    return Predictions(classes, vote(probabilities.argmax(2), len(classes), MASK_SEED), probabilities.mean(0))


def _batches(images: ImageSet, batch: int, progress: bool | None = None) -> tqdm[np.ndarray]:
    """The numbers of the images, with a progress bar; None: on a terminal."""
    ids = np.split(np.arange(images.n_images), range(batch, images.n_images, batch))
    return tqdm(ids, "classify", unit=" batches", leave=False, disable=None if progress is None else not progress)


def _finite(probabilities: np.ndarray, images: ImageSet) -> np.ndarray:
    """Probabilities [M, N, K] as they are; raises a ValueError that names the first image whose are not finite."""
    if not (good := np.isfinite(probabilities).all((0, 2))).all():
        wrong = int(np.flatnonzero(~good)[0])
        raise InputError(f"the prediction for image {wrong} of {images.path} is not finite; check the model, or use fp32")
    return probabilities


def check_probe_classes(probe: SavedProbe, images: ImageSet, file: Path) -> None:
    """Refuses shards with other classes than those of a probe.

    Raises:
        ValueError: they differ.
    """
    if images.classes != probe.about.classes:
        raise InputError(f"{images.path} has other classes than the probe {file}; name shards of {probe.about.dataset}")


def fitted_on(about: ProbeAbout, shards: ShardSet) -> bool:
    """Whether a probe was fitted on images of this split, as far as the hashes of the shards tell."""
    if not set(shards.split.split("+")) & set(about.train_split.split("+")):
        return False
    try:
        return ShardSet(shards.path, about.train_split).dataset_hash == about.dataset_hash.get(about.train_split)
    except InputError:  # the shards have no such split, so they are others
        return False
