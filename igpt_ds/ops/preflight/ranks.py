"""What ranks find out together before a run: clock offsets, the speed of their links, and whether a training step works.

tools/preflight.py calls it on every rank when all ranks have arrived, and puts the results into the ranks' `NodeReport`s.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time

import torch

from igpt_ds import dist
from igpt_ds.config import ModelConfig, Recipe
from igpt_ds.data.loader import Batch
from igpt_ds.ds_config import DsConfig, join
from igpt_ds.errors import InputError
from igpt_ds.ops.preflight.record import StepLosses
from igpt_ds.train.engine import build_engine, take_step
from igpt_ds.train.health.links import fastest, link_seconds
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
    return 2 * (n - 1) / n * size / fastest(device, lambda: dist.sum_over_ranks(tensor), _repeats(device)) / 1e9 if n > 1 else 0.0


def link_speeds(device: torch.device, nodes: list[str]) -> dict[str, float]:
    """GB/s between this rank and its neighbours, see `link_seconds`. nodes: the node of each rank."""
    size = _CPU_BYTES if device.type == "cpu" else _GPU_BYTES // 4
    return {kind: size / seconds / 1e9 for kind, seconds in link_seconds(device, nodes, size, _repeats(device)).items()}


def _repeats(device: torch.device) -> int:
    return _CPU_REPEATS if device.type == "cpu" else _GPU_REPEATS


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
