"""SGD with momentum for softmax classifiers of several learning rates at once, over the same batches.

In: features [B, C] and labels, step by step. Out: weights, and the share of images that they predict correctly. Called by
`sgd_search.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from igpt_ds.evaluate.probes.rows import FiniteRows, standardised

MOMENTUM = 0.9  # paper 3.4
_LOGITS, _FEATURES = 1 << 24, 1 << 26  # in memory at once while accuracies are counted


class Sgd:
    """Softmax classifiers of R rates over the same batches: weights [C, R K], momentum, and the paper's cosine.

    All rates have the same cosine, so the momentum can contain the rate: v = 0.9 v + rate g; w -= cosine v. The result equals
    torch's SGD and takes three passes over the weights.
    """

    def __init__(self, n_features: int, n_classes: int, rates: Sequence[float], device: str) -> None:
        self.rates, self.K = list(rates), n_classes
        columns = len(self.rates) * n_classes
        self.weights, self.momentum = (torch.zeros(n_features, columns, device=device) for _ in range(2))
        self.intercepts, self.intercept_momentum = (torch.zeros(columns, device=device) for _ in range(2))
        self._rates = torch.tensor(self.rates, dtype=torch.float32, device=device)[:, None]
        self._minus_one = torch.full((1, len(self.rates), 1), -1.0, device=device)

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

    def predict(self, x: Tensor) -> Tensor:
        """The class that the classifier of each rate predicts: [B, C] -> int64 [R, B]."""
        return torch.addmm(self.intercepts, x, self.weights).view(len(x), -1, self.K).argmax(2).T

    def finite(self) -> Tensor:
        """bool [R]: whether all weights of a rate are finite."""
        good = torch.isfinite(self.weights).all(0) & torch.isfinite(self.intercepts)
        return good.view(-1, self.K).all(1)

    def state(self) -> dict[str, Tensor]:
        """The tensors from which the fit continues."""
        names = ("weights", "momentum", "intercepts", "intercept_momentum")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Tensor]) -> None:
        """Sets the tensors of `state`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def cosine(step: int, steps: int) -> float:
    """The factor of the rate at a step: 1 at the first step, 0 after the last."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


class RowSubset:
    """Some rows of an array; a slice of them is read when it is needed."""

    def __init__(self, values: FiniteRows | np.ndarray, ids: np.ndarray) -> None:
        self.values, self.ids, self.shape = values, ids, (len(ids), values.shape[1])

    def __getitem__(self, part: slice) -> np.ndarray:
        return np.asarray(self.values[self.ids[part]])


RowSource = FiniteRows | RowSubset | np.ndarray  # [N, C]


def predictions(sgd: Sgd, values: RowSource, standard: tuple[np.ndarray, np.ndarray] | None, device: str) -> np.ndarray:
    """The class that the classifier of each rate predicts for each row: int64 [R, N]. Rows are read in pieces."""
    rows = max(1, min(_LOGITS // sgd.weights.shape[1], _FEATURES // values.shape[1]))
    found = []
    for start in range(0, values.shape[0], rows):
        x = torch.from_numpy(np.array(values[start : start + rows], dtype=np.float32)).to(device)
        found.append(sgd.predict(standardised(x, standard)).cpu().numpy())
    return np.concatenate(found, axis=1)
