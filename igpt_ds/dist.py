"""Ranks: the number of this process, the number of all processes, and the messages between them.

It works the same under `deepspeed`, `torchrun`, bare `srun`, `mpirun`, and in one process without a launcher. All code
that runs on several ranks calls it.

The ranks of a sequence group see the same images (model/ulysses.py); ranks of different groups see different ones.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as td
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from igpt_ds.cli import SharedError, unread_output
from igpt_ds.devices import Arrival, answer_to_all
from igpt_ds.errors import InputError, error_text
from igpt_ds.launcher import RANK_VARIABLES, LaunchError, check_address, map_environment

T = TypeVar("T")
TIME_LIMIT = timedelta(minutes=40)  # of a collective
JOIN_SECONDS = {True: 90.0, False: 300.0}  # for all ranks to come: if they are on this machine, and otherwise

_NODE_RANK = "IGPT_DS_LOCAL_RANK"  # the number on this node, once LOCAL_RANK is that of the device

_stores: dict[str, td.Store] = {}  # ours under "ours", once `join` has met the ranks
_meetings = itertools.count()  # the same number on all ranks
_sequence_groups: dict[str, td.ProcessGroup] = {}  # ours under "ours", once `start_sequence_groups` has made them


def join(backend: str, timeout: timedelta = TIME_LIMIT, arrival: Arrival | None = None) -> None:
    """Joins the process group with all ranks of the launch. A process that has joined already stays in its group.

    Args:
        backend: "gloo" or "nccl".
        timeout: limit of each later collective, in every group. The ranks themselves have JOIN_SECONDS to come.
        arrival: this rank's device; None: the devices are not compared.

    Raises:
        LaunchError: MASTER_ADDR cannot be resolved, MASTER_PORT is taken, or not all ranks came in time.
        SharedError: on every rank, if a rank cannot train or their devices do not fit together.
    """
    if td.is_initialized():
        return
    map_environment(os.environ)
    check_address(os.environ)
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    place, here = f"MASTER_ADDR={address} MASTER_PORT={port}", address in ("localhost", "127.0.0.1", "::1")
    limit = timedelta(seconds=JOIN_SECONDS[here])
    try:
        socket.getaddrinfo(address, int(port))
        if rank():
            _find_rank_0(address, int(port), limit.total_seconds())
        store, number, size = next(rendezvous("env://", timeout=limit))
    except (socket.gaierror, UnicodeError) as error:
        raise LaunchError(f"MASTER_ADDR={address} cannot be resolved ({error}); set it to the host of rank 0") from None
    except (RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
        raise LaunchError(_why_apart(str(error), place, limit)) from None
    if arrival is not None and (conflict := answer_to_all(store, number, size, arrival)):
        raise SharedError(conflict)
    store.set_timeout(timeout)
    _stores["ours"] = td.PrefixStore("igpt_ds", store)
    # Groups that are made later, such as DeepSpeed's copy of all ranks, take these limits and not that of the first group.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    td.init_process_group(backend, store=store, rank=number, world_size=size, timeout=timeout)


def _find_rank_0(address: str, port: int, seconds: float) -> None:
    """Waits until something answers. torch would wait twice as long, and print the frames of its stack."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def _why_apart(said: str, place: str, limit: timedelta) -> str:
    if "EADDRINUSE" in said:
        return f"{place}: another process uses this port; choose another one (deepspeed, torchrun: --master_port)"
    if "EACCES" in said or "permission denied" in said.lower():
        return f"{place}: this port needs more rights; choose one above 1023 (deepspeed, torchrun: --master_port)"
    joined = re.search(r"(\d+)/(\d+) clients joined", said)
    who = f"{joined[1]} of {joined[2]} ranks" if joined else "no rank 0"
    return (
        f"{place}: {who} came within {limit.total_seconds():.0f} s; start every rank. If the variables are left from another "
        f"launch, run `unset {' '.join(RANK_VARIABLES)}`"
    )


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
        with unread_output():
            print(line, flush=True)


def local_rank() -> int:
    """The number of this process among those of its node, 0-based. Its device may have another number."""
    return int(os.environ.get(_NODE_RANK) or os.environ.get("LOCAL_RANK", "0"))


def tell_device_index(index: int) -> None:
    """Makes LOCAL_RANK the number of this rank's device, as which DeepSpeed reads it. `local_rank` does not change."""
    if index != local_rank():
        os.environ[_NODE_RANK] = str(local_rank())
        for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):  # DeepSpeed refuses two that differ
            if name in os.environ:
                os.environ[name] = str(index)


def start_sequence_groups(size: int) -> None:
    """Divides the ranks into blocks of `size` consecutive ones, each of which shares the tokens of the same images.

    The ranks of a block are consecutive so that they are on one node, because they exchange activations in every layer.
    With size 1 each rank has whole images. Every rank calls this after it has joined the process group.
    """
    _sequence_groups.clear()
    if size > 1:
        first = rank() - rank() % size
        # One call on each rank for its own group: new_subgroups would make every group on every rank.
        _sequence_groups["ours"] = td.new_group(list(range(first, first + size)), use_local_synchronization=True)


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


def meet() -> None:
    """Waits until every rank has called this, however long it takes: the watchdog alone judges whether a rank hangs.

    Ranks whose work may take longer than the time limit of a collective meet here before it.
    """
    if "ours" not in _stores:  # another program made the group
        if td.is_initialized():
            barrier()
    elif world_size() > 1:
        store, key = _stores["ours"], f"meeting {next(_meetings)}"
        if store.add(key, 1) == world_size():
            store.set(f"{key}: all", "")
        wait_for(lambda: store.check([f"{key}: all"]))
        if rank():
            store.add(f"{key}: seen", 1)
        else:  # it holds the store, so it must not end before the others have looked
            wait_for(lambda: store.add(f"{key}: seen", 0) == world_size() - 1)


def wait_for(happened: Callable[[], bool]) -> None:
    """Waits until something has happened. No time limit runs meanwhile, as it would in a collective."""
    start = time.monotonic()
    while not happened():
        time.sleep(min(0.25, 0.001 + (time.monotonic() - start) / 20))


def from_rank_0(function: Callable[[], T]) -> T:
    """Calls the function on rank 0 only and returns its result on every rank. An error stops all ranks.

    The other ranks wait as in `meet`, so that the function may take longer than the time limit of a collective.

    Raises:
        SharedError: on every rank, with the text of rank 0's InputError or OSError. Any other exception is a mistake in this
            code: rank 0 raises it, and the other ranks raise SharedError instead of waiting forever.
    """
    box: list[Any] = [None, None]
    mistake: Exception | None = None
    if rank() == 0:
        try:
            box[0] = function()
        except (InputError, OSError) as error:
            box[1] = error_text(error)
        except Exception as error:
            mistake, box[1] = error, f"rank 0 failed: {type(error).__name__}: {error}"
    if world_size() > 1:
        if "ours" in _stores:
            meet()
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
