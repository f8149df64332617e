"""Measures training at scale on the cores of this machine: overhead of DeepSpeed, checkpoints, tools, large models.

    python tools/bench/scale.py --quick --out bench_scale.json
    python tools/bench/scale.py --show docs/bench_scale.json

Our step under ZeRO-3 is measured beside the same model in plain torch (DDP for two ranks) and in torch's FSDP2, in turns, with
one core per rank. Without --quick a model of 0.8 billion weights trains with an offloaded optimizer, and iGPT-XL is built over
four ranks. That takes half an hour, 24 GB of memory and 40 GB of disk under --work.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import numpy as np
import psutil
from harness import ON_CPU, BenchRow

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.config import Recipe, get_recipe, override, recipe_to_dict
from igpt_ds.data.palette import fit_palette
from igpt_ds.data.shards.build import write_dataset
from igpt_ds.data.shards.layout import ShardOptions
from igpt_ds.data.sources import open_source
from igpt_ds.errors import InputError
from igpt_ds.evaluate.report.run_files import CurveRow, read_curve
from igpt_ds.json_files import read_json, write_json

with lazy.imports():
    from igpt_ds import dist


ROOT = Path(__file__).resolve().parents[2]
DS_CONFIGS = ROOT / "ds_configs"
PACKAGES = ("torch", "deepspeed")
GB = 1e9


@dataclass(frozen=True)
class World:
    """The number of turns, the sizes, and the directory for files."""

    quick: bool
    toy: bool
    work: Path

    @property
    def turns(self) -> int:
        """The number of turns of each contender."""
        return 1 if self.toy else 7 if self.quick else 15

    def recipe(self, n_layer: int, n_embd: int, n_px: int, batch_images: int) -> Recipe:
        """A recipe of that shape over the digits' 17 grey levels; for --toy an 8th of the width and at most 4 layers."""
        width = max(16, n_embd // 8) if self.toy else n_embd
        shape = {
            "n_layer": min(n_layer, 4) if self.toy else n_layer,
            "n_head": 8,
            "n_embd": width,
            "n_px": 8 if self.toy else n_px,
        }
        return override(get_recipe("digits_nano_ar_8"), **shape, batch_images=batch_images, warmup_steps=0, steps=1000)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen measurements, prints the table, writes the JSON."""
    measures = {function.__name__: function for function in (overhead, checkpoints, tools, offload, xl)}
    parser = cli.parser(__doc__ or "")
    harness.add_flags(parser, "fewer turns, and no model of more than 0.1 billion weights", measures)
    parser.add_argument("--work", type=Path, help="directory for shards and checkpoints (default: a temporary directory)")
    args = parser.parse_args(argv)
    if args.show:
        print(harness.read_bench(args.show).table())
        return
    lazy.load()
    chosen = args.only or [name for name in measures if not (args.quick and name in ("offload", "xl"))]
    with tempfile.TemporaryDirectory(prefix="bench_scale.", dir=args.work) as work:
        world = World(args.quick, args.toy, Path(work))
        rows = [row for name in chosen for row in measures[name](world)]
    rows = [replace(row, bar=None) for row in rows] if args.toy else rows
    harness.finish(rows, args.out, args.quick, PACKAGES, os.cpu_count() or 1)


# --------------------------------------------------------------------------------------------------- ranks


def on_ranks(world: World, ranks: int, task: str, **what: Any) -> Any:
    """Starts tools/bench/scale_rank.py on each rank for one task, and returns the answer of rank 0."""
    values = {"task": task, "turns": world.turns, "out": str(world.work / "answer.json"), **what}
    program = [sys.executable, str(ROOT / "tools" / "bench" / "scale_rank.py")]
    harness.on_ranks(program, ranks, dist.free_port(), world.work, values)
    return read_json(world.work / "answer.json", "measurement")


# --------------------------------------------------------------------------------------------------- measurements


def shards(world: World, n_px: int) -> Path:
    """The digits, enlarged to that size, as token shards."""
    side = 8 if world.toy else n_px
    path = world.work / f"digits_{side}"
    if not path.exists():
        levels = np.rint(np.arange(17) * (255 / 16)).astype(np.uint8)
        palette, _ = fit_palette(np.repeat(levels[:, None], 3, axis=1), 17)
        write_dataset(path, open_source("digits:"), palette, ShardOptions(side))
    return path


def overhead(world: World) -> list[BenchRow]:
    """The speed of ZeRO-3 beside plain torch and FSDP2, and the time that a step waits for images."""
    rows = []
    sizes = {"tiny": world.recipe(6, 64, 8, 32), "d=512": world.recipe(4, 512, 32, 4)}
    for name, recipe in list(sizes.items())[: 1 if world.toy else None]:
        data = str(shards(world, recipe.model.n_px))
        for ranks in (1, 2):
            seconds = on_ranks(world, ranks, "steps", recipe=recipe_to_dict(recipe), data=data)
            what = f"step, {name} L={recipe.model.n_layer} T={recipe.model.n_ctx}, {ranks} rank{'s' * (ranks > 1)}"
            peers = {"plain": "torch" if ranks == 1 else "torch DDP", "fsdp2": "torch FSDP2"}
            rows += [BenchRow(what, "steps/s", 1 / seconds["ours"], 1 / seconds[kind], peer) for kind, peer in peers.items()]
        rows.append(
            BenchRow(f"wait for images, {name}", "s", seconds["wait"], seconds["ours"], "the whole step", 0.01, at_most=True)
        )
    return rows


def checkpoints(world: World) -> list[BenchRow]:
    """Seconds per GB to save and to load, checksums included, beside torch.save and torch.load of as many bytes."""
    recipe = world.recipe(8, 256 if world.quick else 1024, 8, 2)
    what = {"recipe": recipe_to_dict(recipe), "data": str(shards(world, 8)), "directory": str(world.work / "saves")}
    rows = []
    for ranks in (1, 2):
        seconds = on_ranks(world, ranks, "saves", **what)
        gb = seconds["bytes"] / GB
        note = f"{gb:.2g} GB, {ranks} rank{'s' * (ranks > 1)}"
        for verb in ("save", "load"):
            rows.append(BenchRow(verb, "s/GB", seconds[verb] / gb, seconds[f"plain_{verb}"] / gb, f"torch.{verb}", note=note))
        shutil.rmtree(world.work / "saves")
    return rows


def train(world: World, name: str, recipe: Recipe, ds_config: Path, steps: int) -> tuple[Path, float, list[CurveRow]]:
    """One rank of train.py for some steps and a checkpoint: its run directory, its peak memory in bytes, and its rows."""
    config, run_dir = world.work / f"{name}.json", world.work / name
    write_json(config, recipe_to_dict(recipe))
    words = ["--config", config, "--data", shards(world, recipe.model.n_px), "--run_dir", run_dir, "--ds_config", ds_config]
    more = ["--stop_at_step", steps, "--val_images", 1, "--log_every", 1, "--save_every", 0]
    peak, _ = watched([ROOT / "train.py", *words, *more])
    return run_dir, peak, read_curve(run_dir)


def watched(words: Sequence[object]) -> tuple[float, float]:
    """Runs a program: (peak bytes without mapped files, seconds). Mapped files do not count, because the kernel can drop them."""
    environment = os.environ | ON_CPU | {"OMP_NUM_THREADS": str(os.cpu_count())}
    start, peak = time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = psutil.Popen([sys.executable, *map(str, words)], env=environment, stdout=said, stderr=said)
        while process.poll() is None:
            with open(f"/proc/{process.pid}/status", encoding="ascii") as status:
                lines = dict(line.split(":", 1) for line in status.read().splitlines() if line.startswith("Rss"))
            peak = max(peak, 1024.0 * sum(int(lines.get(key, "0 kB").split()[0]) for key in ("RssAnon", "RssShmem")))
            time.sleep(0.01)
        if process.returncode:
            said.seek(0)
            raise InputError(f"{' '.join(map(str, words))} ended with {process.returncode}: {said.read().strip()[-600:]}")
    return peak, time.perf_counter() - start


def tools(world: World) -> list[BenchRow]:
    """Consolidation and resharding of a small and of a large checkpoint: memory must not grow, and MB/s beside a plain copy."""
    sizes = ((2, 256), (6, 512)) if world.quick else ((8, 1024), (12, 2048))
    found: dict[str, list[float]] = {"consolidate": [], "reshard": []}
    for n_layer, n_embd in sizes:
        recipe = world.recipe(n_layer, n_embd, 8, 1)
        run_dir, _, _ = train(world, f"tools_{n_embd}", recipe, DS_CONFIGS / "zero3_fp32.json", 1)
        (checkpoint,) = (run_dir / "checkpoints").glob("step-*")
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        jobs = {
            "consolidate": ["--run_dir", run_dir, "--out", world.work / "model"],
            "reshard": ["--checkpoint", checkpoint, "--ranks", 4, "--out", world.work / "resharded"],
        }
        seconds = {}
        for name, words in jobs.items():
            peak, seconds[name] = watched([ROOT / "tools" / f"{name}.py", *words])
            found[name].append(peak / 2**20)
        start = time.perf_counter()
        shutil.copytree(checkpoint, world.work / "copy")
        seconds["copy"] = time.perf_counter() - start
        for used in ("model", "resharded", "copy", run_dir.name):
            shutil.rmtree(world.work / used)
    note = f"{size / 12 / GB:.2g} billion weights"
    bigger = f"itself with {sizes[0][0] * 12 * sizes[0][1] ** 2 / GB:.2g}"
    memory = [
        BenchRow(f"memory of {name}", "MiB", big, small, bigger, 1.25, at_most=True, note=note)
        for name, (small, big) in found.items()
    ]
    speed = {name: size / 1e6 / seconds[name] for name in seconds}
    return memory + [BenchRow(name, "MB/s", speed[name], speed["copy"], "a copy", note=f"{note}, imports too") for name in found]


def offload(world: World) -> list[BenchRow]:
    """A model of iGPT-L's width and 28 of its 48 layers trains, with its optimizer offloaded, in 24 GB; 36 do not."""
    recipe = override(world.recipe(28, 1536, 32, 1), lr=1e-4)  # the 0.003 of the digits diverges at this width
    ds_config = DS_CONFIGS / "zero3_bf16_offload_optimizer.json"
    run_dir, peak, rows = train(world, "offload", recipe, ds_config, 8)
    losses = [row.loss for row in rows if row.loss is not None]
    seconds = sorted(recipe.batch_images / row.images_per_s for row in rows if row.images_per_s is not None)[len(losses) // 2]
    shutil.rmtree(run_dir)
    note = f"{12 * recipe.model.n_layer * recipe.model.n_embd**2 / GB:.3g} billion weights, {seconds:.0f} s a step"
    return [
        BenchRow("memory to train, optimizer offloaded", "GB", peak / GB, 24.0, "24 GB", 1.0, at_most=True, note=note),
        BenchRow("loss after 8 steps", "nats", losses[-1], losses[0], "its first", 1.0, at_most=True, note=note),
    ]


def xl(world: World) -> list[BenchRow]:
    """iGPT-XL built over four ranks, or two for --toy: no rank holds all weights at any time."""
    shape = get_recipe("igpt_xl_ar_64")
    recipe = world.recipe(4, 512, 8, 4) if world.toy else shape
    ranks = 2 if world.toy else 4
    answer = on_ranks(world, ranks, "build", recipe=recipe_to_dict(recipe))
    note = f"{ranks} ranks, bf16, {answer['seconds']:.0f} s"
    return [
        BenchRow(
            "building iGPT-XL, memory of a rank", "GB", answer["peak"] / GB, answer["whole"] / GB, "all weights", 0.35, True, note
        )
    ]


if __name__ == "__main__":
    cli.run(main)
