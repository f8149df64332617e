"""What a probe by SGD finds. `sgd_search.py` makes these records, and report/results.py writes their rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from igpt_ds.evaluate.probes.settings import SGD_HELD_OUT


@dataclass(frozen=True)
class SgdProbe:
    """The result of one probe. Accuracies lie in 0..1. `held_out_accuracies` has one for each of `rates`; 0 if it diverged."""

    layer: int
    kind: str
    train_split: str
    eval_split: str
    n_train: int  # rows of the last fit, held-out ones included
    n_eval: int
    n_features: int
    n_classes: int
    rate: float  # the chosen one
    rates: list[float]  # all that were tried
    grid_edge: str | None  # "low" or "high" if the best rate may lie outside of `rates`
    diverged: list[float]
    held_out_accuracies: list[float]
    held_out_accuracy: float
    train_accuracy: float
    accuracy: float
    steps: int
    batch_images: int
    momentum: float
    standardised: bool
    views: int
    seed: int
    precision: str = "fp32"
    held_out: float = SGD_HELD_OUT  # share of the training images that chose the rate


@dataclass(frozen=True)
class SgdConcatProbe(SgdProbe):
    """A probe of several layers side by side (paper 4.4); `layer` is the one in the middle."""

    layers: list[int] = field(kw_only=True)


@dataclass(frozen=True)
class SgdMaskVoteProbe(SgdProbe):
    """A probe of masked images whose predictions vote (paper 4.6); `accuracy` is that of the vote."""

    n_masks: int = field(kw_only=True)
    mask_seed: int | None = field(kw_only=True)
    single_accuracy: float = field(kw_only=True)  # the mean of single_accuracies
    single_accuracies: list[float] = field(kw_only=True)  # one for each mask
