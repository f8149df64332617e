"""Reshards a checkpoint. In: the files of N ranks. Out: those of M ranks.

Nothing is gathered. Each new vector is written in order from the bytes of the old ones, so memory holds one block whatever the
size of the model, and each new rank's files are made independently. It handles stages 1, 2 and 3, any parameter groups and
sub-groups, and is exact: N -> M -> N gives bit-identical numbers. Called by load.py when a run continues on another number
of ranks, and by tools/reshard.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from igpt_ds.errors import InputError
from igpt_ds.train.checkpoint.torch_files import BLOCK, NewTensor, StoredTensor, foreign_class, read_torch_file, write_torch_file
from igpt_ds.train.checkpoint.zero_layout import ZeroCheckpoint, ZeroLayout, layout_of_sequences, layout_of_sub_groups, sub_groups

SUB_GROUP_SIZE = 1_000_000_000  # DeepSpeed's default


def saved_sub_group_size(source: ZeroCheckpoint) -> int:
    """The zero_optimization.sub_group_size of the run that saved the checkpoint."""
    return int(source.contents[0]["ds_config"].get("zero_optimization", {}).get("sub_group_size", SUB_GROUP_SIZE))


def target_layout(source: ZeroCheckpoint, ranks: int, sub_group_size: int) -> ZeroLayout:
    """The layout of the same parameters on `ranks` ranks at the same stage, as DeepSpeed would divide them."""
    old = source.layout
    numels = [[(name, old.places[name].numel) for name in names] for names in old.names]
    if source.stage < 3:
        none = [[0] * len(members) for members in numels]
        paddings = source.optimizer(0).get("param_alignment_paddings", none)
        return layout_of_sequences(source.stage, numels, paddings, ranks)
    flats, groups = [], []
    for group in sorted(set(old.groups)):
        members = [entry for flat, entries in enumerate(numels) if old.groups[flat] == group for entry in entries]
        for sub_group in sub_groups(members, ranks, sub_group_size):
            flats.append(sub_group)
            groups.append(group)
    return layout_of_sub_groups(flats, groups, ranks)


def write_rank(source: ZeroCheckpoint, target: ZeroLayout, rank: int, out: Path) -> list[Path]:
    """Writes the files of the new rank `rank` into `out`; returns their paths.

    The random generators' states are those of the old rank (rank modulo old ranks).
    """
    like = rank % source.ranks
    name = source.files[like].name.replace(f"zero_pp_rank_{like}_", f"zero_pp_rank_{rank}_")
    write_torch_file(out / name, source.contents[like] | {"optimizer_state_dict": _optimizer(source, target, rank, like)})
    written = [out / name]
    if source.stage == 3 or rank == 0:
        model_file = source.model_file(like)
        content = read_torch_file(model_file) | {"dp_world_size": target.ranks}
        content["param_shapes"] = [OrderedDict((name, source.shapes[name]) for name in names) for names in target.names]
        written.append(out / model_file.name.replace(f"zero_pp_rank_{like}_", f"zero_pp_rank_{rank}_"))
        write_torch_file(written[-1], content)
    return written


def _optimizer(source: ZeroCheckpoint, target: ZeroLayout, rank: int, like: int) -> dict[str, object]:
    vectors = [_vector(source, target, rank, flat, "fp32") for flat in range(len(target.sizes))]
    groups = [
        group | {"params": [flat for flat, owner in enumerate(target.groups) if owner == number]}
        for number, group in enumerate(source.torch_optimizer(like)["param_groups"])
    ]
    inner = {
        "state": {flat: _state(source, target, rank, flat) for flat in range(len(target.sizes))},
        "param_groups": groups,
    }
    old = {**source.optimizer(like)}
    if source.stage == 3:
        changes = {"partition_count": target.ranks, "optimizer_state_dict": inner, "fp32_flat_groups": vectors}
        return old | changes
    ends = [_end_of_sequence(source, target, flat) for flat in range(len(target.sizes))]
    paddings = [min(size, max(0, (rank + 1) * size - end)) for size, end in zip(target.sizes, ends, strict=True)]
    if "zero_stage" in old:  # DeepSpeed's optimizer of stages 1 and 2 omits the padding, its BF16_Optimizer does not
        vectors = [
            NewTensor(vector.dtype, (size - padding,), partial(_cut, vector.blocks, 4 * (size - padding)))
            for vector, size, padding in zip(vectors, target.sizes, paddings, strict=True)
        ]
    return old | {
        "partition_count": [target.ranks] * len(target.sizes),
        "base_optimizer_state": inner,
        "single_partition_of_fp32_groups": vectors,
        "group_paddings": paddings,
        "param_slice_mappings": [_mapping(target, rank, flat) for flat in range(len(target.sizes))],
    }


def _end_of_sequence(source: ZeroCheckpoint, target: ZeroLayout, flat: int) -> int:
    last = target.places[target.names[flat][-1]]
    return last.shift + last.numel


def _mapping(target: ZeroLayout, rank: int, flat: int) -> OrderedDict[str, Any]:
    """DeepSpeed's table of the parameters in a rank's part of a sequence."""
    table = OrderedDict()
    for name in target.names[flat]:
        _, count, offset = target.places[name].on_rank(rank)
        if count:
            table[name] = foreign_class("deepspeed.utils.tensor_fragment", "fragment_address")(count, offset)
    return table


def _state(source: ZeroCheckpoint, target: ZeroLayout, rank: int, flat: int) -> dict[str, object]:
    """The optimizer's states of a new vector: vectors are resharded, the step count is that of the whole group."""
    states = [source.torch_optimizer(0)["state"].get(old) for old in _old_flats(source, target, flat)]
    found: dict[str, object] = {}
    for key, value in (states[0] or {}).items():
        if isinstance(value, StoredTensor) and value.shape:
            found[key] = _vector(source, target, rank, flat, key)
            continue
        for other in states[1:]:
            if _plain((other or {}).get(key)) != _plain(value):
                raise InputError(f"{source.checkpoint} has parts of a group with different {key!r}; it cannot be resharded")
        # Each vector gets its own tensor: torch would advance a shared step count once for every vector.
        found[key] = replace(value) if isinstance(value, StoredTensor) else value
    return found


def _plain(value: Any) -> Any:
    return value.read().item() if isinstance(value, StoredTensor) else value


def _old_flats(source: ZeroCheckpoint, target: ZeroLayout, flat: int) -> list[int]:
    return [old for old, group in enumerate(source.layout.groups) if group == target.groups[flat]]


def _vector(source: ZeroCheckpoint, target: ZeroLayout, rank: int, flat: int, key: str) -> NewTensor:
    dtype = source.vector(key, 0, _old_flats(source, target, flat)[0]).dtype
    return NewTensor(dtype, (target.sizes[flat],), partial(_vector_blocks, source, target, rank, flat, key, dtype))


def _vector_blocks(
    source: ZeroCheckpoint, target: ZeroLayout, rank: int, flat: int, key: str, dtype: torch.dtype
) -> Iterator[memoryview | bytes]:
    at = 0
    for name in target.names[flat]:
        start, count, offset = target.places[name].on_rank(rank)
        if count:
            yield from _zeros((offset - at) * dtype.itemsize)
            yield from source.blocks(name, key, start, count)
            at = offset + count
    yield from _zeros((target.sizes[flat] - at) * dtype.itemsize)


def _zeros(length: int) -> Iterator[bytes]:
    for start in range(0, length, BLOCK):
        yield bytes(min(BLOCK, length - start))


def _cut(blocks: Any, length: int) -> Iterator[memoryview]:
    for block in blocks():
        if length <= 0:
            return
        yield memoryview(block)[:length]
        length -= len(block)
