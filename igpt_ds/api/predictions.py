"""Classes of images: a linear head on the features of one layer. In: features [B, C]. Out: a `Prediction`. For `models.py`."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from igpt_ds.api.arguments import directory_path
from igpt_ds.api.found import FoundModel
from igpt_ds.errors import InputError
from igpt_ds.evaluate.probes.saved import SavedProbe, load_probe
from igpt_ds.evaluate.probes.votes import vote


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """The classes of N images.

    Attributes:
        labels: the predicted class of each image, int64 [N].
        probabilities: float32 [N, K]; each row sums to 1.
        classes: the names of the K classes.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    classes: list[str]

    @property
    def names(self) -> list[str]:
        """The name of the predicted class of each image."""
        return [self.classes[label] for label in self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        first = ", ".join(self.names[:8]) + (", ..." if len(self) > 8 else "")
        return f"<igpt_ds.Prediction of {len(self)} images, {len(self.classes)} classes: {first}>"


@dataclass(frozen=True)
class LinearHead:
    """Class logits are features of `layer` and `kind`, [B, C], times weight.T, [C, K], plus bias [K]."""

    layer: int
    kind: str
    weight: Tensor
    bias: Tensor
    classes: list[str]

    def logits(self, features: np.ndarray) -> Tensor:
        """[B, C] -> float32 [B, K]."""
        return torch.from_numpy(features).to(self.weight.dtype) @ self.weight.T + self.bias


def class_head(found: FoundModel) -> LinearHead:
    """The class head of a fine-tuned model.

    Raises:
        ValueError: the model was not fine-tuned, or not for classes.
    """
    head, weight = found.info.class_head, found.class_head
    if head is None or weight is None:
        raise InputError(
            f"{found.path} has no class head; load a model of finetune.py, or give probe=FILE of tools/linear_probe.py"
        )
    if head.loss == "gen":
        raise InputError(f"{found.path} was fine-tuned with --loss gen, which trains no class head; fine-tune with joint or clf")
    return LinearHead(head.layer, "normed", weight, torch.zeros(len(weight)), list(head.classes))


def predicted(logits: Tensor, classes: list[str]) -> Prediction:
    """Logits [M, N, K] of each image through M masks, or M = 1 -> the class of most masks, and the mean probabilities."""
    probabilities = logits.softmax(dim=2)
    labels = vote(probabilities.argmax(dim=2).numpy(), len(classes), 0)
    return Prediction(labels, probabilities.mean(dim=0).float().numpy(), classes)


def opened_probe(found: FoundModel, dtype: str, path: str | os.PathLike[str]) -> SavedProbe:
    """A saved probe for a model that was loaded with this dtype.

    Raises:
        ValueError: it was fitted on another model or on features of another dtype, or it is damaged.
    """
    file = directory_path(path, "probe", "file")
    probe = load_probe(file)
    probe.check_model(found.info.model_hash, found.info.palette_hash, found.path, file)
    if probe.about.precision != dtype:
        precision = probe.about.precision
        raise InputError(f"{file} was fitted on features in {precision}; load the model with dtype={precision!r}")
    return probe
