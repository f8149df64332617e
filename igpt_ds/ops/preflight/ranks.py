"""What ranks find out together before a run: clock offsets, the speed of their links, and whether a training step works.

tools/preflight.py calls it on every rank when all ranks have arrived, and puts the results into the ranks' `NodeReport`s.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as td

from igpt_ds import dist
from igpt_ds.config import ModelConfig, Recipe
from igpt_ds.data.loader import Batch
from igpt_ds.devices import synchronize
from igpt_ds.ds_config import DsConfig, join
from igpt_ds.errors import InputError
from igpt_ds.ops.preflight.record import StepLosses
from igpt_ds.train.engine import build_engine, take_step
from igpt_ds.train.loop import pretraining_loss

_GPU_BYTES, _CPU_BYTES = 1 << 30, 1 << 22  # size of a message
_GPU_REPEATS, _CPU_REPEATS = 10, 8
LOSS_TOLERANCE = 0.05  # nats, of the first loss from ln V


def clock_offset(rounds: int = 3) -> float:
    """Seconds that this rank's clock is ahead of the median of all ranks, measured after a barrier; the smallest of rounds."""
    found = []
    for _ in range(rounds):
        dist.barrier()
        now = time.time()
        found.append(now - statistics.median(dist.gather_objects(now)))
    return min(found, key=abs)


def all_reduce_speed(device: torch.device) -> float:
    """Bus bandwidth of an all-reduce over all ranks in GB/s, as in nccl-tests: 2 (n - 1) / n of the size; 0 for one rank."""
    n = dist.world_size()
    size = _CPU_BYTES if device.type == "cpu" else _GPU_BYTES
    tensor = torch.zeros(size // 4, device=device)
    return 2 * (n - 1) / n * size / _best(device, lambda: dist.sum_over_ranks(tensor)) / 1e9 if n > 1 else 0.0


def link_speeds(device: torch.device, nodes: list[str]) -> dict[str, float]:
    """GB/s between this rank and its neighbours: {"inside": on its node, "across": with the previous and the next node}.

    An all-reduce is as slow as its slowest rank and does not show which rank that is. So each rank exchanges data with the
    previous and the next one, and the faster of the two counts: a slow rank is slow with both. nodes: the node of each rank.
    """
    size = _CPU_BYTES if device.type == "cpu" else _GPU_BYTES // 4
    mine, theirs = torch.zeros(size // 4, device=device), torch.empty(size // 4, device=device)
    speeds: dict[str, float] = {}
    for kind, pairs in pair_rounds(nodes):
        partner = next((b if a == dist.rank() else a for a, b in pairs if dist.rank() in (a, b)), None)
        dist.barrier()
        if partner is not None:
            seconds = _best(device, lambda other=partner: _exchange(mine, theirs, other))  # type: ignore[misc]
            speeds[kind] = max(speeds.get(kind, 0.0), size / seconds / 1e9)
    dist.barrier()
    return speeds


def pair_rounds(nodes: list[str]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
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


def _best(device: torch.device, act: Callable[[], Any]) -> float:
    """Seconds of the fastest of several calls. The first call opens connections and does not count."""
    seconds = []
    for _ in range(1 + (_CPU_REPEATS if device.type == "cpu" else _GPU_REPEATS)):
        start = time.perf_counter()
        act()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def small_recipe(recipe: Recipe, groups: int, parts: int) -> Recipe:
    """The recipe with two thin layers, few pixels and one image per group of ranks. The number of heads stays.

    parts: ranks that share an image; it divides the number of pixels.
    """
    sides = (side for side in range(4, recipe.model.n_px + 1) if side * side % parts == 0)
    n_px = min(next(sides, recipe.model.n_px), recipe.model.n_px)
    model = ModelConfig(n_layer=2, n_head=recipe.model.n_head, n_embd=8 * recipe.model.n_head, n_px=n_px, n_vocab=16)
    return dataclasses.replace(recipe, name="preflight", model=model, batch_images=groups, augment_pad=0, head_std=0.0)


def training_step(recipe: Recipe, ds_config: DsConfig) -> StepLosses:
    """Two steps of the real engine on a small model, with the same image on every rank: the losses of this rank.

    Raises:
        ValueError: the first loss is not ln V, or a loss is not finite.
    """
    ours = ds_config.get("igpt_ds", {})
    parts = ours.get("sequence_parallel", 1)
    if dist.world_size() % parts:  # the preflight has one rank per node, the planned run one per GPU
        parts, ds_config = 1, ds_config | {"igpt_ds": ours | {"sequence_parallel": 1}}
    small = small_recipe(recipe, dist.world_size() // parts, parts)
    run = join(small, ds_config, dist.world_size(), micro_batch=1)
    engine = build_engine(run)
    tokens = torch.randint(small.model.n_vocab, (1, small.model.n_ctx), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, torch.zeros(0, dtype=torch.int64), 0).to(engine.device)
    loss_function = pretraining_loss(small)
    start = time.perf_counter()
    first, second = (float(take_step(engine, [batch], loss_function, 1e-3)) for _ in range(2))
    known = math.log(small.model.n_vocab)  # ln V: the loss of fresh weights on any image
    if not math.isfinite(first + second) or (parts == 1 and abs(first - known) > LOSS_TOLERANCE):
        raise InputError(f"two small steps had the losses {first:.4f} and {second:.4f}; the first should be {known:.4f}")
    return StepLosses(first, second, seconds=time.perf_counter() - start, same_image=float(parts == 1))
