"""Ranks: the number of this process, the number of all processes, and the messages between them.

It works the same under `deepspeed`, `torchrun`, bare `srun`, and in one process without a launcher. All code that
runs on several ranks calls it.

The ranks of a sequence group see the same images (model/ulysses.py); ranks of different groups see different ones.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, MutableMapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as td

from igpt_ds.cli import SharedError, error_text

T = TypeVar("T")

_sequence_groups: dict[str, td.ProcessGroup] = {}  # ours under "ours", once `start_sequence_groups` has made them


def map_environment(env: MutableMapping[str, str]) -> None:
    """Sets those of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT that the launcher did not set.

    Under srun they come from the step's SLURM_* variables; without a launcher the process is rank 0 of 1.

    Raises:
        ValueError: a SLURM job of several tasks, but the command was not started by srun.
    """
    if "RANK" not in env and "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        env["RANK"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_LOCALID"]
        env["WORLD_SIZE"] = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
        if env["WORLD_SIZE"] != "1":
            if "MASTER_ADDR" not in env:
                env["MASTER_ADDR"] = _first_host(env)
            env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
    elif "RANK" not in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        tasks = env["SLURM_NTASKS"]
        raise ValueError(f"SLURM gave this job {tasks} tasks but only one process runs; start it with `srun` or `deepspeed`")
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", "0")
    if env["WORLD_SIZE"] == "1":
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", "0")  # a port that is free when the process opens it


def _first_host(env: MutableMapping[str, str]) -> str:
    if env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")) == "1":
        return "127.0.0.1"
    nodes = env.get("SLURM_STEP_NODELIST", env["SLURM_JOB_NODELIST"])
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise ValueError(f"cannot expand the node list {nodes!r} with scontrol; export MASTER_ADDR yourself") from None


def free_port() -> int:
    """A TCP port of this machine that no process uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def rank() -> int:
    """The number of this process among all processes, 0-based."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(line: str) -> None:
    """Prints a line on rank 0 alone."""
    if rank() == 0:
        print(line, flush=True)


def local_rank() -> int:
    """The number of this process among those of its node, 0-based; also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def start_sequence_groups(size: int) -> None:
    """Divides the ranks into blocks of `size` consecutive ones, each of which shares the tokens of the same images.

    The ranks of a block are consecutive so that they are on one node, because they exchange activations in every layer.
    With size 1 each rank has whole images. Every rank calls this after it has joined the process group.
    """
    _sequence_groups.clear()
    if size > 1:
        _sequence_groups["ours"] = td.new_subgroups(group_size=size)[0]


def sequence_group() -> td.ProcessGroup | None:
    """The ranks that share the images of this rank; None if it shares them with no other rank."""
    return _sequence_groups.get("ours")


def sequence_size() -> int:
    """The number of ranks that share an image."""
    group = sequence_group()
    return group.size() if group else 1


def sequence_rank() -> int:
    """The number of this process among those that share its images, 0-based, in the order of their tokens."""
    return rank() % sequence_size()


def data_rank() -> int:
    """The number of this process's sequence group, 0-based, which determines its images."""
    return rank() // sequence_size()


def data_world_size() -> int:
    """The number of sequence groups; each has its own images."""
    return world_size() // sequence_size()


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all ranks in place, and returns it."""
    if world_size() > 1:
        td.all_reduce(value)
    return value


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in the order of ranks, on every rank."""
    values = [None] * world_size()
    if world_size() == 1:
        return [value]
    td.all_gather_object(values, value)
    return values


def from_rank_0(function: Callable[[], T]) -> T:
    """Calls the function on rank 0 only and returns its result on every rank. An error stops all ranks.

    Raises:
        SharedError: on every rank, with the text of rank 0's ValueError or OSError. Any other exception is a mistake in this
            code: rank 0 raises it, and the other ranks raise SharedError instead of waiting forever.
    """
    box: list[Any] = [None, None]
    mistake: Exception | None = None
    if rank() == 0:
        try:
            box[0] = function()
        except (ValueError, OSError) as error:
            box[1] = error_text(error)
        except Exception as error:
            mistake, box[1] = error, f"rank 0 failed: {type(error).__name__}: {error}"
    if world_size() > 1:
        td.broadcast_object_list(box, src=0)
    if mistake is not None:
        raise mistake
    if box[1] is not None:
        raise SharedError(box[1])
    return cast(T, box[0])


def barrier() -> None:
    """Waits until every rank has called this."""
    if world_size() > 1:
        td.barrier()
