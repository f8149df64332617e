"""The links between ranks, one by one. In: the node of each rank. Out: seconds or speeds of messages to neighbours.

An all-reduce is as slow as its slowest rank and does not show which rank that is. So each rank exchanges messages with the
previous and the next one, and the faster of the two counts: a slow rank is slow with both. Called by ops/preflight/ranks.py
before a run, and by train/health/step_clock.py during one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as td

from igpt_ds import dist
from igpt_ds.devices import synchronize


def link_seconds(device: torch.device, nodes: Sequence[str], size: int, repeats: int) -> dict[str, float]:
    """Seconds of a message of `size` bytes to a neighbour: {"inside": on its node, "across": on the previous and the next node}.

    Every rank calls it.

    Args:
        nodes: the node of each rank.
        repeats: messages to each neighbour, of which the fastest counts.
    """
    mine, theirs = torch.zeros(size // 4, device=device), torch.empty(size // 4, device=device)
    found: dict[str, float] = {}
    for kind, pairs in pair_rounds(nodes):
        partner = next((b if a == dist.rank() else a for a, b in pairs if dist.rank() in (a, b)), None)
        dist.barrier()
        if partner is not None:
            seconds = fastest(device, lambda other=partner: _exchange(mine, theirs, other), repeats)  # type: ignore[misc]
            found[kind] = min(found.get(kind, seconds), seconds)
    dist.barrier()
    return found


def pair_rounds(nodes: Sequence[str]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """(kind, pairs of ranks that exchange at the same time): first inside nodes, then between neighbouring nodes.

    Each line of ranks has up to three rounds: even ranks with the next, odd ranks with the next, and the first with the last.
    """
    names = list(dict.fromkeys(nodes))
    members = [[rank for rank, name in enumerate(nodes) if name == node] for node in names]
    rails = [[ranks[place] for ranks in members if place < len(ranks)] for place in range(max(map(len, members)))]
    for kind, lines in (("inside", members), ("across", rails)):
        rounds = [
            [pair for line in lines for pair in zip(line[start::2], line[start + 1 :: 2], strict=False)] for start in (0, 1)
        ]
        rounds.append([(line[0], line[-1]) for line in lines if len(line) > 2])
        yield from ((kind, pairs) for pairs in rounds if pairs)


def _exchange(mine: torch.Tensor, theirs: torch.Tensor, other: int) -> None:
    works = td.batch_isend_irecv([td.P2POp(td.isend, mine, other), td.P2POp(td.irecv, theirs, other)])
    for work in works:
        work.wait()


def fastest(device: torch.device, act: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of several calls. One more call before them opens connections and does not count."""
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        act()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
