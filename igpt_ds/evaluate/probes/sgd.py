"""SGD with momentum for softmax classifiers of several learning rates at once, over the same batches.

In: features [B, C] and labels, a step after another. Out: weights, and how many images they get right. Called by sgd_probe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igpt_ds.evaluate.probes.rows import standardised

MOMENTUM = 0.9  # paper 3.4
_LOGITS, _FEATURES = 1 << 24, 1 << 26  # held at once where accuracies are counted


class Sgd:
    """Softmax classifiers of R rates over the same batches: weights [C, R K], momentum inside the paper's cosine.

    Every rate has the same cosine, so the rate itself can stand inside the momentum: v = 0.9 v + rate g; w -= cosine v. This is
    torch's SGD, in three passes over the weights.
    """

    def __init__(self, n_features: int, n_classes: int, rates: Sequence[float], device: str) -> None:
        self.rates, self.K = list(rates), n_classes
        columns = len(self.rates) * n_classes
        make: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.weights, self.momentum = (torch.zeros(n_features, columns, **make) for _ in range(2))
        self.intercepts, self.intercept_momentum = (torch.zeros(columns, **make) for _ in range(2))
        self._rates = torch.tensor(self.rates, **make)[:, None]
        self._minus_one = torch.full((1, len(self.rates), 1), -1.0, **make)

    def step(self, x: Tensor, y: Tensor, cosine: float) -> None:
        """One step: features [B, C], labels int64 [B], the cosine's value in 0..1."""
        B = len(x)
        logits = torch.addmm(self.intercepts, x, self.weights).view(B, -1, self.K)
        slopes = torch.softmax(logits, 2)
        slopes.scatter_add_(2, y.view(B, 1, 1).expand(B, len(self.rates), 1), self._minus_one.expand(B, -1, -1))
        slopes.mul_(self._rates / B)
        slopes = slopes.view(B, -1)
        self.momentum.addmm_(x.T, slopes, beta=MOMENTUM)
        self.intercept_momentum.mul_(MOMENTUM).add_(slopes.sum(0))
        self.weights.add_(self.momentum, alpha=-cosine)
        self.intercepts.add_(self.intercept_momentum, alpha=-cosine)

    def right(self, x: Tensor, y: Tensor) -> Tensor:
        """How many of these images each rate's classifier gets right: int64 [R]."""
        logits = torch.addmm(self.intercepts, x, self.weights).view(len(x), -1, self.K)
        return (logits.argmax(2) == y[:, None]).sum(0)

    def finite(self) -> Tensor:
        """bool [R]: the rates whose weights are still numbers."""
        good = torch.isfinite(self.weights).all(0) & torch.isfinite(self.intercepts)
        return good.view(-1, self.K).all(1)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        names = ("weights", "momentum", "intercepts", "intercept_momentum")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Tensor]) -> None:
        """Goes on from a checkpoint."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def cosine(step: int, steps: int) -> float:
    """The part of the rate that is left at a step, 1 at the first and 0 after the last."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


class Rows:
    """Some rows of an array, gathered when a piece of them is asked for."""

    def __init__(self, values: Any, ids: np.ndarray) -> None:
        self.values, self.ids, self.shape = values, ids, (len(ids), values.shape[1])

    def __getitem__(self, part: slice) -> np.ndarray:
        return np.asarray(self.values[self.ids[part]])


def count(sgd: Sgd, values: Any, labels: np.ndarray, standard: Any, device: str) -> list[float]:
    """The share of images that each rate's classifier gets right, read in pieces."""
    right = torch.zeros(len(sgd.rates), dtype=torch.int64, device=device)
    rows = max(1, min(_LOGITS // sgd.weights.shape[1], _FEATURES // values.shape[1]))
    for start in range(0, len(labels), rows):
        x = torch.from_numpy(np.array(values[start : start + rows], dtype=np.float32)).to(device)
        y = torch.from_numpy(np.array(labels[start : start + rows])).to(device)
        right += sgd.right(standardised(x, standard), y)
    return (right.double() / len(labels)).tolist()
