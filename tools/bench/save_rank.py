"""One rank of tools/bench/save.py: trains and saves in both ways on a disk that is slowed down.

torchrun --nproc_per_node 2 tools/bench/save_rank.py --task task.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.config import Recipe, recipe_from_dict
from igpt_ds.data.facts import DataFacts
from igpt_ds.ds_config import join, load_ds_config
from igpt_ds.json_files import read_json, write_json
from igpt_ds.schema import record_from
from igpt_ds.train.checkpoint.manifest import Progress, RunFacts

with lazy.imports():
    import torch

    from igpt_ds import dist
    from igpt_ds.data.loader import Batch
    from igpt_ds.train.checkpoint import disk
    from igpt_ds.train.checkpoint.save import Kept
    from igpt_ds.train.checkpoint.saver import Saver
    from igpt_ds.train.checkpoint.tiers import Tier
    from igpt_ds.train.engine import build_engine, start_ranks, take_step
    from igpt_ds.train.loop import pretraining_loss


DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
BLOCK = 1 << 20  # bytes between two pauses of the slow disk
# Elements. DeepSpeed's own defaults are larger than the model: four ranks of 0.3 billion weights would not fit into 24 GB.
BUCKETS = {
    "reduce_bucket_size": 20_000_000,
    "stage3_prefetch_bucket_size": 20_000_000,
    "stage3_max_live_parameters": 30_000_000,
    "sub_group_size": 20_000_000,
}


@dataclass(frozen=True)
class SaveTask:
    """What all ranks do together, as tools/bench/save.py writes it."""

    out: str  # file of rank 0's answer
    directory: str  # for checkpoints
    recipe: dict[str, object]
    saves: int  # of each kind
    bytes_per_s: float  # of the disk, for all ranks together


def main(argv: Sequence[str] | None = None) -> None:
    """Joins the ranks and measures."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--task", type=Path, required=True, help="task file that tools/bench/save.py wrote")
    file = parser.parse_args(argv).task
    lazy.load()
    what = record_from(SaveTask, read_json(file, "task"), f"task {file}", "run tools/bench/save.py, which writes it")
    start_ranks()
    torch.set_num_threads(1)
    slow_down(what.bytes_per_s / dist.world_size())
    answer = measure(what, recipe_from_dict(what.recipe, f"task {file}"))
    if dist.rank() == 0:
        write_json(Path(what.out), answer)
    dist.barrier()


def slow_down(bytes_per_s: float) -> None:
    """The files of checkpoints are written no faster, as on a disk that all ranks share."""

    class Slow(disk.Hashing):
        """Pauses after each block, so that the whole file has the rate."""

        def write(self, block: Any) -> int:
            """Writes the whole block."""
            whole = memoryview(block).cast("B")
            for first in range(0, len(whole), BLOCK):
                start, piece = time.monotonic(), whole[first : first + BLOCK]
                super().write(piece)
                time.sleep(max(0.0, len(piece) / bytes_per_s - (time.monotonic() - start)))
            return len(whole)

    disk.Hashing = Slow  # type: ignore[misc]


def measure(what: SaveTask, recipe: Recipe) -> dict[str, float]:
    """Seconds that a save of each kind stops training, seconds of a step beside a flush and without, and the extra memory."""
    ranks, directory = dist.world_size(), Path(what.directory)
    ds_config = load_ds_config(DS_CONFIGS / "zero3_fp32.json")
    ds_config["zero_optimization"] |= BUCKETS  # type: ignore[typeddict-item]
    run = join(recipe, ds_config, ranks)
    engine, loss = build_engine(run), pretraining_loss(recipe)
    tokens = torch.randint(recipe.model.n_vocab, (run.micro_batch, recipe.model.n_ctx))
    batch = Batch(tokens, torch.arange(run.micro_batch), 0)
    facts = RunFacts(recipe=recipe, data=DataFacts("", "", ""), precision="fp32")
    savers = {kind: Saver(engine, facts, [Tier(directory, directory.parent)], kind == "async") for kind in ("async", "sync")}
    number, waited = 0, 0.0

    def wait_for_copy() -> None:
        nonlocal waited
        start = time.perf_counter()
        savers["async"].wait_for_copy()
        waited += time.perf_counter() - start

    def step() -> float:
        start = time.perf_counter()
        take_step(engine, [batch], loss, 1e-4, wait_for_copy)
        dist.barrier()
        return time.perf_counter() - start

    def save(kind: str) -> float:
        nonlocal number
        number += 1
        start = time.perf_counter()
        savers[kind].save(Progress(step=number, images_seen=number), Kept(1), wait=False)
        return time.perf_counter() - start

    def finish() -> float:
        start = time.perf_counter()
        savers["async"].finish()
        return time.perf_counter() - start

    for _ in range(2):
        step()
    extra = harness.peak_beyond(lambda: (save("async"), finish()))
    extra = max(extra, savers["async"].copied)  # the allocator may have had the memory from before
    copied = sum(path.stat().st_size for path in directory.glob(f"step-*/*pp_rank_{dist.rank()}_*"))
    alone, beside, stalls, stops = [], [], [], []
    for _ in range(what.saves):
        alone += [step() for _ in range(3)]
        stall, waited = save("async"), 0.0
        while dist.sum_over_ranks(torch.tensor(float(savers["async"].busy()))) > 0:
            beside.append(step())
        stalls.append(stall + waited + finish())
        stops.append(save("sync"))
    slowest = torch.tensor([max(dist.gather_objects(one)) for one in (statistics.median(stalls), statistics.median(stops))])
    share = max(dist.gather_objects(extra / copied))
    found = {"stall": float(slowest[0]), "stop": float(slowest[1]), "extra": share * copied, "copied": float(copied)}
    return found | {"alone": statistics.median(alone), "beside": statistics.median(beside), "steps": float(len(beside))}


if __name__ == "__main__":
    cli.run(main, ranks=True)
