"""The states of a rank's random generators. In: a checkpoint's states. Out: them. Called by train/checkpoint/."""

from __future__ import annotations

import random
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from igpt_ds.devices import current_device


class RngStates(TypedDict, total=False):
    """The states of a rank's random generators, as a checkpoint stores them."""

    python: tuple[Any, ...]
    numpy: Any
    torch: Tensor
    cuda: Tensor  # of the GPU, of any vendor


def rng_states() -> RngStates:
    """The state of every random generator of this rank."""
    states: RngStates = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    device = current_device()
    if device.type != "cpu":
        states["cuda"] = torch.get_device_module(device).get_rng_state()
    return states


def restore_rng(states: RngStates) -> None:
    """The inverse of `rng_states`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    device = current_device()
    if device.type != "cpu" and "cuda" in states:
        torch.get_device_module(device).set_rng_state(states["cuda"])
