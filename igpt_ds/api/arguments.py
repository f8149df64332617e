"""Checks the arguments of the API: each fault is an InputError that names the argument, its value and what is possible."""

from __future__ import annotations

import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igpt_ds.devices import refuse_idle_gpus
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.manifest import KINDS
from igpt_ds.model.sampling import Filter

_PRECISIONS = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16"}


def directory_path(path: str | os.PathLike[str], name: str = "path", kind: str = "directory") -> Path:
    """The path that a user gives as the argument `name`, with ~ replaced by the home directory."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in str(path):
        raise InputError(f"{name}={path!r} must be the path of a {kind}")
    return Path(path).expanduser()


def check_kind(kind: Any) -> None:
    """Refuses an unknown kind of features."""
    if kind not in KINDS:
        raise InputError(f"kind={kind!r} is unknown; known: {', '.join(KINDS)}")


def pixel_filter(temperature: Any, top_k: Any = None, top_p: Any = None) -> Filter:
    """How samples are drawn, of numbers alone."""
    for name, value in (("temperature", temperature), ("top_p", 1.0 if top_p is None else top_p)):
        if not isinstance(value, Real):
            raise InputError(f"{name}={value!r} must be a number")
    return Filter(temperature, None if top_k is None else whole("top_k", top_k, 1), top_p)


def whole(name: str, value: Any, least: int) -> int:
    """A whole number of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) < 2**63:
        raise InputError(f"{name}={value!r} must be a whole number of at least {least}, below 2^63")
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
    """The name of a device; None and "auto" take a GPU if one exists, else the CPU. GPUs that torch cannot use are refused."""
    name = "auto" if asked is None else str(asked)
    if name == "auto":
        refuse_idle_gpus(otherwise="give device='cpu'")
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise InputError(f"device={name!r} is unknown; use 'auto', 'cpu' or 'cuda'")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise InputError(f"device={name!r}: torch sees {torch.cuda.device_count()} GPUs; use 'cpu'")
    return kind if kind == "cpu" else name


def precision_name(asked: str | torch.dtype | None) -> str:
    """ "fp32" or "bf16"; None is "fp32"."""
    name = ("fp32" if asked is None else str(asked)).removeprefix("torch.")
    if name not in _PRECISIONS:
        raise InputError(f"dtype={asked!r} is unknown; use 'fp32' or 'bf16'")
    return _PRECISIONS[name]
