"""The masks through which a BERT model sees images (paper 4.6). In: arguments of `models.py`. Out: how many, and the masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from igpt_ds.api.arguments import whole
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.network import MASK_PROB
from igpt_ds.model.objectives import draw_of_masks
from igpt_ds.model.store import ModelInfo


def mask_count(given: Any, default: int, least: int, masked: bool, what: Path) -> int:
    """The number of masks of each image; `masked` says whether `what`, a model or a probe, sees masked images.

    Raises:
        ValueError: `given` is no whole number of at least `least`, or masks are given where none are seen.
    """
    draws = default if given is None else whole("mask_draws", given, least)
    if given is not None and draws and not masked:
        raise InputError(f"mask_draws={given}: {what} sees whole images, and only BERT models see masked ones; omit it")
    return draws if masked else 1


def masks_of(info: ModelInfo, draws: int, seed: Any) -> Callable[[np.ndarray], list[Tensor | None]]:
    """A function of the images' numbers that gives `draws` masks of each, bool [B, T]; [None] where images are whole."""
    number = whole("seed", seed, 0)
    prob = (info.mask_prob or MASK_PROB) if info.objective == "bert" and draws else None
    return lambda ids: [draw_of_masks(number, ids, draw, info.config.n_ctx, prob) for draw in range(draws or 1)]
