"""Measures training steps on two cores without a GPU: precision, micro batch, ranks and threads, and a plain torch loop.

    python tools/bench/cpu.py --quick --out bench_cpu.json
    python tools/bench/cpu.py --show docs/bench_cpu.json

Each row is a shipped ds_config under DeepSpeed. Its peer is the one that the documentation and the note at the start of a run
recommend. The plain loop is nanoGPT's model with our norm and activation in one process, in bf16 by autocast. --quick takes two
minutes. Exit status: 1 if a bar is missed.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import harness
import numpy as np
from harness import BenchRow, medians

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.config import Recipe, get_recipe, override
from igpt_ds.ds_config import SHIPPED, join, load_ds_config

with lazy.imports():
    import torch
    from plain import Plain

    from igpt_ds import dist
    from igpt_ds.data.loader import to_batches
    from igpt_ds.model.cpu_speed import faster_precision
    from igpt_ds.model.objectives import autoregressive_loss
    from igpt_ds.train.engine import build_engine, start_ranks, take_step
    from igpt_ds.train.loop import pretraining_loss

PACKAGES = ("torch", "deepspeed")
CORES = 2
RECOMMENDED = {"cifar10_nano_ar_16": "bf16", "digits_nano_ar_8": "fp32"}  # of README, docs/one_machine.md and tools/paper.sh
Seconds = dict["Setting", float]


@dataclass(frozen=True)
class Setting:
    """How a recipe's step is computed; all use CORES cores."""

    precision: str
    ranks: int
    micro_batch: int
    plain: bool = False

    @property
    def text(self) -> str:
        """The setting in words."""
        threads = CORES // self.ranks
        layout = f"{self.ranks} rank{'s' * (self.ranks > 1)} x {threads} thread{'s' * (threads > 1)}"
        return f"{'plain torch' if self.plain else 'zero3'}_{self.precision}, micro batch {self.micro_batch}, {layout}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures each recipe in each setting, prints the table, writes the JSON."""
    parser = cli.parser(__doc__ or "")
    harness.add_flags(parser, "fewer turns", RECOMMENDED)
    args = parser.parse_args(argv)
    if args.show:
        print(harness.read_bench(args.show).table())
        return
    lazy.load()
    rows = []
    for name in args.only or RECOMMENDED:
        recipe = get_recipe(name)
        if args.toy:
            recipe = override(recipe, n_layer=1, n_head=2, n_embd=8, n_px=4, batch_images=8)
        turns = 1 if args.toy else 3 if args.quick else 9
        seconds: Seconds = {}
        for ranks in (1, CORES):
            seconds |= _on_ranks(ranks, recipe, turns)
        rows += [replace(row, bar=None) if args.toy else row for row in _rows(recipe, seconds)]
    harness.finish(rows, args.out, args.quick, PACKAGES, CORES)


def _rows(recipe: Recipe, seconds: Seconds) -> list[BenchRow]:
    rates = {setting: recipe.batch_images / value for setting, value in seconds.items()}
    ours = {setting: rate for setting, rate in rates.items() if not setting.plain}
    best, mine = max(ours, key=ours.__getitem__), _recommended(recipe)
    rows = [
        BenchRow(f"{recipe.name}: {setting.text}", "images/s", rate, ours[mine], "the recommended setting")
        for setting, rate in ours.items()
    ]
    rows.append(BenchRow(f"{recipe.name}: recommended, {mine.text}", "images/s", ours[mine], ours[best], best.text, 0.95))
    for setting, rate in rates.items():
        if setting.plain:
            peers = {other: value for other, value in ours.items() if other.precision == setting.precision}
            fastest = max(peers, key=peers.__getitem__)
            rows.append(BenchRow(f"{recipe.name}: {fastest.text}", "images/s", peers[fastest], rate, setting.text, 1.0))
    return rows


def _recommended(recipe: Recipe) -> Setting:
    precision, micro_batch = RECOMMENDED[recipe.name], recipe.batch_images // CORES
    faster = faster_precision(recipe.model, precision, recipe.objective == "ar", micro_batch)
    return Setting(faster[0] if faster else precision, CORES, micro_batch)


# --------------------------------------------------------------------------------------------------- ranks


def _on_ranks(ranks: int, recipe: Recipe, turns: int) -> Seconds:
    """The median seconds of a step in each setting of this number of ranks, measured in turns by new processes."""
    context = multiprocessing.get_context("spawn")
    answers, port = context.Queue(), str(dist.free_port())
    os.environ["OMP_NUM_THREADS"] = str(CORES // ranks)
    processes = [context.Process(target=_rank, args=(number, ranks, port, recipe, turns, answers)) for number in range(ranks)]
    for process in processes:
        process.start()
    found: Seconds = {}
    while not found:
        with suppress(queue.Empty):
            found = answers.get(timeout=1)
        if any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
            raise RuntimeError(f"a rank of {ranks} failed; its error is above")
    for process in processes:
        process.join()
    return found


def _rank(number: int, ranks: int, port: str, recipe: Recipe, turns: int, answers: Any) -> None:
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""})
    start_ranks()
    torch.set_num_threads(CORES // ranks)
    settings = [
        Setting(precision, ranks, recipe.batch_images // parts)
        for precision in ("fp32", "bf16")
        for parts in (4, 2, 1)
        if parts >= ranks
    ]
    settings += [Setting(precision, 1, recipe.batch_images // 2, plain=True) for precision in ("fp32", "bf16") if ranks == 1]
    steps = {setting.text: (_plain if setting.plain else _ours)(setting, recipe) for setting in settings}
    seconds = medians(steps, turns, turn_seconds=0)  # one step a turn, so that the ranks do the same
    if number == 0:
        answers.put({setting: seconds[setting.text] for setting in settings})
    dist.barrier()


def _ours(setting: Setting, recipe: Recipe) -> Callable[[], object]:
    ds_config = load_ds_config(SHIPPED / f"zero3_{setting.precision}.json")
    run = join(recipe, ds_config, setting.ranks, setting.micro_batch)
    engine, loss = build_engine(run), pretraining_loss(recipe)
    model = recipe.model
    grids = np.random.default_rng(dist.rank()).integers(0, model.n_vocab, (run.micro_batch, model.n_px, model.n_px))
    batches = to_batches(grids, np.zeros(len(grids), np.int64), np.arange(len(grids)), run.micro_batch) * run.accumulation
    return lambda: take_step(engine, batches, loss, recipe.lr)


def _plain(setting: Setting, recipe: Recipe) -> Callable[[], object]:
    torch.manual_seed(0)
    model = Plain(recipe.model, ours=True)
    adam = torch.optim.Adam(model.parameters(), recipe.lr, recipe.betas, recipe.eps)
    tokens = torch.randint(recipe.model.n_vocab, (setting.micro_batch, recipe.model.n_ctx))
    parts = recipe.batch_images // setting.micro_batch

    def step() -> None:
        for _ in range(parts):
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16"):
                logits = model(tokens)
            (autoregressive_loss(logits, tokens) / parts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        adam.step()
        adam.zero_grad()

    return step


if __name__ == "__main__":
    cli.run(main)
