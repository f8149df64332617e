"""One rank of one measurement of tools/bench/scale.py. In: a task as JSON. Out: the answer of rank 0 as JSON.

torchrun --nproc_per_node 2 tools/bench/scale_rank.py --task task.json
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from harness import medians

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.config import Recipe, recipe_from_dict
from igpt_ds.data.facts import DataFacts
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.ds_config import join, load_ds_config
from igpt_ds.json_files import read_json, write_json
from igpt_ds.schema import record_from
from igpt_ds.train.checkpoint.manifest import Progress, RunFacts, read_checkpoint

with lazy.imports():
    import torch

    from igpt_ds import dist
    from igpt_ds.data.loader import Batch, BatchLayout, Loader
    from igpt_ds.model.objectives import autoregressive_loss
    from igpt_ds.model.transformer import Transformer
    from igpt_ds.train.checkpoint.load import load_checkpoint
    from igpt_ds.train.checkpoint.save import Kept, save_checkpoint
    from igpt_ds.train.engine import build_engine, build_model, start_ranks, take_step
    from igpt_ds.train.loop import pretraining_loss


DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


@dataclass(frozen=True)
class RankTask:
    """What all ranks do together, as tools/bench/scale.py writes it."""

    task: str  # "steps", "saves" or "build"
    out: str  # file of rank 0's answer
    turns: int
    recipe: dict[str, object]
    data: str = ""  # shards
    directory: str = ""  # for checkpoints


def main(argv: Sequence[str] | None = None) -> None:
    """Joins the ranks, each on its own core if there are enough, and runs the task."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--task", type=Path, required=True, help="task file that tools/bench/scale.py wrote")
    file = parser.parse_args(argv).task
    lazy.load()
    values, fix = read_json(file, "task"), "run tools/bench/scale.py, which writes it"
    what = record_from(RankTask, values, f"task {file}", fix)
    device = start_ranks()
    assert device.type == "cpu", device
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[dist.rank() % len(cores)]})
    torch.set_num_threads(1)
    task = {"steps": steps, "saves": saves, "build": build}[what.task]
    answer = task(what, recipe_from_dict(what.recipe, f"task {file}"))
    if dist.rank() == 0:
        write_json(Path(what.out), answer)
    dist.barrier()


def steps(what: RankTask, recipe: Recipe) -> dict[str, float]:
    """Seconds per step of each contender, and the seconds that our step waits for images."""
    ranks = dist.world_size()
    run = join(recipe, load_ds_config(DS_CONFIGS / "zero3_fp32.json"), ranks)
    engine = build_engine(run)
    loader = Loader(ShardSet(Path(what.data), "train"), BatchLayout(recipe.batch_images, run.micro_batch, dist.rank(), ranks), 0)
    stream, loss = loader.stream(0), pretraining_loss(recipe)
    waited: list[float] = []

    def ours() -> float:
        start = time.perf_counter()
        batch = next(stream).to("cpu")
        waited.append(time.perf_counter() - start)
        return float(take_step(engine, [batch], loss, recipe.lr))

    batch = next(loader.stream(0))
    contenders = {"ours": ours, "plain": _peer_step(recipe, batch, "plain"), "fsdp2": _peer_step(recipe, batch, "fsdp2")}
    seconds = medians(contenders, what.turns, turn_seconds=0)  # each rank must make the same number of calls
    return seconds | {"wait": sorted(waited[1:])[len(waited[1:]) // 2]}


def _peer_step(recipe: Recipe, batch: Batch, kind: str) -> Callable[[], float]:
    """The same model, loss, clipping and Adam without DeepSpeed: in one process or DDP, or sharded block by block by FSDP2."""
    torch.manual_seed(0)
    model: Any = Transformer(recipe.model)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif dist.world_size() > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    adam = torch.optim.Adam(model.parameters(), lr=1e-4)
    tokens = batch.tokens.long()

    def step() -> float:
        loss = autoregressive_loss(model(tokens), tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        adam.step()
        adam.zero_grad()
        return float(loss.detach())

    return step


def saves(what: RankTask, recipe: Recipe) -> dict[str, float]:
    """Seconds to save and to load a checkpoint, to write and read the same bytes with plain torch, and the number of bytes."""
    directory = Path(what.directory)
    run = join(recipe, load_ds_config(DS_CONFIGS / "zero3_fp32.json"), dist.world_size())
    engine = build_engine(run)
    loader = Loader(
        ShardSet(Path(what.data), "train"), BatchLayout(recipe.batch_images, run.micro_batch, dist.rank(), run.world_size), 0
    )
    take_step(engine, [next(loader.stream(0)).to("cpu")], pretraining_loss(recipe), 1e-4)
    facts = RunFacts(recipe=recipe, data=DataFacts("", "", ""), precision="fp32")
    seconds = {}
    start = time.perf_counter()
    saved = save_checkpoint(engine, directory, facts, Progress(step=1, images_seen=1), Kept(1)).path
    seconds["save"] = time.perf_counter() - start
    checkpoint = read_checkpoint(saved)
    start = time.perf_counter()
    load_checkpoint(engine, checkpoint, facts)
    seconds["load"] = time.perf_counter() - start
    mine = checkpoint.manifest.bytes // dist.world_size()
    flat, path = torch.zeros(mine // 4), directory / f"plain-{dist.rank()}.pt"
    start = time.perf_counter()
    with open(path, "wb") as file:
        torch.save(flat, file)
        file.flush()
        os.fsync(file.fileno())
    seconds["plain_save"] = time.perf_counter() - start
    start = time.perf_counter()
    flat.copy_(torch.load(path))
    seconds["plain_load"] = time.perf_counter() - start
    path.unlink()
    return seconds | {"bytes": mine * dist.world_size()}


def build(what: RankTask, recipe: Recipe) -> dict[str, float]:
    """The peak memory of a rank that builds a sharded model, and the bytes of all weights."""
    run = join(recipe, load_ds_config(DS_CONFIGS / "zero3_bf16.json"), dist.world_size())
    before, start = harness.own_memory(), time.perf_counter()
    model = build_model(run)
    whole = 2.0 * sum(parameter.ds_numel for parameter in model.parameters())  # type: ignore[attr-defined]
    peaks = dist.gather_objects(harness.own_memory("VmHWM") - before)
    return {"peak": max(peaks), "whole": whole, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    cli.run(main, ranks=True)
