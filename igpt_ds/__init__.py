"""igpt_ds: Generative Pretraining from Pixels (Chen et al. 2020) under DeepSpeed ZeRO-3.

The public API; docs/api.md describes it. Importing igpt_ds loads neither torch nor numpy; the first use of a name does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from igpt_ds.errors import InputError

if TYPE_CHECKING:
    from igpt_ds.api.models import Model, load
    from igpt_ds.api.predictions import Prediction
    from igpt_ds.api.stored import Features, ShardImages, Shards, open_features, open_shards

__version__ = "0.1.0"
__all__ = [
    "Features",
    "InputError",
    "Model",
    "Prediction",
    "ShardImages",
    "Shards",
    "load",
    "open_features",
    "open_shards",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from igpt_ds.api import models, stored

    home = next(module for module in (models, stored) if hasattr(module, name))
    return globals().setdefault(name, getattr(home, name))


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
