"""Checks the arguments of the API: each fault is an InputError that names the argument, its value and what is possible."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch

from igpt_ds.errors import InputError

_PRECISIONS = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16"}


def whole(name: str, value: Any, least: int) -> int:
    """A whole number of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) < 2**63:
        raise InputError(f"{name}={value!r} must be a whole number of at least {least}")
    return int(value)


def layer_list(layer: Any, n_layer: int) -> list[int]:
    """The layers of a number, "all" or a list, in its order."""
    if isinstance(layer, str) and layer == "all":
        return list(range(n_layer + 1))
    wanted = list(layer) if isinstance(layer, list | tuple | range | np.ndarray) else [layer]
    for one in wanted or [None]:
        if not isinstance(one, Integral) or isinstance(one, bool) or not 0 <= int(one) <= n_layer:
            raise InputError(f"layer={layer!r} does not exist; layers of this model are 0..{n_layer}, 'best' or 'all'")
    return [int(one) for one in wanted]


def device_name(asked: str | torch.device | None) -> str:
    """The name of a device; None and "auto" take a GPU if one exists, else the CPU."""
    name = str(asked or "auto")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise InputError(f"device={name!r} is unknown; use 'auto', 'cpu' or 'cuda'")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise InputError(f"device={name!r}: torch sees {torch.cuda.device_count()} GPUs; use 'cpu'")
    return kind if kind == "cpu" else name


def precision_name(asked: str | torch.dtype | None) -> str:
    """ "fp32" or "bf16"; None is "fp32"."""
    name = str(asked or "fp32").removeprefix("torch.")
    if name not in _PRECISIONS:
        raise InputError(f"dtype={asked!r} is unknown; use 'fp32' or 'bf16'")
    return _PRECISIONS[name]
