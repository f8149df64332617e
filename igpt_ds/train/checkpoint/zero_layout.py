"""Finds each element of each parameter in the ZeRO files of all ranks, without DeepSpeed and without a process group.

Each rank's optimizer file holds flat vectors: `fp32` (the master weights) and the optimizer's (`exp_avg`, `exp_avg_sq`) in the
same layout. Stage 3 has a vector per sub-group, in which each parameter has a piece of ceil(numel / ranks) elements; the last
rank's piece is padded. Stages 1 and 2 have a vector per parameter group: all parameters form one flat sequence, which is padded
to a multiple of 2 * ranks and cut into equal parts. Called by train/checkpoint/reshard.py and train/checkpoint/consolidate.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from igpt_ds.console import count
from igpt_ds.errors import InputError
from igpt_ds.train.checkpoint.torch_files import StoredTensor, read_torch_file

START_ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor: each rank's part of a flat sequence is a multiple of it


@dataclass(frozen=True)
class Place:
    """A parameter in vector number `flat`. With q = shift + e, element e lies on rank q // piece at offset at + q % piece."""

    flat: int
    numel: int
    shift: int
    piece: int
    at: int

    def runs(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(rank, offset, count) of each contiguous run of the `count` elements from element `start` on."""
        while count:
            rank, inside = divmod(self.shift + start, self.piece)
            run = min(count, self.piece - inside)
            yield rank, self.at + inside, run
            start, count = start + run, count - run

    def on_rank(self, rank: int) -> tuple[int, int, int]:
        """(start, count, offset): the elements that a rank holds, and their offset in its vector."""
        start = min(max(0, rank * self.piece - self.shift), self.numel)
        end = min(max(0, (rank + 1) * self.piece - self.shift), self.numel)
        return start, end - start, self.at + (self.shift + start) % self.piece


@dataclass(frozen=True)
class ZeroLayout:
    """All vectors of a rank: the parameter group, parameters in order and length of each; and the place of each parameter."""

    stage: int
    ranks: int
    groups: list[int]
    names: list[list[str]]
    sizes: list[int]
    places: dict[str, Place]


Numels = list[list[tuple[str, int]]]  # name and number of elements of each parameter in order, by parameter group or sub-group


def sub_groups(group: list[tuple[str, int]], ranks: int, sub_group_size: int) -> Numels:
    """The sub-groups of a parameter group at stage 3, as in DeepSpeed: each ends with the parameter that fills it."""
    if sub_group_size >= sum(-(-numel // ranks) for _, numel in group):
        return [group]
    found: Numels = [[]]
    filled = 0
    for name, numel in group:
        if filled >= sub_group_size:
            found.append([])
            filled = 0
        found[-1].append((name, numel))
        filled += -(-numel // ranks)
    return found


def layout_of_sub_groups(flats: Numels, groups: list[int], ranks: int) -> ZeroLayout:
    """The layout of stage 3, from the parameters of each sub-group and the number of its parameter group."""
    places, sizes = {}, []
    for flat, members in enumerate(flats):
        at = 0
        for name, numel in members:
            piece = -(-numel // ranks)
            places[name] = Place(flat, numel, 0, max(1, piece), at)
            at += piece
        sizes.append(at)
    return ZeroLayout(3, ranks, groups, [[name for name, _ in members] for members in flats], sizes, places)


def layout_of_sequences(stage: int, flats: Numels, paddings: list[list[int]], ranks: int) -> ZeroLayout:
    """The layout of stages 1 and 2; `paddings` follow each parameter (all 0 without zero_optimization.parameter_alignment)."""
    places, sizes = {}, []
    for flat, members in enumerate(flats):
        length = sum(numel for _, numel in members) + sum(paddings[flat])
        alignment = START_ALIGNMENT * ranks
        piece = -(-length // alignment) * alignment // ranks
        shift = 0
        for (name, numel), padding in zip(members, paddings[flat], strict=True):
            places[name] = Place(flat, numel, shift, piece, 0)
            shift += numel + padding
        sizes.append(piece)
    return ZeroLayout(stage, ranks, list(range(len(flats))), [[name for name, _ in members] for members in flats], sizes, places)


class ParamGroup(TypedDict):
    """A parameter group of a torch optimizer; it also has the learning rate and so on."""

    params: list[int]  # numbers of vectors


class TorchState(TypedDict):
    """The state dict of a torch optimizer whose parameters are the vectors."""

    state: dict[int, dict[str, Any]]  # by vector: a StoredTensor for each state, and plain numbers
    param_groups: list[ParamGroup]


class ZeroState(TypedDict, total=False):
    """The keys of DeepSpeed's optimizer state that are read here. Stage 3 has the first two, stages 1 and 2 the others."""

    optimizer_state_dict: TorchState
    fp32_flat_groups: list[StoredTensor]
    base_optimizer_state: TorchState
    single_partition_of_fp32_groups: list[StoredTensor]
    param_alignment_paddings: list[list[int]]


class ZeroCheckpoint:
    """The files that `ranks` ranks saved at a ZeRO stage.

    Raises:
        ValueError: the files do not match the number of ranks or the stage.
    """

    def __init__(self, checkpoint: Path, ranks: int, stage: int) -> None:
        self.checkpoint, self.ranks, self.stage = checkpoint, ranks, stage
        self.files = [self._find(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt") for rank in range(ranks)]
        self.contents = [read_torch_file(path) for path in self.files]
        self.param_shapes: list[dict[str, torch.Size]] = read_torch_file(self.model_file(0))["param_shapes"]
        self.shapes = {name: shape for group in self.param_shapes for name, shape in group.items()}
        self.layout = self._layout()
        for rank in range(ranks):
            for flat, size in enumerate(self.layout.sizes):
                self._check(rank, flat, size)

    def model_file(self, rank: int) -> Path:
        """The file with the counters and random generators of a rank; at stages 1 and 2 all ranks share one file."""
        prefix = f"zero_pp_rank_{rank}_" if self.stage == 3 else ""
        return self._find(f"{prefix}mp_rank_00_model_states.pt")

    def optimizer(self, rank: int) -> ZeroState:
        """The state dict of DeepSpeed's optimizer."""
        found: ZeroState = self.contents[rank]["optimizer_state_dict"]
        return found

    def torch_optimizer(self, rank: int) -> TorchState:
        """The state dict of the torch optimizer inside it."""
        return self.optimizer(rank)["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]

    def vector(self, key: str, rank: int, flat: int) -> StoredTensor:
        """A rank's vector number `flat`; key: "fp32" or a state of the optimizer."""
        if key == "fp32":
            return self.optimizer(rank)["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"][flat]
        found: StoredTensor = self.torch_optimizer(rank)["state"][flat][key]
        return found

    def blocks(self, name: str, key: str = "fp32", start: int = 0, count: int | None = None) -> Iterator[memoryview]:
        """The bytes of `count` elements of a parameter in order, from element `start` on (None: to the end)."""
        place = self.layout.places[name]
        for rank, offset, run in place.runs(start, place.numel - start if count is None else count):
            yield from self.vector(key, rank, place.flat).blocks(offset, run)

    def _find(self, pattern: str) -> Path:
        matches = list(self.checkpoint.glob(pattern))
        if len(matches) != 1:
            raise InputError(f"{self.checkpoint} has {len(matches)} files {pattern} instead of 1; choose another step")
        return matches[0]

    def _layout(self) -> ZeroLayout:
        flats = [[(name, shape.numel()) for name, shape in group.items()] for group in self.param_shapes]
        if self.stage == 3:
            members = [group["params"] for group in self.torch_optimizer(0)["param_groups"]]
            owner = {flat: number for number, flats_of_group in enumerate(members) for flat in flats_of_group}
            return layout_of_sub_groups(flats, [owner.get(flat, 0) for flat in range(len(flats))], self.ranks)
        if self.contents[0]["ds_config"].get("zero_optimization", {}).get("round_robin_gradients"):
            raise InputError(f"{self.checkpoint} was saved with round_robin_gradients, whose order this code does not read")
        none = [[0] * len(members) for members in flats]
        return layout_of_sequences(self.stage, flats, self.optimizer(0).get("param_alignment_paddings", none), self.ranks)

    def _check(self, rank: int, flat: int, size: int) -> None:
        held = self.vector("fp32", rank, flat)
        least = max((at + count for _, count, at in self._held(rank, flat)), default=0)
        # Stages 1 and 2 omit the padding at the end.
        if held.dtype != torch.float32 or not (held.numel == size or (self.stage < 3 and least <= held.numel <= size)):
            raise InputError(
                f"{self.files[rank]} holds {held.numel} numbers of vector {flat} instead of {size}; "
                f"it is not of {count(self.ranks, 'rank')} at stage {self.stage}"
            )

    def _held(self, rank: int, flat: int) -> Iterator[tuple[int, int, int]]:
        runs = (self.layout.places[name].on_rank(rank) for name in self.layout.names[flat])
        return (run for run in runs if run[1])
