"""Chooses how a run saves: `--save async` holds a second copy of each rank's state in host memory. Called by train/session.py."""

from __future__ import annotations

import socket
from collections import defaultdict

from igpt_ds import dist
from igpt_ds.cli import SharedError
from igpt_ds.memory import available_memory
from igpt_ds.plan.costs import copied_bytes
from igpt_ds.train.engine_protocol import Engine, model_size


def saves_in_background(engine: Engine, asked: str | None, beside: int = 0) -> bool:
    """Whether the run saves in the background, by --save and the free memory of every node. All ranks ask together.

    Args:
        asked: "async", "sync", or None: async where the memory suffices.
        beside: bytes of host memory that states of the fast directory will take, as told by one rank of each such directory.

    Raises:
        SharedError: async was asked for and some node has too little memory.
    """
    if asked == "sync":
        return False
    n_parameters, weight_bytes = model_size(engine)
    share = (dist.world_size(), engine.zero_optimization_stage(), weight_bytes)
    needed = copied_bytes(n_parameters, *share, ranks=1, first=dist.rank() == 0)
    in_memory = sum(dist.gather_objects(beside)) > 0
    lack = shortage(dist.gather_objects((socket.gethostname(), needed + beside, available_memory())))
    if in_memory:
        lack = lack and f"{lack}, with the states of --fast_dir"
    if lack and asked:
        raise SharedError(
            f"--save async {lack}; use --save sync, or more ranks or nodes{', or put --fast_dir on a disk' if in_memory else ''}"
        )
    if lack:
        dist.say(f"saves are synchronous: --save async {lack}")
    return not lack


def shortage(ranks: list[tuple[str, int, int | None]]) -> str:
    """Which node has too little memory for the copies of its ranks, in words; "" if none.

    Args:
        ranks: of each rank its node, the bytes of its copy, and the free bytes of its node (None: unknown).
    """
    needed, free = defaultdict[str, int](int), dict[str, int]()
    for node, copy, available in ranks:
        needed[node] += copy
        if available is not None:
            free[node] = min(available, free.get(node, available))
    for node, room in free.items():
        if needed[node] > room:
            return f"needs {needed[node]:,} bytes of host memory on {node}, which has {room:,} free"
    return ""
