"""Whole float32 weights out of the ZeRO-3 files of all ranks, one tensor at a time, without DeepSpeed or any process group.

Each rank's optimizer file holds, for every sub-group, a flat float32 vector: the rank's piece of each tensor in turn, a
piece being ceil(numel / ranks) long and the last one padded. Called by tools/consolidate.py.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class _Inert:
    """Stands for any object of a foreign class in a checkpoint; nothing of it is read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_PLAIN = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
}


class _Unpickler(pickle.Unpickler):
    """Builds tensors and plain containers; everything else (DeepSpeed's loss scaler) becomes inert and runs no code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _rebuild_plain
        return super().find_class(module, name) if (module, name) in _PLAIN else _Inert


def _rebuild_plain(rebuild: Callable[..., Tensor], kind: type, arguments: tuple[Any, ...], attributes: Any) -> Tensor:
    return rebuild(*arguments)  # a tensor on which DeepSpeed hung attributes, without them


def _load(path: Path) -> dict[str, Any]:
    module = ModuleType("plain_pickle")
    module.Unpickler = _Unpickler  # type: ignore[attr-defined]
    module.load = lambda file, **options: _Unpickler(file, **options).load()  # type: ignore[attr-defined]
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=module)


def whole_tensors(checkpoint: Path, world_size: int) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, float32 tensor) for every parameter of a ZeRO-3 checkpoint written by world_size ranks.

    Raises:
        ValueError: the files are not those of a ZeRO-3 checkpoint of that many ranks.
    """
    states = [_load(path) for path in _files(checkpoint, "optim_states", world_size)]
    flat = [state["optimizer_state_dict"]["fp32_flat_groups"] for state in states]
    shapes = _load(_files(checkpoint, "model_states", world_size)[0])["param_shapes"]
    for group, group_shapes in enumerate(shapes):
        offset = 0
        for name, shape in group_shapes.items():
            numel = shape.numel()
            piece = -(-numel // world_size)
            pieces = [flat[rank][group][offset : offset + piece] for rank in range(world_size)]
            offset += piece
            yield name, torch.cat(pieces)[:numel].view(shape).clone()


def _files(checkpoint: Path, kind: str, world_size: int) -> list[Path]:
    found = []
    for rank in range(world_size):
        matches = list(checkpoint.glob(f"*zero_pp_rank_{rank}_mp_rank_00_{kind}.pt"))
        if len(matches) != 1:
            raise ValueError(f"{checkpoint} has {len(matches)} {kind} files of rank {rank} instead of 1; choose another step")
        found.append(matches[0])
    return found
