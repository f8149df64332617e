"""Loads a checkpoint's files without running anything that they name.

DeepSpeed reads its files with an unrestricted pickle, so a file from a stranger could run code on resume.
`RestrictedReader` replaces DeepSpeed's checkpoint engine during a load: torch's restricted reader builds plain containers,
tensors, and the few classes below, and refuses every other name. Called by train/checkpoint/load.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from igpt_ds.errors import InputError
from igpt_ds.plain_files import check_file
from igpt_ds.train.engine_protocol import Engine

_NUMPY = ("numpy._core.multiarray", "numpy.core.multiarray")  # numpy 2 and numpy 1 name the same function


def _allowed() -> list[Any]:
    """The classes in files of ours beyond torch's own list; to build one runs no code of the file."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    reconstruct = np.empty(0).__reduce__()[0]  # how numpy's generator state is built
    arrays = [(reconstruct, f"{module}._reconstruct") for module in _NUMPY]
    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, np.ndarray, np.dtype, np.dtypes.UInt32DType, *arrays]


def refuse_foreign_names(paths: Iterable[Path]) -> None:
    """Checks the names in each file before any file is loaded. Only the pickle is read, not the tensors.

    Raises:
        ValueError: a file is not one of torch.save, or names a class or function that no checkpoint of ours contains.
    """
    with safe_globals(_allowed()):
        for path in paths:
            check_file(path)
            try:
                foreign = get_unsafe_globals_in_checkpoint(str(path))
            except OSError:
                raise
            except Exception as error:  # the parser raises whatever the damage leads to
                raise InputError(f"{path} is not a file of torch.save ({error!r}); remove the checkpoint") from None
            if foreign:
                raise InputError(f"{path} names {foreign[0]!r}, which a checkpoint does not contain and which could run code; "
                                 "nothing was loaded; remove the checkpoint")  # fmt: skip


class RestrictedReader:
    """Stands in for DeepSpeed's checkpoint engine during a load."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def load(self, path: str, map_location: Any = None) -> Any:
        """What torch.save was given, read with `weights_only`."""
        with safe_globals(_allowed()):
            return torch.load(path, map_location=map_location, weights_only=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


@contextmanager
def restricted_reader(engine: Engine) -> Iterator[None]:
    """The engine's loads in this block are restricted, and look for no file of another rank.

    DeepSpeed asks on every rank whether each rank's file has the name of an older version: 262,144 questions to the disk at 512
    ranks. Files of ours have the names of this version, and this rank reads its own alone.
    """

    def names(load_dir: str, tag: str, bf16_mode: bool) -> Any:
        ranks = engine.loaded_checkpoint_dp_world_size
        return engine._get_mp_rank_zero_checkpoint_names(load_dir, tag, engine.checkpoint_mp_rank, ranks, bf16_mode)

    reader = engine.checkpoint_engine = RestrictedReader(engine.checkpoint_engine)
    engine._get_all_zero_checkpoint_names = names
    try:
        yield
    finally:
        engine.checkpoint_engine = reader.wrapped
        del engine._get_all_zero_checkpoint_names  # the class's own is back
