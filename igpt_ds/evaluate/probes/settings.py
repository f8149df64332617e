"""The numbers that a probe's flags start from, without torch; probes and their programs read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from igpt_ds.errors import InputError

# scikit-learn's C, for standardised features. With 10,000 images the best C is 1e-2 for raw pixels and 1 to 100 for narrow
# features. It falls as the number of images grows.
C_GRID = tuple(10.0**power for power in range(-5, 4))
PROBE_PRECISIONS = ("fp64", "fp32")  # of the features in memory
LABELS = (40, 250, 4000)  # paper 4.7
N_MASKS = 5  # paper 4.6
RATES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # of SGD; paper 3.4: 30, 10, 3, ...
SGD_HELD_OUT = 0.04  # of the training images: paper 3.1, for ImageNet


def layer_group(text: str) -> tuple[int, ...]:
    """The layers of one probe: "20" -> (20,); "18,19,20" -> (18, 19, 20), which are side by side.

    Raises:
        ValueError: it is neither a number nor rising numbers with commas.
    """
    words = text.split(",")
    layers = tuple(int(word) for word in words if word.isdecimal())
    if len(layers) < len(words) or list(layers) != sorted(set(layers)):
        raise InputError(f"{text!r} is not a layer, as 20, and not rising layers side by side, as 18,19,20,21,22")
    return layers


@dataclass(frozen=True)
class SgdSettings:
    """How a probe is fitted. The paper gives no batch for probes; 1,000,000 steps of 128 are a hundred epochs of ImageNet."""

    steps: int = 1_000_000  # paper 3.4
    batch_images: int = 128
    seed: int = 0
    standardise: bool = False  # mean 0 and deviation 1 over the training images; the paper's rates are for features without it
    views: int = 1  # neighbouring rows of one image, such as its crops; they are held out together
    window_bytes: int = 1 << 30  # of features in memory; twice that while the next window is read
    device: str = "cpu"
    n_masks: int | None = None  # masks of each evaluated image, whose predictions vote; None: no vote

    def __post_init__(self) -> None:
        for name in ("steps", "batch_images", "window_bytes", "views"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise InputError(f"seed={self.seed} must be at least 0")


@dataclass(frozen=True)
class RateSearch:
    """How the learning rate is chosen.

    Raises:
        ValueError: rates that are not positive numbers, or no rate at a time.
    """

    rates: Sequence[float] = RATES  # from large to small, until the best is not the smallest of those tried
    together: int = 4  # rates that are fitted at once
    held_out: float = SGD_HELD_OUT  # share of the training images that chooses the rate

    def __post_init__(self) -> None:
        if not self.rates or not all(rate > 0 and math.isfinite(rate) for rate in self.rates):
            raise InputError(f"--rates {' '.join(f'{rate:g}' for rate in self.rates)} must be positive numbers")
        if self.together < 1:
            raise InputError(f"--together {self.together} must be at least 1")
